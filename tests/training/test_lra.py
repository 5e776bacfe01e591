"""Long Range Arena: reading images and bytes, runs and refusals."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from generated_runs import LRA
from training_runs import read_metrics, reset_accelerate, write_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from efficient_transformers.training.data.fashion_mnist import FOLDER, load_fashion_mnist
from efficient_transformers.training.data.texts import SPLITS
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.synthetic import generated
from efficient_transformers.training.synthetic.generated import SPECIAL
from efficient_transformers.training.synthetic.pathfinder import Pathfinder
from efficient_transformers.training.tasks import lra
from efficient_transformers.training.tasks.lra import LraSettings, load_source


@pytest.fixture
def garments(tmp_path):
    """A folder of 20 training and 4 test images; the pixels of an image are its number."""
    for split, count in (("train", 20), ("t10k", 4)):
        images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28)
        for name, sizes, values in (
            ("images-idx3", (count, 28, 28), images),
            ("labels-idx1", (count,), np.arange(count, dtype=np.uint8) % 10),
        ):
            head = bytes([0, 0, 8, len(sizes)]) + np.array(sizes, ">i4").tobytes()
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return tmp_path


def test_images_are_read_and_a_tenth_validates(garments):
    data = load_fashion_mnist(str(garments))
    assert {name: images.shape for name, (images, _) in data.items()} == {
        "train": (18, 28, 28), "validation": (2, 28, 28), "test": (4, 28, 28)
    }  # fmt: skip
    assert data["validation"][0][:, 5, 5].tolist() == [18, 19]
    assert data["validation"][1].tolist() == [8, 9]


def test_a_missing_package_is_named(tmp_path, garments):
    with pytest.raises(InputError, match=r"install the Debian package dataset-fashion-mnist .*or set image_folder"):
        load_fashion_mnist(str(tmp_path / "nowhere"))
    (garments / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte.gz cannot be read"):
        load_fashion_mnist(str(garments))
    (garments / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1])))
    with pytest.raises(InputError, match="is not an array of bytes in IDX format"):
        load_fashion_mnist(str(garments))


@pytest.mark.skipif(not Path(FOLDER).exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_package_holds_what_is_expected():
    data = load_fashion_mnist(FOLDER)
    assert [len(labels) for _, labels in data.values()] == [54_000, 6_000, 10_000]
    assert np.bincount(data["test"][1]).tolist() == [1000] * 10
    assert data["train"][0].mean() == pytest.approx(72.9, abs=0.5)


BAD_LRA = {
    "tokenizer": ({"tokenizer": "x"}, "tokenizer ('x') has no effect: the tokens of these tasks are words"),
    "examples": ({"train_examples": 0}, "train_examples (0) must be at least 1."),
    "documents": (
        {"data": "era", "test_examples": 5},
        "test_examples (5) has no effect: all documents of era are used.",
    ),
    "metric": ({"best_metric": "f2"}, "best_metric ('f2') must be one of loss, accuracy, macro_f1."),
}


@pytest.mark.parametrize(("values", "message"), BAD_LRA.values(), ids=BAD_LRA)
def test_bad_lra_settings_are_refused(values, message):
    with pytest.raises(InputError) as error:
        LraSettings.from_dict({"data": "listops", "model": {"model_type": "bert"}, **values})
    assert message in str(error.value)


def test_listops_from_start_to_card(tmp_path, capsys):
    cache = tmp_path / "cache"
    train.main(["--config", str(write_config(tmp_path, LRA, "listops", cache=str(cache)))])
    assert len(list(cache.iterdir())) == 3
    folder = tmp_path / "out"
    found = read_metrics(folder)
    assert (found["test"]["n"], found["training"]["windows"], found["model"]["max_length"]) == (12, 40, 40)
    assert "macro_f1" in found["test"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    assert AutoTokenizer.from_pretrained(folder)("[MAX 1 2 ]")["input_ids"][0] == SPECIAL.index("[CLS]")
    assert "the digit that a nested list" in (folder / "README.md").read_text()
    reset_accelerate()
    assert lra.evaluate_folder(folder, []) == pytest.approx(found["test"], rel=1e-6)
    reset_accelerate()
    assert lra.evaluate_folder(folder, ["--max_length=3"])["n"] == 12


def test_documents_are_read_as_bytes(tmp_path):
    rows = [{"text": ("good " if i % 2 else "bad ") * 3, "label": "pos" if i % 2 else "neg"} for i in range(40)]
    corpus = tmp_path / "reviews.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {f"{name}_examples": None for name in SPLITS}
    found = lra.run(LraSettings.from_yaml(write_config(tmp_path, {**LRA, **sizes}, corpus)))
    assert found["test"]["accuracy"] == 1.0


def test_pixels_are_read_in_a_row(garments):
    settings = LraSettings.from_dict(
        {"data": "fashion_mnist", "image_folder": str(garments), "train_examples": 7, "model": {"model_type": "bert"}}
    )
    source = load_source(settings)
    data = {name: source.encode(name, 785, None) for name in SPLITS}
    assert [len(data[name]) for name in SPLITS] == [7, 2, 4]
    example = data["train"][6]
    assert source.tokenizer.decode(example["input_ids"]) == " ".join(["[CLS]", *["6"] * 784])
    assert source.labels[example["labels"]] == "Shirt"
    assert len(source.encode("test", 100, None)[0]["input_ids"]) == 100


def test_pathfinder_is_generated_in_the_paper_s_numbers(monkeypatch):
    asked = {}

    def generate(generator, split, size, seed, cache):
        asked[split] = (generator, size)
        return generated.Examples([], [])

    monkeypatch.setattr(lra, "generate", generate)
    source = load_source(LraSettings.from_dict({"data": "pathfinder", "model": {"model_type": "bert"}}))
    sizes = {"train": 160_000, "validation": 20_000, "test": 20_000}
    for name in sizes:
        source.encode(name, 1025, None)
    assert asked == {name: (Pathfinder(14), size) for name, size in sizes.items()}
