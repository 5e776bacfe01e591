"""Configs of generated tasks, and train_all, which runs many of them."""

import pytest
import torch
from generated_runs import RECALL
from repository import ROOT
from training_runs import composed, each_variant_of, read_metrics, reset_accelerate, write_config
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from efficient_transformers import VARIANTS
from efficient_transformers.training.engine.building import build_config, build_model
from efficient_transformers.training.runs import running, train, train_all
from efficient_transformers.training.synthetic.generated import byte_tokenizer, word_tokenizer
from efficient_transformers.training.synthetic.listops import ListOps
from efficient_transformers.training.synthetic.pathfinder import Pathfinder
from efficient_transformers.training.tasks import lra
from efficient_transformers.training.tasks.recall import RecallSettings, load_task

GENERATED = (
    "listops", "listops_short", "pathfinder", "pathfinder_small", "image", "image_small", "text",
    "mqar", "copy", "induction", "needle",
)  # fmt: skip


# --- the configs


@each_variant_of(*GENERATED)
def test_every_config_trains_a_tiny_model(task, variant):
    _, settings = composed(task, variant)
    heads = settings.model.get("num_attention_heads", 2)
    settings.model |= {"hidden_size": 8 * heads, "num_hidden_layers": 1, "intermediate_size": 8}
    if isinstance(settings, RecallSettings):
        source = load_task(settings)
        tokenizer, answers = source.tokenizer, source.labels
        auto_class = AutoModelForTokenClassification
    else:
        tokenizer, answers = vocabulary_of(settings)
        auto_class = AutoModelForSequenceClassification
    config = build_config(settings, tokenizer, num_labels=len(answers))
    assert {key: getattr(config, key) for key in settings.model} == settings.model
    length = min(settings.max_length, 100)
    assert settings.max_length == config.max_position_embeddings
    model = build_model(settings, config, auto_class)
    ids = torch.randint(3, len(tokenizer), (2, length))
    labels = torch.zeros(ids.shape if isinstance(settings, RecallSettings) else 2, dtype=torch.long)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


def vocabulary_of(settings):
    """Tokenizer and classes, without making or reading examples."""
    if settings.data == "fashion_mnist":
        return word_tokenizer(lra.PIXELS, has_cls=True), lra.CLASSES
    generator = {"listops": ListOps(), "pathfinder": Pathfinder()}.get(settings.data)
    if generator is None:
        return byte_tokenizer(), ("neg", "pos")
    return word_tokenizer(generator.words, has_cls=True), generator.answers


# --- many runs


def in_this_process(command):
    reset_accelerate()
    try:
        train.main(command[2:])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def test_all_variants_are_trained_and_none_is_repeated(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(running, "launch", in_this_process)
    tiny = {**RECALL, "max_steps": 2, "eval_steps": 2, "checkpoint_steps": 2}
    sections = {"broken": {"model": {"model_type": "et_linear", "windw_size": 3}}, "wrong": {"epohcs": 3}}
    config = write_config(tmp_path, tiny, "mqar", out=None, variants=sections)
    command = ["--config", str(config), "--variants", "broken", "full", "linear", "wrong", "fulll"]
    with pytest.raises(SystemExit) as ended:
        train_all.main([*command, "--seeds", "0", "1", "--out", str(tmp_path / "runs"), "--learning_rate", "0.01"])
    for text in ("these runs failed", "broken: The run in", "There is no setting 'epohcs'", "no variant 'fulll'"):
        assert text in str(ended.value.code)
    trained = {path.parent.name for path in (tmp_path / "runs").glob("*/metrics.json")}
    assert trained == {"tiny-full", "tiny-linear", "tiny-full-seed-1", "tiny-linear-seed-1"}
    assert read_metrics(tmp_path / "runs/tiny-linear-seed-1")["settings"]["seed"] == 1
    assert read_metrics(tmp_path / "runs/tiny-full")["settings"]["learning_rate"] == 0.01
    assert "tiny.yaml, linear, seed 1: loss" in capsys.readouterr().out

    monkeypatch.setattr(running, "launch", lambda command: pytest.fail("trained again"))
    command = ["--config", str(config), "--variants", "full"]
    train_all.main([*command, "--out", str(tmp_path / "runs"), "--learning_rate=0.01"])
    monkeypatch.setattr(running, "launch", lambda command: 143)
    with pytest.raises(SystemExit, match="ended with exit code 143; the same command resumes it"):
        train_all.main([*command, "--out", str(tmp_path / "other")])


def test_all_variants_of_a_task_are_those_that_can_do_it():
    assert train_all.variants_of(ROOT / "configs/mqar.yaml") == list(VARIANTS)
    causal = [name for name, variant in VARIANTS.items() if variant.causal]
    assert train_all.variants_of(ROOT / "configs/clm.yaml") == causal
