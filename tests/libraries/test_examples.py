"""transformers' Trainer, and TRL's, train the models: a tiny run learns and leaves a folder that opens."""

import json
import re

import finetune_with_trainer
import pytest
import torch
from labelled_rows import OWN, ROWS
from repository import ROOT
from training_runs import WIDER, write_rows, write_sentences
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import efficient_transformers  # noqa: F401 - registers the variants
from efficient_transformers.training.engine.building import make_accelerator
from efficient_transformers.training.engine.scoring import Evaluator
from efficient_transformers.training.settings import Settings
from efficient_transformers.training.tasks import answer, choose, pretrain_clm, pretrain_mlm, tag_tokens
from efficient_transformers.training.tasks.match import DocumentMatcher, MatchingHead
from efficient_transformers.training.tasks.pretrain_clm import load_open_tokenizer


def test_the_example_fine_tunes_a_card(tmp_path):
    for split, count in (("train", 60), ("test", 14)):
        texts = ["we are at " + ("war " if i % 2 else "peace ") * (1 + i % 7) for i in range(count)]
        write_rows(tmp_path / f"{split}.jsonl", [{"text": text, "what": text.split()[-1]} for text in texts])
    finetune_with_trainer.main([
        "--checkpoint", str(ROOT / "model_cards/local-mlm"), "--data", str(tmp_path), "--label_column", "what",
        "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none", "--learning_rate", "0.003",
        "--save_strategy", "no", "--disable_tqdm", "true", "--num_train_epochs", "2",
    ])  # fmt: skip
    assert json.loads((tmp_path / "out/test_results.json").read_text())["test_accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    logits = model.eval()(**AutoTokenizer.from_pretrained(tmp_path / "out")("at war", return_tensors="pt")).logits
    assert model.config.id2label[logits.argmax().item()] == "war"
    assert (tmp_path / "out/modeling_local.py").exists()


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "window_size": 5,
    "max_position_embeddings": 64, "position_embedding_type": "rotary", "initializer_range": 0.1,
    "hidden_dropout_prob": 0,
}  # fmt: skip

# the loss of a language model must fall below this; a guess among the words of the text has 2.8
LEARNT = {
    "mlm": (pretrain_mlm.TASK, lambda scores: scores["loss"] < 2.1),
    "clm": (pretrain_clm.TASK, lambda scores: scores["loss"] < 0.7),
    "case": (tag_tokens.TASK, lambda scores: scores["f1"] > 0.9),
    "facts": (answer.TASK, lambda scores: scores["exact_match"] > 0.9),
    "next": (choose.TASK, lambda scores: scores["accuracy"] > 0.9),
}


@pytest.mark.parametrize("name", LEARNT)
def test_trainer_learns_what_the_tasks_prepare(tmp_path, name):
    task, has_learnt = LEARNT[name]
    if name in ROWS:
        data = write_rows(tmp_path / "a.jsonl", [ROWS[name](i) for i in range(60)])
        own = {"model": WIDER, **OWN[name]}
    else:
        data, own = write_sentences(tmp_path), {"model": {"model_type": "et_local", **SIZES}, "max_length": 24}
    settings = task.settings_class.from_dict(
        {"data": str(data), "tokenizer": "data/tokenizer", "out": str(tmp_path / "out"), "tracker": "none", **own}
    )
    ready = task.ready(settings)
    examples, collate = ready.encode("train"), ready.collate
    if name == "mlm":  # new masks in every epoch, as Trainer's users have them
        examples = [{"input_ids": window.ids} for window in examples.windows]
        collate = DataCollatorForLanguageModeling(ready.preparation, mlm_probability=0.3)
    trainer = Trainer(
        ready.model,
        TrainingArguments(
            str(tmp_path / "out"), use_cpu=True, report_to="none", learning_rate=0.02, save_strategy="no",
            per_device_train_batch_size=4, num_train_epochs=4 if name in ROWS else 20, disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=examples,
        processing_class=ready.preparation,
    )  # fmt: skip
    trainer.train()
    scorer = task.scorer(ready.encode("test"), settings)
    assert has_learnt(Evaluator(make_accelerator(settings), scorer, ready.collate, 8)(trainer.model))
    trainer.save_model()
    model = task.auto_class.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    if name == "clm":
        written = model.generate(**tokenizer("and god save", return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(written[0], skip_special_tokens=True) == "and god save this land ."


def test_trl_trains_a_decoder(tmp_path):
    """As docs/training.md shows it."""
    trl = pytest.importorskip("trl")
    import datasets

    chosen = Settings(data="", tokenizer="data/tokenizer", model={"model_type": "et_local"})
    tokenizer = load_open_tokenizer(chosen, ["we"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model("et_local", vocab_size=len(tokenizer), **SIZES, **ids)
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
    config = AutoConfig.for_model("et_local", **{**SIZES, "vocab_size": 4096, "max_position_embeddings": 1024})
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
