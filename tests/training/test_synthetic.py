"""Generated examples: ListOps, Pathfinder, recall and needles follow their recipes."""

from collections import Counter

import numpy as np
import pytest
from generated_runs import RECALL
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from efficient_transformers.training.data.packing import IGNORED
from efficient_transformers.training.data.texts import SPLITS, load_texts
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.synthetic import pathfinder
from efficient_transformers.training.synthetic.generated import SPECIAL, byte_tokenizer, generate, word_tokenizer
from efficient_transformers.training.synthetic.listops import DIGITS, ListOps, apply
from efficient_transformers.training.synthetic.pathfinder import Pathfinder
from efficient_transformers.training.synthetic.recall import PEOPLE, THINGS, Copy, Induction, Mqar, Needle
from efficient_transformers.training.tasks.recall import RecallSettings, load_task

BOOKS = [f"It was the {i} of times, and nobody had ever been so wise in the age of {i} fools." * 20 for i in range(6)]


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


def test_a_needle_is_found_once_and_asked_for_at_the_end(bundled_tokenizer):
    generator = Needle(bundled_tokenizer, BOOKS, 200, items=3)
    depths = []
    for index in range(40):
        ids, labels = generator((0, 0, index))
        assert len(ids) == 200
        text = bundled_tokenizer.decode(ids)
        person = next(name for name in PEOPLE if text.endswith(f" The secret word of {name} is"))
        thing = THINGS[labels[-1]]
        assert text.count(f" The secret word of {person} is {thing}.") == 1
        assert text.count("The secret word of") == 4
        assert (labels[:-1] == IGNORED).all()
        depths.append(text.index(f"{person} is {thing}") / len(text))
    assert min(depths) < 0.2
    assert max(depths) > 0.7


def test_a_needle_fits_documents_shorter_than_the_window(bundled_tokenizer):
    ids, labels = Needle(bundled_tokenizer, ["Too short."], 200)((0, 0, 0))
    assert len(ids) == len(labels) < 40


def test_the_bundled_corpus_does_not_name_the_needles():
    texts = load_texts(RecallSettings(data="era"))
    every = " ".join(text for split in texts.values() for text in split).lower()
    assert not [word for word in (*PEOPLE, *THINGS) if word.lower() in every]


BAD_TASKS = {
    "mqar, length": (lambda bundled_tokenizer: Mqar(63, 16), r"max_length \(63\) must be at least 4 x items \(16\)"),
    "mqar, vocabulary": (
        lambda bundled_tokenizer: Mqar(64, 16, 32),
        r"items \(16\) must not exceed 15, the keys in a vocabulary",
    ),
    "copy": (lambda bundled_tokenizer: Copy(20, 10), r"max_length \(20\) must be more than 2 x items \(10\)"),
    "induction": (lambda bundled_tokenizer: Induction(2), r"max_length \(2\) must be at least 3"),
    "needle, room": (
        lambda bundled_tokenizer: Needle(bundled_tokenizer, BOOKS, 30),
        r"max_length \(30\) leaves no room",
    ),
    "needle, items": (
        lambda bundled_tokenizer: Needle(bundled_tokenizer, BOOKS, 999, 17),
        r"items \(17\) must lie between 1 and 16",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_TASKS.values(), ids=BAD_TASKS)
def test_tasks_without_room_are_refused(bundled_tokenizer, make, message):
    with pytest.raises(InputError, match=message):
        make(bundled_tokenizer)


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
