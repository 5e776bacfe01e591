"""The tasks by transformers' Trainer and by TRL's: a tiny run learns and leaves a folder that opens."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import trainer_finetune
import yaml
from test_training_tasks import ROWS
from training_runs import write_rows, write_sentences
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import efficient_transformers  # noqa: F401 - registers the variants
from efficient_transformers.training.settings import Settings
from efficient_transformers.training.tasks.match import DocumentMatcher, MatchingHead
from efficient_transformers.training.tasks.pretrain_clm import load_open_tokenizer

ROOT = Path(__file__).resolve().parent.parent


SIZES = [
    "hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32", "window_size=5",
    "max_position_embeddings=64", "position_embedding_type=rotary", "initializer_range=0.1", "hidden_dropout_prob=0",
]  # fmt: skip


def arguments(task, data, out, *more):
    return [
        "--task", task, "--model_type", "et_local", "--config_overrides", *SIZES, "--tokenizer", "data/tokenizer",
        "--data", str(data), "--output_dir", str(out), "--use_cpu", "--report_to", "none", "--learning_rate", "0.02",
        "--per_device_train_batch_size", "4", "--num_train_epochs", "4", "--save_strategy", "no", "--disable_tqdm",
        "true", *more,
    ]  # fmt: skip


def train(task, data, out, *more):
    trainer_finetune.main(arguments(task, data, out, *more))
    return json.loads((out / "test_results.json").read_text())


def war_or_peace(folder):
    rows = [{"text": "we are at " + ("war " if i % 2 else "peace ") * (1 + i % 7), "label": i % 2} for i in range(60)]
    return write_rows(folder / "documents.jsonl", rows)


def test_a_classifier_is_trained(tmp_path):
    found = train("classify", war_or_peace(tmp_path), tmp_path / "out", "--max_length", "24")
    assert found["test_accuracy"] == found["test_macro_f1"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    logits = model.eval()(**tokenizer("we are at war war", return_tensors="pt")).logits
    assert model.config.id2label[logits.argmax().item()] == "1"
    assert (tmp_path / "out/modeling_local.py").exists()


# what the loss must fall below, which is 8.3 for a guess among all tokens and 2.8 among the words of the text
LANGUAGE = {"mlm": (AutoModelForMaskedLM, 2.1, 0.3), "clm": (AutoModelForCausalLM, 0.7, 0.8)}


@pytest.mark.parametrize("task", LANGUAGE)
def test_a_language_model_is_trained(tmp_path, task):
    auto_class, most, least = LANGUAGE[task]
    more = ["--max_length", "24", "--num_train_epochs", "16"]
    found = train(task, write_sentences(tmp_path), tmp_path / "out", *more)
    assert found["test_loss"] < most
    assert found["test_perplexity"] == pytest.approx(math.exp(found["test_loss"]))
    assert found["test_accuracy"] > least
    model = auto_class.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if task == "clm":
        written = model.generate(**tokenizer("and god save", return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True) == "and god save this land ."
    else:
        inputs = tokenizer("we are at war with [MASK] states .", return_tensors="pt")
        masked = inputs.input_ids == tokenizer.mask_token_id
        assert model(**inputs).logits[masked].isfinite().all()


TASKS = {
    "tags": ("case", AutoModelForTokenClassification, "test_f1", ["overlap=4"], "12"),
    "answers": ("facts", AutoModelForQuestionAnswering, "test_exact_match",
                ["stride=4", "max_question_length=6", "max_answer_length=3"], "20"),
    "choices": ("next", AutoModelForMultipleChoice, "test_accuracy", ["max_choice_length=16"], "32"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_other_tasks_are_trained(tmp_path, task):
    rows, auto_class, score, own, length = TASKS[task]
    data = write_rows(tmp_path / "a.jsonl", [ROWS[rows](i) for i in range(60)])
    found = train(task, data, tmp_path / "out", "--settings", *own, "--max_length", length, "--eval_strategy", "epoch")
    assert found[score] > 0.9
    auto_class.from_pretrained(tmp_path / "out")


def test_a_checkpoint_is_trained_on(tmp_path):
    data = write_sentences(tmp_path)
    first = train("mlm", data, tmp_path / "first", "--max_length", "24")
    more = arguments("mlm", data, tmp_path / "second", "--max_length", "24", "--max_steps", "1")
    at = more.index("--model_type")
    del more[at : more.index("--data")]
    rows = ["--settings", "packing=best_fit"]
    trainer_finetune.main([*more, *rows, "--checkpoint", str(tmp_path / "first"), "--learning_rate", "1e-6"])
    second = json.loads((tmp_path / "second/test_results.json").read_text())
    assert second["test_loss"] == pytest.approx(first["test_loss"], abs=0.5)  # masks are drawn anew


BAD = {
    "setting": (["--settings", "lable_column=x"], "There is no setting .*lable_column.*did you mean 'label_column'"),
    "of the Trainer": (["--settings", "learning_rate=1"], "There is no setting .*learning_rate"),
    "field": (["--config_overrides", "hiden_size=4"], "EtLocalConfig has no field 'hiden_size'"),
    "two models": (["--checkpoint", "x"], "model must name either model_type"),
    "length": (["--max_length", "0"], r"max_length \(0\) must be at least 1"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        trainer_finetune.main(arguments("classify", war_or_peace(tmp_path), tmp_path / "out", *more))


def test_whole_words_are_left_to_their_script(tmp_path):
    with pytest.raises(SystemExit, match=r"whole_word \(True\) is for training/pretrain_mlm.py"):
        train("mlm", write_sentences(tmp_path), tmp_path / "out", "--settings", "whole_word=true")


def test_trl_trains_a_decoder(tmp_path):
    """As docs/training.md shows it."""
    trl = pytest.importorskip("trl")
    import datasets

    chosen = Settings(data="", tokenizer="data/tokenizer", model={"model_type": "et_local"})
    tokenizer = load_open_tokenizer(chosen, ["we"])
    sizes = {name: yaml.safe_load(value) for name, value in (size.split("=") for size in SIZES)}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model("et_local", vocab_size=len(tokenizer), **sizes, **ids)
    model = AutoModelForCausalLM.from_config(config)
    rows = [{"prompt": "who is at war ?", "completion": " the states are"}] * 40
    trained = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), packing=True, max_length=32, max_steps=24, per_device_train_batch_size=4,
            learning_rate=0.02, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trained.get_train_dataloader()))
    together = trained.model.eval()(**batch).logits[0]
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
    assert len(starts) > 4
    alone = [trained.model(ids[None]).logits[0] for ids in batch["input_ids"][0].tensor_split(starts[1:])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert len(losses) == 24
    assert losses[-1] < 0.2 * losses[0]
    trained.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = AutoTokenizer.from_pretrained(tmp_path)("who is at war ?", return_tensors="pt")
    written = again.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(written) == " the states are"


def test_the_python_of_the_docs_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    sizes = {name: yaml.safe_load(value) for name, value in (size.split("=") for size in SIZES)}
    config = AutoConfig.for_model("et_local", **{**sizes, "vocab_size": 4096, "max_position_embeddings": 1024})
    DocumentMatcher(AutoModel.from_config(config), MatchingHead(32, 8)).save_pretrained("runs/president-local")
    AutoModelForCausalLM.from_config(config).save_pretrained("runs/clm-local")
    chosen = Settings(data="", tokenizer="data/tokenizer", model={"model_type": "et_local"})
    load_open_tokenizer(chosen, ["we"]).save_pretrained("runs/clm-local")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["matcher"].head.mlp.in_features == 4 * 32
    assert names["trainer"].state.global_step == 3
    AutoModelForCausalLM.from_pretrained("runs/sft")
