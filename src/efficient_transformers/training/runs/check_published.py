"""Open exported models as a user who downloads them would, and compare them with their cards.

`python training/publish.py --check` exports folders of model_cards and runs this file on them, in a process that cannot
import the package; this module imports nothing from it. The logits recorded in a card must be reproduced, and a
classifier is evaluated on its test data, one window at a time: its accuracy must match that of the card to the last
digit. The parent process, which has the package, writes the windows to a file next to the exported folder. It also
ensures that all code in that folder, which runs here, is the package's own or allowed by the user.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.modules["efficient_transformers"] = None  # type: ignore[assignment] # an editable install must not hide a leak
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # nor must the cached code of another folder

import torch
import transformers
from huggingface_hub import ModelCard

TEXT = "We the people of the United States, in order to form a more perfect union, establish justice."
FIRST_LOGITS = 8  # recorded for a language model, whose vocabulary is too large to record
WINDOWS = "test_windows.json"  # next to the folder of a classifier: token ids and classes of its test windows
CLASSIFIER = "AutoModelForSequenceClassification"
TOLERANCE = 1e-3  # other processors add in another order


def logits_of(folder: Path, auto_class: str, trust_remote_code: bool) -> list[float]:
    """Logits of the fixed text: those of the classes, or the first ones at the last token of a language model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        logits = model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    return (logits if auto_class == CLASSIFIER else logits[-1, :FIRST_LOGITS]).tolist()


def accuracy_of(folder: Path, windows: dict[str, list]) -> float:
    """Accuracy on the windows, each evaluated separately."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        classes = [model(torch.tensor([ids])).logits.argmax().item() for ids in windows["input_ids"]]
    return sum(map(int.__eq__, classes, windows["labels"])) / len(classes)


def check(folder: Path) -> list[str]:
    """Differences between an exported folder and its card."""
    card = ModelCard.load(folder / "README.md")
    found = re.search(r"```json\n(.*?)\n```", card.text, re.S)
    if found is None:
        return ["its card has no recorded logits"]
    recorded, wrong = json.loads(found[1]), []
    logits = torch.tensor(logits_of(folder, recorded["auto_class"], trust_remote_code=True))
    difference = (logits - torch.tensor(recorded["logits"])).abs().max().item()
    if not difference < TOLERANCE:
        wrong.append(f"its logits differ by {difference:.2g} from those of its card")
    if recorded["auto_class"] == CLASSIFIER:
        results = card.data.eval_results or []  # type: ignore[attr-defined]
        (stated,) = (result.metric_value for result in results if result.metric_type == "accuracy")
        windows = json.loads(folder.with_name(WINDOWS).read_text(encoding="utf-8"))
        if (accuracy := accuracy_of(folder, windows)) != stated:
            wrong.append(f"its test accuracy is {accuracy}, but its card says {stated}")
    return wrong


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    failed = False
    for folder in given.folders:
        try:
            wrong = check(folder)
        except (OSError, ValueError, ImportError) as error:
            wrong = [f"it cannot be opened: {' '.join(str(error).split())}"]
        failed = failed or bool(wrong)
        print(f"{folder.name}: {'; '.join(wrong) or 'matches its card'}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
