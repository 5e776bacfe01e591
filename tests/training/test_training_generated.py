"""Generated tasks: their recipes, the scripts that train on them, the configs, and many runs in a row."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from repository import ROOT
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from training_runs import (
    assert_same_run,
    composed,
    each_variant_of,
    read_metrics,
    reset_accelerate,
    stop_and_continue,
    write_config,
)
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from efficient_transformers import VARIANTS
from efficient_transformers.training.data.fashion_mnist import FOLDER, load_fashion_mnist
from efficient_transformers.training.data.packing import IGNORED
from efficient_transformers.training.data.texts import SPLITS, load_texts
from efficient_transformers.training.engine import outputs
from efficient_transformers.training.engine.building import build_config, build_model
from efficient_transformers.training.runs import running, train, train_all
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.synthetic import generated, pathfinder
from efficient_transformers.training.synthetic.generated import SPECIAL, byte_tokenizer, generate, word_tokenizer
from efficient_transformers.training.synthetic.listops import DIGITS, ListOps, apply
from efficient_transformers.training.synthetic.pathfinder import Pathfinder
from efficient_transformers.training.synthetic.recall import PEOPLE, THINGS, Copy, Induction, Mqar, Needle
from efficient_transformers.training.tasks import lra, recall
from efficient_transformers.training.tasks.lra import LraSettings, load_source
from efficient_transformers.training.tasks.recall import RecallSettings, load_task

GENERATED = (
    "listops", "listops_short", "pathfinder", "pathfinder_small", "image", "image_small", "text",
    "mqar", "copy", "induction", "needle",
)  # fmt: skip
BOOKS = [f"It was the {i} of times, and nobody had ever been so wise in the age of {i} fools." * 20 for i in range(6)]


@pytest.fixture(scope="module")
def bpe():
    return AutoTokenizer.from_pretrained(ROOT / "data/tokenizer")


def words_of(generator, ids):
    return [generator.words[i - len(SPECIAL)] for i in ids]


# --- ListOps


def evaluated(tokens):
    """The value of a list, from its text alone: nothing is shared with the generator."""
    operators = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda values: int(np.median(values)),
        "[SM": lambda values: sum(values) % 10,
    }
    stack: list[list] = [[]]
    for token in tokens:
        if token in operators:
            stack.append([operators[token]])
        elif token == "]":
            operator, *values = stack.pop()
            stack[-1].append(operator(values))
        else:
            stack[-1].append(int(token))
    ((value,),) = stack
    return value


def nested(tokens):
    """Depth of the tree, and the numbers of arguments of its operators."""
    depth, deepest, counts, done = 1, 1, [0], []
    for token in tokens:
        if token.startswith("["):
            counts[-1] += 1
            counts.append(0)
            depth += 1
            deepest = max(deepest, depth)
        elif token == "]":
            done.append(counts.pop())
            depth -= 1
        else:
            counts[-1] += 1
    return deepest, done


def test_lists_come_to_what_another_evaluator_says():
    for generator in (ListOps(), ListOps(20, 512), ListOps(0, 60)):
        for index in range(40):
            ids, label = generator((0, 0, index))
            assert ids[0] == SPECIAL.index("[CLS]")
            assert evaluated(words_of(generator, ids[1:])) == label


@pytest.mark.parametrize(("operator", "arguments", "value"), [
    ("[MIN", [3, 2, 9], 2), ("[MAX", [3, 2, 9], 9), ("[SM", [7, 8, 9], 4), ("[MED", [9, 1, 4], 4),
    ("[MED", [1, 2, 8, 9], 5), ("[MED", [4, 3], 3),
])  # fmt: skip
def test_operators_by_hand(operator, arguments, value):
    assert apply(operator, arguments) == value


def test_lists_follow_the_recipe():
    generator = ListOps()
    lists = [words_of(generator, generator((3, 0, index))[0][1:]) for index in range(150)]
    assert all(500 < len(tokens) < 2000 for tokens in lists)
    shapes = [nested(tokens) for tokens in lists]
    assert max(depth for depth, _ in shapes) == 10
    arguments = Counter(count for _, counts in shapes for count in counts)
    assert set(arguments) == set(range(2, 11))
    every = Counter(token for tokens in lists for token in tokens)
    assert set(every) == set(generator.words)
    assert max(every[operator] for operator in generator.words[:4]) < 1.1 * min(every[o] for o in generator.words[:4])
    assert max(every[digit] for digit in DIGITS) < 1.1 * min(every[digit] for digit in DIGITS)


def test_a_node_is_an_operator_with_probability_a_quarter():
    generator = ListOps(0, 10**6, max_depth=2)
    roots = [generator((0, 0, index))[0] for index in range(4000)]
    assert np.mean([len(ids) > 2 for ids in roots]) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("lengths", [(10, 11), (-1, 30), (500, 400)])
def test_lengths_that_no_list_can_have_are_refused(lengths):
    with pytest.raises(InputError, match=r"min_tokens \(.*must be less than max_tokens"):
        ListOps(*lengths)
    with pytest.raises(InputError, match="the tokens of the largest tree of depth 2 with 10 arguments"):
        ListOps(12, 99, max_depth=2)


# --- Pathfinder


@pytest.fixture(scope="module")
def pictures():
    return [Pathfinder(6).picture((0, 0, index)) for index in range(160)]


def test_no_shortcut_tells_connected_dots_apart(pictures):
    labels = [picture.label for picture in pictures]
    assert 0.4 < np.mean(labels) < 0.6
    shortcuts = {
        "distance of the dots": [np.hypot(*(picture.dots[0] - picture.dots[1])) for picture in pictures],
        "light": [picture.pixels.sum(dtype=int) for picture in pictures],
        "pixels": [np.count_nonzero(picture.pixels) for picture in pictures],
        "place of the second dot": [np.abs(picture.dots[1] - 15.5).max() for picture in pictures],
    }
    # of 160 pictures, chance alone gives an area under the curve of 0.5 ± 0.046; of 1,500 the distance gives 0.57
    areas = {name: roc_auc_score(labels, values) for name, values in shortcuts.items()}
    assert all(abs(area - 0.5) < 0.16 for area in areas.values()), areas


def test_dots_and_dashes_are_where_they_should_be(pictures):
    for picture in pictures[:50]:
        assert picture.pixels.shape == (32, 32)
        for row, column in picture.dots:
            assert picture.pixels[row, column] == 255
        assert 0.06 < (picture.pixels > 60).mean() < 0.3


def test_label_one_marks_both_ends_of_one_path(monkeypatch):
    drawn = []
    original = pathfinder.two_paths

    def two_paths(*arguments):
        found = original(*arguments)
        drawn.append(found)
        return found

    monkeypatch.setattr(pathfinder, "two_paths", two_paths)
    for index in range(30):
        picture = Pathfinder(9).picture((5, 0, index))
        _, paths = drawn[-1]
        assert all(len(path) == 9 for path in paths)
        ends = {(tuple(path[0][1]), tuple(path[-1][1])) for path in paths}
        assert ((tuple(picture.dots[0]), tuple(picture.dots[1])) in ends) == bool(picture.label)
        # a dash of two pixels and a gap of two to the next one
        for path in paths:
            steps = np.diff([at for _, at in path[1:]], axis=0)
            assert (np.abs(np.hypot(steps[:, 0], steps[:, 1]) - 4) < 2.1).all()


@pytest.mark.parametrize("length", [2, 17])
def test_paths_that_find_no_room_are_refused(length):
    with pytest.raises(InputError, match=rf"contour_length \({length}\) must lie between 3 and 16"):
        Pathfinder(length)


# --- recall


def test_mqar_asks_for_what_stood_behind_the_key():
    generator = Mqar(64, 8, 128)
    for index in range(50):
        ids, labels = generator((0, 1, index))
        words = words_of(generator, ids)
        shown = dict(zip(words[:16:2], words[1:16:2], strict=True))
        asked = np.flatnonzero(labels != IGNORED)
        assert len(shown) == len(asked) == 8
        assert sorted(words[place] for place in asked) == sorted(shown)
        for place in asked:
            assert generator.answers[labels[place]] == shown[words[place]]
        # values stand behind their keys alone: no answer can be read where it is asked for
        assert not any(word.startswith("v") for word in words[16:])
        assert Counter(words[16:])["_"] == 64 - 16 - 8


def test_short_sequences_are_for_training_alone():
    sizes = {"train_examples": 400, "validation_examples": 9, "test_examples": 9}
    settings = RecallSettings.from_dict(
        {**RECALL, **sizes, "data": "mqar", "items": 4, "vocabulary": 32, "min_length": 8}
    )
    source = load_task(settings)
    data = {name: source.encode(name, 40, None) for name in SPLITS}
    counts = Counter(data["train"].lengths)
    assert set(counts) == {8, 16, 32, 40}
    assert min(counts.values()) > 70
    assert {(len(data["train"][i]["input_ids"]), (data["train"][i]["labels"] != IGNORED).sum()) for i in range(99)} == {
        (8, 2), (16, 4), (32, 4), (40, 4)
    }  # fmt: skip
    assert set(data["validation"].lengths + data["test"].lengths) == {40}


def test_gaps_of_mqar_follow_the_power_law():
    generator = Mqar(64, 4, 512)
    places = Counter(np.flatnonzero(generator((0, 0, i))[1] != IGNORED).min() for i in range(800))
    assert places.most_common(1)[0][0] == 8
    assert generator.gaps[0] / generator.gaps[9] == pytest.approx(10**0.99)


def test_copy_asks_for_the_first_tokens_at_the_end():
    generator = Copy(40, 7, 12)
    ids, labels = generator((0, 0, 5))
    words = words_of(generator, ids)
    assert [generator.answers[label] for label in labels[-7:]] == words[:7]
    assert words[7:] == ["_"] * 25 + ["?"] + ["_"] * 7
    assert (labels[:-7] == IGNORED).all()


def test_induction_asks_for_what_stood_behind_the_mark():
    generator = Induction(30, 20)
    for index in range(100):
        ids, labels = generator((0, 0, index))
        words = words_of(generator, ids)
        first = words.index("?")
        assert Counter(words)["?"] == 2
        assert words[-1] == "?"
        assert generator.answers[labels[-1]] == words[first + 1]
        assert (labels[:-1] == IGNORED).all()


def test_a_needle_is_found_once_and_asked_for_at_the_end(bpe):
    generator = Needle(bpe, BOOKS, 200, items=3)
    depths = []
    for index in range(40):
        ids, labels = generator((0, 0, index))
        assert len(ids) == 200
        text = bpe.decode(ids)
        person = next(name for name in PEOPLE if text.endswith(f" The secret word of {name} is"))
        thing = THINGS[labels[-1]]
        assert text.count(f" The secret word of {person} is {thing}.") == 1
        assert text.count("The secret word of") == 4
        assert (labels[:-1] == IGNORED).all()
        depths.append(text.index(f"{person} is {thing}") / len(text))
    assert min(depths) < 0.2
    assert max(depths) > 0.7


def test_a_needle_fits_documents_shorter_than_the_window(bpe):
    ids, labels = Needle(bpe, ["Too short."], 200)((0, 0, 0))
    assert len(ids) == len(labels) < 40


def test_the_bundled_corpus_does_not_name_the_needles():
    texts = load_texts(RecallSettings(data="era"))
    every = " ".join(text for split in texts.values() for text in split).lower()
    assert not [word for word in (*PEOPLE, *THINGS) if word.lower() in every]


BAD_TASKS = {
    "mqar, length": (lambda bpe: Mqar(63, 16), r"max_length \(63\) must be at least 4 x items \(16\)"),
    "mqar, vocabulary": (lambda bpe: Mqar(64, 16, 32), r"items \(16\) must not exceed 15, the keys in a vocabulary"),
    "copy": (lambda bpe: Copy(20, 10), r"max_length \(20\) must be more than 2 x items \(10\)"),
    "induction": (lambda bpe: Induction(2), r"max_length \(2\) must be at least 3"),
    "needle, room": (lambda bpe: Needle(bpe, BOOKS, 30), r"max_length \(30\) leaves no room"),
    "needle, items": (lambda bpe: Needle(bpe, BOOKS, 999, 17), r"items \(17\) must lie between 1 and 16"),
}


@pytest.mark.parametrize(("make", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_tasks_without_room_are_refused(bpe, make, message):
    with pytest.raises(InputError, match=message):
        make(bpe)


# --- all generators


GENERATORS = {
    "listops": ListOps(20, 200),
    "pathfinder": Pathfinder(6),
    "mqar": Mqar(64, 4, 64),
    "copy": Copy(30, 5),
    "induction": Induction(20),
}


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_examples_follow_from_seed_split_and_index_alone(generator):
    def same(one, other):
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    first = generator((1, 2, 3))
    generator((0, 0, 0))
    assert same(generator((1, 2, 3)), first)
    assert not any(same(generator(seed), first) for seed in ((0, 2, 3), (1, 0, 3), (1, 2, 4)))
    # longer data begin as shorter ones do
    short, long = (generate(generator, "train", size, 7) for size in (2, 4))
    assert all(same(short[i].values(), long[i].values()) for i in range(2))


@pytest.mark.parametrize("name", ["listops", "mqar"])
def test_the_tokenizer_reads_a_text_as_the_generator_does(name, tmp_path):
    generator, has_cls = GENERATORS[name], name == "listops"
    tokenizer = word_tokenizer(generator.words, has_cls)
    ids = generator((0, 0, 0))[0]
    text = " ".join(words_of(generator, ids[1:] if has_cls else ids))
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one(text)["input_ids"] == ids.tolist()
        assert one.decode(ids, skip_special_tokens=True) == text


def test_bytes_are_read_one_by_one():
    text = "Größe  \n≈ 3"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert [i - len(SPECIAL) for i in ids[1:]] == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 260


def test_generated_examples_are_kept_and_read_again(tmp_path, monkeypatch):
    generator = ListOps(20, 200)
    made = generate(generator, "test", 5, 0, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(ListOps, "__call__", lambda self, seed: pytest.fail("generated again"))
    read = generate(generator, "test", 5, 0, str(tmp_path))
    assert read.labels == made.labels
    assert all(np.array_equal(a, b) for a, b in zip(read.ids, made.ids, strict=True))
    monkeypatch.undo()
    for other in ((ListOps(21, 200), 5, 0), (generator, 6, 0), (generator, 5, 1)):
        generate(other[0], "test", *other[1:], str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 4
    kept.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/deeper cannot be written \(Not a directory\): set cache to another"):
        generate(generator, "test", 1, 0, str(tmp_path / "file/deeper"))


# --- Fashion-MNIST


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


# --- the scripts

MODEL = {
    "model_type": "et_full",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.1,
}
SMALL = {
    "train_examples": 40,
    "validation_examples": 8,
    "test_examples": 12,
    "max_steps": 24,
    "batch_size": 4,
    "learning_rate": 0.02,
    "eval_steps": 8,
    "checkpoint_steps": 4,
    "keep_checkpoints_at_end": True,
    "tracker": "none",
}
RECALL = {
    **SMALL,
    "task": "recall",
    "max_length": 12,
    "items": 2,
    "vocabulary": 12,
    "model": {**MODEL, "max_position_embeddings": 16},
}
LRA = {
    **SMALL,
    "task": "lra",
    "min_tokens": 4,
    "max_tokens": 40,
    "max_length": 40,
    "sort_by_length": False,
    "model": {**MODEL, "max_position_embeddings": 64, "classifier_pooling": "cls"},
}


def recall_run(folder, *overrides, **values):
    config = write_config(folder, RECALL, values.pop("data", "mqar"), **values)
    return recall.run(RecallSettings.from_yaml(config, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train.main(["--config", str(write_config(folder, RECALL, "mqar"))])
    reset_accelerate()
    return folder / "out"


def test_a_run_leaves_what_a_table_needs(finished):
    found = read_metrics(finished)
    assert 0 <= found["test"]["accuracy"] <= 1
    assert found["test"]["n"] == 12
    training = found["training"]
    assert training["tokens"] == 24 * 4 * 12
    assert training["tokens_per_second"] > 0
    assert 50 < training["peak_memory_mb"] < 100_000
    assert found["model"]["parameters"] == sum(x.numel() for x in load_file(finished / "model.safetensors").values())
    model = AutoModelForTokenClassification.from_pretrained(finished)
    assert model.config.id2label == {i: f"v{i}" for i in range(6)}
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model(**tokenizer("k1 v2 k2 v0 k2 _ k1", return_tensors="pt")).logits.shape == (1, 7, 6)


def test_the_memory_of_a_process_is_in_mebibytes():
    accelerator = Accelerator(cpu=True)
    before = outputs.peak_memory_mb(accelerator)
    held = np.ones((before + 100) * 2**17)  # of 8 bytes each: more than the process has ever held
    after = outputs.peak_memory_mb(accelerator)
    del held
    assert before + 100 <= after <= 2 * before + 101
    # what was given back still counts; the system's own count lags by some pages
    assert abs(outputs.peak_memory_mb(accelerator) - after) < 50


def test_the_memory_of_a_gpu_is_asked_for_where_there_is_one(monkeypatch):
    class OnGpu:
        device = torch.device("cuda", 1)

    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 5 * 2**20)
    assert outputs.peak_memory_mb(OnGpu()) == 5
    assert asked == [torch.device("cuda", 1)]


def test_recall_is_evaluated_at_any_length(finished, capsys):
    found = read_metrics(finished)
    again = recall.evaluate_folder(finished, [])
    assert again == pytest.approx(found["test"], rel=1e-6)
    reset_accelerate()
    assert recall.evaluate_folder(finished, ["--max_length=16"])["n"] == 12
    assert '"max_length": 16' in capsys.readouterr().out
    reset_accelerate()
    with pytest.raises(InputError, match=r"The task has 5 answers, but the model in .* has 6, or different ones"):
        recall.evaluate_folder(finished, ["--vocabulary=10"])


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(monkeypatch, finished, tmp_path):
    stop_and_continue(monkeypatch, write_config(tmp_path, RECALL, "mqar"), 10)
    assert_same_run(tmp_path / "out", finished)


def test_accuracy_is_that_of_the_asked_positions(finished):
    settings = RecallSettings.from_yaml(finished / "settings.yaml")
    model = AutoModelForTokenClassification.from_pretrained(finished).eval()
    data = load_task(settings).encode("test", 12, model)
    right = []
    for example in data:
        logits = model(torch.tensor(example["input_ids"]).long()[None]).logits[0].argmax(-1).numpy()
        right += (logits == example["labels"])[example["labels"] != IGNORED].tolist()
    assert len(right) == 12 * 2
    assert read_metrics(finished)["test"]["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("fields", [{"is_decoder": True}, {"model_type": "et_linformer", "projected_length": 4}])
def test_a_table_of_one_key_is_learnt(tmp_path, fields):
    """Copying one of four symbols over three tokens, by a causal model and by one that is none."""
    found = recall_run(
        tmp_path, data="copy", items=1, vocabulary=6, max_length=5, train_examples=400, max_steps=150, eval_steps=50,
        model={**RECALL["model"], **fields, "hidden_dropout_prob": 0.0},
    )  # fmt: skip
    assert found["test"]["accuracy"] > 0.9


def test_a_needle_run_keeps_the_documents_of_the_splits_apart(bpe):
    settings = RecallSettings.from_dict({**RECALL, "data": "needle", "tokenizer": "data/tokenizer"})
    texts = load_texts(RecallSettings(data="era"))
    source = load_task(settings)
    for name in ("validation", "test"):
        examples = source.encode(name, 150, None)
        whole = " ".join(texts[name])
        other = " ".join(texts["train"])
        for example in list(examples)[:3]:
            parts = bpe.decode(example["input_ids"]).split(" The secret word of ")
            longest = max((parts[0], *(part.partition(".")[2] for part in parts[1:])), key=len)
            assert len(longest) > 50
            assert longest in whole
            assert longest not in other


BAD_RECALL = {
    "task": ({"data": "mqra"}, "data ('mqra') must be one of mqar, copy, induction, needle; did you mean 'mqar'?"),
    "items": ({"items": 0}, "items (0) must be at least 1."),
    "vocabulary": ({"vocabulary": 3}, "vocabulary (3) must be at least 4."),
    "tokenizer": ({"tokenizer": "x"}, "tokenizer ('x') has no effect: mqar generates its own words."),
    "metric": ({"best_metric": "f1"}, "best_metric ('f1') must be loss or accuracy."),
    "examples": ({"test_examples": 0}, "test_examples (0) must be at least 1."),
    "short": ({"min_length": 3}, "min_length (3) is too short for an item of mqar: increase it."),
    "short needles": (
        {"data": "needle", "min_length": 8},
        "min_length (8) has no effect: needle uses documents. Omit it.",
    ),
}


@pytest.mark.parametrize(("values", "message"), BAD_RECALL.values(), ids=BAD_RECALL)
def test_bad_recall_settings_are_refused(values, message):
    with pytest.raises(InputError) as error:
        RecallSettings.from_dict({"data": "mqar", "model": {"model_type": "bert"}, **values})
    assert message in str(error.value)


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
