"""Models too large for the machine are refused before anything is allocated."""

import psutil
import pytest
import torch
from training_runs import MODEL, TINY, TINY_LANGUAGE, write_config, write_labelled, write_sentences

from efficient_transformers import VARIANTS, cli
from efficient_transformers.memory import (
    FLOAT,
    Estimate,
    TooLargeError,
    activations_of,
    memory_of,
    parameters_by_sizes,
    parameters_of,
    size,
)
from efficient_transformers.training.runs import train

BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize("slug", VARIANTS)
def test_parameters_are_those_of_the_model(slug):
    config = VARIANTS[slug].config_class(max_position_embeddings=128, num_hidden_layers=3)
    with torch.device("meta"):
        model = VARIANTS[slug].model_class()(config)
    assert parameters_of(config) == sum(p.numel() for p in model.parameters())


def test_many_layers_are_extrapolated():
    config = VARIANTS["local"].config_class(num_hidden_layers=2)
    deep = VARIANTS["local"].config_class(num_hidden_layers=2000)
    layer = parameters_of(config) - parameters_of(VARIANTS["local"].config_class(num_hidden_layers=1))
    assert parameters_of(deep) == parameters_of(config) + 1998 * layer


def test_sizes_alone_are_near_the_truth():
    config = VARIANTS["full"].config_class(**BERT)
    assert parameters_by_sizes(config) == pytest.approx(parameters_of(config), rel=0.05)


def saved_for_backward(model, length):
    """Bytes of the tensors that autograd keeps of a forward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(torch.ones(2, length, dtype=torch.long))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(count for pointer, count in kept.items() if pointer not in weights)


@pytest.mark.parametrize("slug", ["full", "local", "linear", "fnet"])
def test_activations_are_estimated_within_a_factor_of_three(slug):
    config = VARIANTS[slug].config_class(vocab_size=99, hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    found = saved_for_backward(VARIANTS[slug].model_class()(config), 512)
    assert 1 / 3 < activations_of(config, 2, 512, training=True) / found < 3


def test_an_estimate_says_what_takes_how_much():
    everything = memory_of()
    assert everything == psutil.virtual_memory().total
    Estimate(weights=everything / 2, activations=everything / 3).check()
    with pytest.raises(TooLargeError, match=r"about 2e\+03 PB|about 2,000 PB|about 2 EB|PB of memory \(weights"):
        Estimate(weights=2e18).check()
    assert size(1.85e9) == "1.85 GB"
    assert size(999) == "999 B"
    assert torch.float32.itemsize == FLOAT


TOO_LARGE = {
    "layers": ["--model.num_hidden_layers=1000000000"],
    "width": ["--model.hidden_size=2000000", "--model.intermediate_size=2000000"],
    "words": ["--model.vocab_size=200000000000"],
    "workers": ["--dataloader_num_workers=1000000"],
    "iterations": ["--model.model_type=et_sinkhorn", "--model.sinkhorn_iterations=10000000000"],
    "features": ["--model.model_type=et_performer", "--model.num_random_features=10000000000"],
}


@pytest.mark.parametrize("options", TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("task", ["classify", "pretrain_clm"])
def test_runs_that_are_too_large_are_refused_at_once(tmp_path, capsys, task, options):
    own = {name: value for name, value in MODEL.items() if name not in ("window_size", "model_type")}
    is_local = not any("model_type" in option for option in options)
    model = own | ({"window_size": 5, "model_type": "et_local"} if is_local else {"model_type": "et_full"})
    tiny, corpus = (
        (TINY, write_labelled(tmp_path)) if task == "classify" else (TINY_LANGUAGE, write_sentences(tmp_path))
    )
    config = write_config(tmp_path, tiny | {"task": task, "model": model}, corpus)
    with pytest.raises(SystemExit):
        train.main(["--config", str(config), "--out", str(tmp_path / "out"), *options])
    said = capsys.readouterr().err
    assert "ignore_memory" in said, said
    assert not (tmp_path / "out").exists()


def test_an_estimate_can_be_overridden(tmp_path, monkeypatch):
    config = write_config(tmp_path, TINY, write_labelled(tmp_path), max_steps=1, eval_steps=1, gradient_accumulation=1)
    monkeypatch.setattr("efficient_transformers.memory.memory_of", lambda device=None: 1000)
    with pytest.raises(SystemExit):
        train.main(["--config", str(config)])
    train.main(["--config", str(config), "--ignore_memory"])
    assert (tmp_path / "out/metrics.json").exists()


COMMANDS = {
    "describe": ["describe", "local", "num_hidden_layers=1000000000"],
    "plot": ["plot", "pattern", "local", "hidden_size=20000000"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_what_is_too_large(capsys, command):
    assert cli.main(command) == 2
    assert "must be at most" in (said := capsys.readouterr().err) or "of memory" in said
