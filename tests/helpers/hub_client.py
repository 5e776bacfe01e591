"""What users do with a Hub, each a function with its own checks, run by test_hub.py in a process of its own.

`python tests/helpers/hub_client.py with|without REPORT` runs those that need the package, or those that must do
without it, and writes what each returned, or its traceback, into REPORT.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repository import ROOT

if sys.argv[1] == "without":
    sys.modules["efficient_transformers"] = None  # type: ignore[assignment] # an editable install must not hide a leak

import httpx2
import torch
import transformers
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

torch.set_num_threads(1)
TOKENIZER = ROOT / "data" / "tokenizer"
IDS = torch.arange(5, 75)[None]
LARGE = bytes(range(256)) * 80_000  # 20 MB
STAGES: dict[str, list[Callable[[], Any]]] = {"with": [], "without": []}


def stage(group: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        STAGES[group].append(function)
        return function

    return add


def small_classifier() -> transformers.PreTrainedModel:
    from efficient_transformers import EtLocalConfig, EtLocalForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return EtLocalForSequenceClassification(EtLocalConfig(vocab_size=4096, window_size=8, **sizes)).eval()


def save_run(folder: Path, **card: Any) -> transformers.PreTrainedModel:
    """Write a folder as in model_cards, without code, and with something in it that is not for the Hub."""
    from huggingface_hub import EvalResult

    from efficient_transformers.cards import model_card

    model = small_classifier()
    model.classifier.bias.data.fill_(0.5)  # other weights than the ones pushed elsewhere: a Hub keeps a file once
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    result = EvalResult("text-classification", "era", "era", "accuracy", 0.5, dataset_split="test")
    given: dict[str, Any] = {"results": [result], "license": "apache-2.0", **card}
    text = model_card(
        name=folder.name,
        auto_class="AutoModelForSequenceClassification",
        description="Small.",
        training={"steps": 1},
        command="true",
        limits=["small"],
        **given,
    )
    (folder / "README.md").write_text(str(text), encoding="utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.bin").write_bytes(b"moments")
    return model


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and all output of the command line."""
    from efficient_transformers.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(arguments)
    return code, out.getvalue()


def let_through(uploads: int) -> None:
    httpx2.post(f"{constants.ENDPOINT}/uploads-left/{uploads}").raise_for_status()


@stage("with")
def large_file() -> None:
    """Through LFS, back in full, and a few bytes from its midst."""
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    repo = api.create_repo("large").repo_id
    api.upload_file(path_or_fileobj=LARGE, path_in_repo="data/large.bin", repo_id=repo)
    (found,) = api.get_paths_info(repo, ["data/large.bin"])
    assert found.lfs.size == found.size == len(LARGE)  # type: ignore[union-attr]
    assert Path(hf_hub_download(repo, "data/large.bin")).read_bytes() == LARGE
    assert HfFileSystem().cat_file(f"{repo}/data/large.bin", start=10**7 + 5, end=10**7 + 9) == LARGE[10**7 + 5 :][:4]


@stage("with")
def errors() -> None:
    """Each is known to the client for what it is."""
    for error, ask in (
        (RepositoryNotFoundError, lambda: HfApi().model_info("tester/nothing")),
        (RevisionNotFoundError, lambda: HfApi().model_info("tester/large", revision="v9")),
        (EntryNotFoundError, lambda: hf_hub_download("tester/large", "nothing.txt")),
        (RepositoryNotFoundError, lambda: HfApi(token=False).model_info("tester/hidden")),
    ):
        if error is RepositoryNotFoundError:
            HfApi().create_repo("tester/hidden", private=True, exist_ok=True)
        try:
            ask()
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")


@stage("with")
def pushed_by_the_model() -> dict[str, Any]:
    """`push_to_hub` of model and tokenizer, on a branch too; loaded by its name, with the package."""
    model = small_classifier()
    model.push_to_hub("era-local", commit_message="the model")
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).push_to_hub("era-local")
    with torch.no_grad():
        logits = model(IDS).logits
        model.classifier.bias.add_(1.0)
    model.push_to_hub("era-local", revision="plus-one", create_pr=False)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained("tester/era-local").eval()
    assert type(loaded) is type(model)  # the package's class, not the copy of it
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits)
    return {"logits": logits.tolist()}


