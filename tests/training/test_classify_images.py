"""Training on images: reading them, a run from end to end, refusals, and the configs."""

import gzip
import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training_runs import composed, each_variant_of, reset_accelerate
from transformers import AutoModelForImageClassification, pipeline

from efficient_transformers.training.data.images import load_pictures
from efficient_transformers.training.engine.building import build_config
from efficient_transformers.training.runs import evaluate, train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import classify_images
from efficient_transformers.training.tasks.classify_images import ClassifyImagesSettings

COLOURS = {"blue": (30, 40, 220), "red": (220, 50, 30), "yellow": (220, 210, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of noisy colours, a folder of each; 30 for training and 6 for the test."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 6)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = draw.integers(-30, 30, (9, 11, 3)) + np.array(colour)
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def write_config(tmp_path, data, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = {"model_type": "et_local", "image_size": 8, "patch_size": 4, "initializer_range": 0.3, **sizes}
    values = {"task": "classify_images", "data": str(data), "model": model, "epochs": 6, "batch_size": 8}
    values |= {"learning_rate": 3e-3, "held_out": 0.2}
    values |= {"out": str(tmp_path / "out"), "tracker": "none", **changes}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "tiny.yaml"


def settings_of(tmp_path, data, **changes):
    return ClassifyImagesSettings.from_yaml(write_config(tmp_path, data, **changes))


def test_colours_are_learnt_and_saved_ready_for_the_hub(folder, tmp_path):
    with redirect_stdout(io.StringIO()) as printed:
        train.main(["--config", str(write_config(tmp_path, folder))])
    assert "accuracy 1.0000, macro_f1 1.0000 (n = 18)" in printed.getvalue()
    out = tmp_path / "out"
    classify = pipeline("image-classification", str(out), device="cpu")
    for name in COLOURS:
        assert classify(str(folder / "test" / name / "3.png"))[0]["label"] == name
    card = (out / "README.md").read_text()
    for text in ("pipeline_tag: image-classification", "blue, red, yellow", "72 images as sequences of 4 patches"):
        assert text in card
    assert "long-documents" not in card
    code = card.partition("```python\n")[2].partition("\n```")[0].replace('"out"', f'"{out}"')
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "card", "exec"), {})
    assert printed.getvalue().strip() in COLOURS
    reset_accelerate()
    with redirect_stdout(io.StringIO()) as printed:
        evaluate.main([str(out)])
    assert '"accuracy": 1.0' in printed.getvalue()


def test_splits_are_cut_in_proportion_and_by_their_seed(folder, tmp_path):
    splits, names = load_pictures(settings_of(tmp_path, folder))
    assert names == sorted(COLOURS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 72, "validation": 18, "test": 18}
    assert [splits["validation"].labels.count(i) for i in range(3)] == [6, 6, 6]
    again, _ = load_pictures(settings_of(tmp_path, folder))
    other, _ = load_pictures(settings_of(tmp_path, folder, split_seed=1))
    pixels = [[np.array(image).tobytes() for image in s["validation"].images] for s in (splits, again, other)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_fashion_mnist_is_read_with_a_channel(tmp_path):
    for stem, count in (("train", 400), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28)).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    splits, names = load_pictures(settings_of(tmp_path, "fashion_mnist", image_folder=str(tmp_path)))
    assert names[9] == "Ankle boot"
    assert {name: len(split) for name, split in splits.items()} == {"train": 320, "validation": 80, "test": 20}
    assert splits["test"].labels == [i % 10 for i in range(20)]
    assert splits["test"].images[3].shape == (28, 28, 1)
    assert np.array_equal(splits["test"].images[3][..., 0], pixels[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": "fashion_mnist", "image_folder": "nowhere"},
            "nowhere/.* does not exist: install the Debian package dataset",
        ),
        ({"label_column": "colour"}, "has no column 'colour'; there are: image, label. Set label_column"),
        ({"held_out": 0.7}, r"held_out \(0.7\) must be more than 0 and less than 0.5"),
        ({"held_out": 0.02}, "90 images of 3 classes are too few to cut a validation split from"),
        (
            {"image_processor": {"image_std": 0.5, "size": 3}},
            "image_processor has the field 'size', but only",
        ),
        ({"best_metric": "f2"}, r"best_metric \('f2'\) must be one of loss, accuracy, macro_f1"),
        ({"model": {"model_type": "et_local"}}, r"image_size \(None\) must be set"),
        (
            {"model": {"model_type": "bert"}},
            "A bert model cannot be trained on images",
        ),
    ],
)
def test_bad_runs_are_refused_before_training(changes, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        classify_images.run(ClassifyImagesSettings.from_yaml(write_config(tmp_path, **{"data": folder, **changes})))
    assert not list((tmp_path / "out").glob("*.yaml"))


@each_variant_of("pixels", "patches")
def test_every_config_builds_a_tiny_model(task, variant):
    _, settings = composed(task, variant)
    fields = {**settings.model, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    settings.model = fields
    config = build_config(settings, None, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    logits = AutoModelForImageClassification.from_config(config)(torch.randn(2, 1, 28, 28)).logits
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert {key: getattr(config, key) for key in fields} == fields
