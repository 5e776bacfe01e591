"""Trains a model that picks one of several choices, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/choose.py --config configs/next/local.yaml [key=value …] [--resume]
python training/choose.py --evaluate runs/next-local [max_length=512]
"""

from collections.abc import Mapping
from typing import Any

from choosing import ChooseSettings, choice_rows, load_choices
from command_line import command_line
from metrics import Accuracy
from tasks import Scorer, Task
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMultipleChoice, DataCollatorForMultipleChoice

Judged = tuple[float, int, int]  # loss, the class that is predicted and the true one


class ChoiceScorer(Scorer):
    """Loss and accuracy of examples with one label each."""

    names = ("accuracy",)

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Judged]:
        logits, labels = outputs.logits.float(), batch["labels"]
        losses = cross_entropy(logits, labels, reduction="none")
        return list(zip(losses.tolist(), logits.argmax(-1).tolist(), labels.tolist(), strict=True))

    def scores(self, found: list[Judged]) -> dict[str, float]:
        losses, predictions, references = zip(*found, strict=True)
        accuracy = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
        return {"loss": sum(losses) / len(losses), **(accuracy or {})}


def limits(settings: ChooseSettings) -> list[str]:
    made = (
        "It has learnt to tell what comes next in a text from what stands in other texts, by whatever shows it: topic, "
    )
    made += "time and style as well as what is said."
    return [made] if settings.examples == "next" else ["It always picks one of the choices, also where none is right."]


TASK = Task(
    script="choose.py",
    settings_class=ChooseSettings,
    auto_class=AutoModelForMultipleChoice,
    task_type="multiple-choice",
    purpose="It reads a context with each of several choices and picks one.",
    unit="examples",
    load=load_choices,
    encode=choice_rows,
    collate=DataCollatorForMultipleChoice,
    scorer=ChoiceScorer,
    limits=limits,
)
run, evaluate_folder = TASK.run, TASK.evaluate_folder


def main(arguments: list[str] | None = None) -> None:
    command_line(TASK.script, __doc__, TASK.settings_class, run, evaluate_folder, arguments)


if __name__ == "__main__":
    main()
