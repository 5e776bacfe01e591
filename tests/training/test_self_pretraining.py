"""Self-pretraining of classifiers: what is learnt is what training starts from, whatever interrupts it."""

import io
from contextlib import redirect_stdout

import pytest
import torch
import training_runs
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_runs import PowerCut, assert_same_run, bpe, read_metrics, reset_accelerate, run, write_config

from efficient_transformers.training.data.packing import IGNORED
from efficient_transformers.training.engine import loop
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import self_pretraining
from efficient_transformers.training.tasks.classify import ClassifySettings
from efficient_transformers.training.tasks.self_pretraining import NextTokens, denoising, inputs_of

TINY = {
    **training_runs.TINY,
    "epochs": 2,
    "self_pretrain_steps": 12,
    "self_pretrain_learning_rate": 0.01,
}  # 12 steps of each


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("finished")
    with redirect_stdout(io.StringIO()) as printed:
        run(write_config(folder, TINY, corpus))
    reset_accelerate()
    return folder / "out", printed.getvalue()


def body_of(folder):
    return load_file(folder / "checkpoints/self-pretraining/body.safetensors")


def test_both_trainings_are_reported(finished):
    folder, printed = finished
    found = read_metrics(folder)
    record = found["self_pretraining"]
    assert (record["objective"], record["mask_share"], record["learning_rate"]) == ("masked", 0.15, 0.01)
    assert (record["steps"], found["training"]["steps"]) == (12, 12)
    losses = [entry["loss"] for entry in record["history"]]
    assert record["validation"]["loss"] == min(losses) < losses[0]
    assert record["tokens"] == found["training"]["tokens"]  # the same inputs, as often
    assert "Self-pretraining: masked denoising of the training inputs." in printed
    card = ModelCard.load(folder / "README.md").text
    assert "| self-pretraining | masked denoising of 15 % of the tokens of the training inputs, 12 steps" in card


def test_training_starts_from_the_body_that_was_learnt(config, tmp_path):
    # no weight moves by more than its rounding
    run(config, "--learning_rate=1e-12")
    body, saved = body_of(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    for name, value in body.items():
        torch.testing.assert_close(saved[f"model.{name}"], value, rtol=0, atol=1e-9)
    reset_accelerate()
    run(config, "--learning_rate=1e-12", "--self_pretrain_steps=null", "--overwrite=true")
    untaught = load_file(tmp_path / "out/model.safetensors")
    moved = {name for name in body if (untaught[f"model.{name}"] - body[name]).abs().max() > 1e-3}
    assert {"embeddings.word_embeddings.weight"} < moved
    assert not (tmp_path / "out/checkpoints/self-pretraining").exists()
    assert "self_pretraining" not in read_metrics(tmp_path / "out")


def test_head_learning_rate_is_of_what_was_not_learnt(monkeypatch, config):
    rates, original = {}, loop.make_optimizer

    def make_optimizer(model, settings):
        optimizer = original(model, settings)
        of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        rates.update({name: of[id(parameter)] for name, parameter in model.named_parameters()})
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make_optimizer)
    run(config, "--head_learning_rate=0.5", "--self_pretrain_steps=2", "--max_steps=2")
    assert {name for name, rate in rates.items() if rate == 0.5} >= {"classifier.weight", "classifier.bias"}
    assert not any("layers" in name or "embeddings" in name for name, rate in rates.items() if rate == 0.5)


@pytest.mark.parametrize("when", [8, 20], ids=["denoising", "classifying"])
def test_a_killed_run_ends_as_one_never_stopped(monkeypatch, finished, config, tmp_path, when):
    """Steps 1 to 12 denoise, 13 to 24 classify."""
    original, steps = loop.record_step, []

    def cut(*arguments):
        steps.append(1)
        if len(steps) == when:
            raise PowerCut
        return original(*arguments)

    monkeypatch.setattr(loop, "record_step", cut)
    with pytest.raises(PowerCut):
        run(config)
    inner = tmp_path / "out/checkpoints/self-pretraining"
    folder = inner / "checkpoints" if when < 12 else tmp_path / "out/checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000000003", "step-000000006"]
    assert (inner / "record.json").exists() == (when > 12)
    monkeypatch.undo()
    reset_accelerate()
    torch.manual_seed(1)
    if when > 12:
        monkeypatch.setattr(self_pretraining, "learn", lambda *arguments: pytest.fail("learnt again"))
    run(config, "--resume=true")
    assert_same_run(tmp_path / "out", finished[0], "step-000000012")
    assert (
        read_metrics(tmp_path / "out")["self_pretraining"]["history"]
        == (read_metrics(finished[0])["self_pretraining"]["history"])
    )


def test_a_decoder_predicts_the_next_token(config):
    found = run(config, "--model.is_decoder=true", "--self_pretrain_steps=null", "--self_pretrain_epochs=1")
    assert found["self_pretraining"]["objective"] == "causal"
    assert found["self_pretraining"]["steps"] == 6
    assert "mask_share" not in found["self_pretraining"]


def test_special_tokens_are_not_denoised():
    tokenizer = bpe()
    split = [{"input_ids": tokenizer("we are at war")["input_ids"]}, {"input_ids": tokenizer("")["input_ids"]}]
    (window,) = inputs_of(split, tokenizer)
    ids = window.ids.tolist()
    assert ids == split[0]["input_ids"]
    settings = ClassifySettings.from_dict({"data": "era", **TINY, "self_pretrain_mask_share": 0.99})
    for epoch in range(5):
        data = denoising("train", [window], tokenizer, settings, causal=False)
        data.set_epoch(epoch)
        labels = data[0]["labels"]
        assert [labels[0], labels[-1]] == [IGNORED, IGNORED]
        assert labels[1:-1].tolist() == ids[1:-1]
    assert NextTokens([window])[0]["labels"].tolist() == [IGNORED, *ids[1:]]


BAD = {
    "share": ("--self_pretrain_mask_share=1", r"self_pretrain_mask_share \(1.0\) must be more than 0 and less than 1"),
    "epochs": ("--self_pretrain_epochs=0", r"self_pretrain_epochs \(0\) must be at least 1: omit it"),
    "rate": ("--self_pretrain_learning_rate=0", r"self_pretrain_learning_rate \(0.0\) must be more than 0"),
}


@pytest.mark.parametrize(("override", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(config, override, message):
    with pytest.raises(InputError, match=message):
        ClassifySettings.from_yaml(config, [override])


def test_a_tokenizer_without_a_mask_is_refused(config, tmp_path):
    tokenizer = bpe()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="needs a mask token, but the tokenizer has none"):
        run(config, f"--tokenizer={tmp_path / 'tokenizer'}")