@stage("with")
def pushed_by_the_trainer() -> None:
    import datasets

    rows = [{"input_ids": list(range(5, 20)), "labels": i % 2} for i in range(4)]
    arguments = transformers.TrainingArguments(
        "fine-tuned", max_steps=2, report_to="none", use_cpu=True, push_to_hub=True, hub_private_repo=True,
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = transformers.Trainer(
        small_classifier(), arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    trainer.push_to_hub()
    there = HfApi().list_repo_files("tester/fine-tuned")
    code = {"modeling_local.py", "base_configuration.py"}
    assert {"model.safetensors", "tokenizer.json", "README.md", *code} <= {*there}


@stage("with")
def data_set() -> None:
    import datasets

    rows = {"text": ["Fellow citizens", "My fellow Americans"], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).push_to_hub("tester/addresses")
    loaded = datasets.load_dataset("tester/addresses")
    assert loaded["train"].to_dict() == rows


@stage("with")
def dry_run() -> str:
    save_run(Path("era-linear"), base_model="et-local-mlm")
    code, out = command("push", "era-linear", "tester/dry", "--dry-run")
    assert code == 0, out
    assert not HfApi().repo_exists("tester/dry")
    return out


@stage("with")
def refusals() -> str:
    """All that is missing in one line; and nothing is created."""
    save_run(Path("bare"), license=None, results=[])
    Path("bare/model.safetensors").unlink()
    code, out = command("push", "bare", "tester/bare")
    assert code == 2
    for said in ("no weights", "names no licence", "has no results"):
        assert said in out, out
    assert command("push", "bare", "tester/bare", "--dry-run")[0] == 2
    Path("era-linear/metrics.json").write_text(json.dumps({"token": os.environ["HF_TOKEN"]}))
    code, leak = command("push", "era-linear", "tester/era-linear")
    Path("era-linear/metrics.json").unlink()
    assert code == 2
    assert "metrics.json contains your token" in leak
    token = os.environ.pop("HF_TOKEN")
    code, unknown = command("push", "era-linear", "tester/era-linear")
    os.environ["HF_TOKEN"] = token
    assert code == 2
    assert "there is no token" in unknown
    assert not HfApi().repo_exists("tester/bare")
    assert not HfApi().repo_exists("tester/era-linear")
    return out + leak + unknown


@stage("with")
def broken_off_and_pushed_again() -> str:
    """The second call uploads the files that the first one did not get through, and no others."""
    api, folder = HfApi(), Path("era-linear")
    save_file({"a": torch.zeros(3)}, folder / "adapter_model.safetensors")  # a second large file
    let_through(1)
    try:
        code, out = command("push", str(folder), "tester/era-linear")
    finally:
        let_through(1)
    assert code == 2, out
    assert api.list_repo_files("tester/era-linear") == []  # nobody sees half of it
    code, out = command("push", str(folder), "tester/era-linear", "--tag", "v1", "--collection", "The zoo")
    let_through(10**6)
    assert code == 0, out
    info = api.model_info("tester/era-linear", revision="v1")
    assert info.private
    card = Path(hf_hub_download("tester/era-linear", "README.md")).read_text(encoding="utf-8")
    assert card.count('from_pretrained("tester/era-linear"') == 2  # on the Hub it opens what is there
    assert "base_model: tester/et-local-mlm" in card
    assert {"model.safetensors", "README.md", "modeling_local.py"} <= {*api.list_repo_files("tester/era-linear")}
    assert "checkpoints/optimizer.bin" not in api.list_repo_files("tester/era-linear")
    # and a third one changes nothing
    code, again = command("push", str(folder), "tester/era-linear", "--tag", "v1", "--collection", "The zoo")
    assert code == 0, again
    assert api.model_info("tester/era-linear").sha == info.sha
    return out + again


@stage("with")
def pushed_to_a_branch() -> None:
    """Old shards go, the main branch stays as it was, and a public repository asks to be named so."""
    api, folder = HfApi(), Path("era-linear")
    before = api.model_info("tester/era-linear").sha
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00001.safetensors")
    code, out = command("push", str(folder), "tester/era-linear", "--revision", "next", "--tag", "v1")
    assert code == 2
    assert "'v1' of tester/era-linear already names another commit" in out
    files = api.list_repo_files("tester/era-linear", revision="next")
    assert "model-00001-of-00001.safetensors" in files
    assert "model.safetensors" not in files
    assert api.model_info("tester/era-linear").sha == before
    code, out = command("push", str(folder), "tester/era-open", "--public")
    assert code == 0, out
    assert not api.model_info("tester/era-open").private
    code, out = command("push", str(folder), "tester/era-open")
    assert code == 2
    assert "already public" in out


@stage("without")
def opened_without_the_package() -> dict[str, Any]:
    """By name and by the folder of a snapshot; the branch gives other logits."""
    auto_class, opening = transformers.AutoModelForSequenceClassification, {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained("tester/era-local", **opening)
    assert tokenizer("union").input_ids
    model = auto_class.from_pretrained("tester/era-local", **opening).eval()
    assert type(model).__module__.startswith("transformers_modules")
    branch = auto_class.from_pretrained("tester/era-local", revision="plus-one", **opening).eval()
    folder = snapshot_download("tester/era-local")
    local = auto_class.from_pretrained(folder, **opening).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(local(IDS).logits, logits)
        torch.testing.assert_close(branch(IDS).logits, logits + 1)
    return {"logits": logits.tolist()}


@stage("without")
def tag_of_a_private_repository() -> None:
    folder = Path(snapshot_download("tester/era-linear", revision="v1"))
    assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "et_local"
    try:
        snapshot_download("tester/era-linear", token=False, cache_dir="another")
    except RepositoryNotFoundError:
        return
    raise AssertionError("anybody can read a private repository")


def main() -> None:
    outcomes = {}
    for function in STAGES[sys.argv[1]]:
        try:
            outcomes[function.__name__] = {"value": function()}
        except Exception:
            outcomes[function.__name__] = {"failed": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
