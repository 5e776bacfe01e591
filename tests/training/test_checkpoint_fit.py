"""Checkpoints that do not fit the model: an error that lists the tensors, never silently random weights."""

import pytest
from safetensors.torch import load_file, save_file
from training_runs import MODEL, bpe
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from efficient_transformers.training.engine.building import build_config, build_model
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import classify
from efficient_transformers.training.tasks.classify import ClassifySettings

LABELS = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier of two classes and a masked language model, saved."""
    root = tmp_path_factory.mktemp("checkpoints")
    settings = ClassifySettings.from_dict({"data": "era", "tokenizer": "data/tokenizer", "model": MODEL})
    config = build_config(settings, bpe(), **LABELS)
    for name, auto_class in (("classify", AutoModelForSequenceClassification), ("mlm", AutoModelForMaskedLM)):
        build_model(settings, config, auto_class).save_pretrained(root / name)
        bpe().save_pretrained(root / name)
    return root


def loaded(folder, complete=False, reinitialize=False, labels=LABELS, **fields):
    values = {"data": "era", "model": {"checkpoint": str(folder), **fields}, "reinitialize": reinitialize}
    settings = ClassifySettings.from_dict(values)
    config = build_config(settings, bpe(), **labels)
    return build_model(settings, config, AutoModelForSequenceClassification, complete=complete)


def changed(saved, tmp_path, change):
    """A copy of the classifier whose tensors `change` has changed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (saved / "classify").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def body_tensor(tensors):
    return next(name for name in sorted(tensors) if name.startswith("model.") and "norm" not in name.lower())


def test_a_head_that_the_checkpoint_lacks_is_new_and_said(saved, capsys):
    model = loaded(saved / "mlm")
    assert "New weights" in (printed := capsys.readouterr().out)
    assert "classifier.weight" in printed
    new = {name for name, parameter in model.named_parameters() if parameter.newly_initialized}
    assert new >= {"classifier.weight", "classifier.bias"}
    loaded(saved / "classify")
    assert not capsys.readouterr().out


def test_a_tensor_that_is_missing_is_an_error_unless_it_is_allowed(saved, tmp_path, capsys):
    folder = changed(saved, tmp_path, lambda tensors: tensors.pop(body_tensor(tensors)))
    name = body_tensor(load_file(saved / "classify" / "model.safetensors"))
    with pytest.raises(InputError, match=rf"does not fit the model \(missing: {name}\).*reinitialize"):
        loaded(folder)
    loaded(folder, reinitialize=True)
    assert name in capsys.readouterr().out


def test_tensors_of_another_shape_are_listed_with_both_shapes(saved):
    with pytest.raises(InputError, match=r"of another shape: .*\(16, 16\) instead of \(24, 16\)"):
        loaded(saved / "classify", intermediate_size=24)


def test_layers_that_would_be_left_out_are_listed(saved, tmp_path):
    def add(tensors):
        name = body_tensor(tensors)
        tensors["model.blocks.7." + name.rpartition(".")[2]] = tensors[name].clone()

    with pytest.raises(InputError, match=r"not used: model\.blocks\.7"):
        loaded(changed(saved, tmp_path, add))


def test_a_trained_model_is_not_evaluated_with_a_random_head(saved, tmp_path):
    for folder in (saved / "mlm", changed(saved, tmp_path, lambda tensors: tensors.pop("classifier.weight"))):
        with pytest.raises(InputError, match=r"lacks weights of the trained model \(missing: .*classifier\.weight"):
            loaded(folder, complete=True)
    other = {"id2label": dict(enumerate("abc")), "label2id": {name: i for i, name in enumerate("abc")}}
    with pytest.raises(InputError, match=r"of another shape: .*classifier"):
        loaded(saved / "classify", complete=True, labels=other)
    assert loaded(saved / "classify", labels=other).config.num_labels == 3


def test_evaluation_asks_for_all_weights(monkeypatch, saved, tmp_path):
    asked = []
    monkeypatch.setattr(classify.TASK, "build_model", lambda *a, complete: asked.append(complete))
    monkeypatch.setattr(classify.TASK, "load", lambda settings: classify.Source(bpe(), [], lambda *a: []))
    settings = ClassifySettings.from_dict({"data": "era", "model": {"checkpoint": str(saved / "classify")}})
    classify.TASK.ready(settings)
    classify.TASK.ready(settings, saved / "classify")
    assert asked == [False, True]
