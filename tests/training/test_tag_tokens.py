"""Tagging tokens: sentences, windows, tags and entity scores."""

from itertools import pairwise

import datasets
import numpy as np
import pytest
from labelled_rows import task_settings
from language_runs import TOKENIZERS
from training_runs import bpe, write_rows
from transformers import AutoConfig, AutoModel

from efficient_transformers.training.data.excerpts import excerpts, sentences
from efficient_transformers.training.data.packing import IGNORED, overlapping_slices, shortened
from efficient_transformers.training.engine.metrics import EntityF1
from efficient_transformers.training.engine.task import label_fields
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks.tag_tokens import TagSettings, case_tags, load_tagged, tag_names, tag_windows


def test_sentences_end_where_they_end():
    text = 'Mr. Adams spoke to the U. S. Senate. "Is it so?"  He (Gen. Grant) said:\tno. It was'
    assert sentences(text) == [
        "Mr. Adams spoke to the U. S. Senate.",
        '"Is it so?"',
        "He (Gen. Grant) said: no.",
        "It was",
    ]


def test_excerpts_are_whole_sentences():
    assert excerpts("One two. Three four five. Six. Seven", 3) == ["One two. Three four five."]
    assert excerpts("One two. Three four five. Six. Seven", 1) == ["One two.", "Three four five.", "Six.", "Seven"]


@pytest.mark.parametrize(
    ("length", "room", "overlap"), [(0, 5, 2), (1, 5, 2), (5, 5, 2), (6, 5, 2), (50, 7, 3), (50, 7, 0)]
)
def test_overlapping_windows_own_every_token_once(length, room, overlap):
    windows = list(overlapping_slices(length, room, overlap))
    assert [i for _, own in windows for i in range(own.start, own.stop)] == list(range(length))
    for part, own in windows:
        assert part.start <= own.start <= own.stop <= part.stop <= part.start + room
    for (before, _), (after, own) in pairwise(windows):
        assert before.stop - after.start == overlap
        assert own.start - after.start == overlap - overlap // 2


def test_a_text_is_cut_at_either_end():
    text = "we are at war with the states"
    start, tokens = shortened(text, bpe(), 3)
    assert start == text[: len(start)] == "we are at"
    assert tokens == 7
    end, _ = shortened(text, bpe(), 2, "end")
    assert end.split() == ["the", "states"]
    assert shortened(text, bpe(), 99) == (text, 7)


# --- tags


def test_case_is_taken_from_a_text():
    tagged = case_tags("We saw Mexico City, Texas and I the U. S. Army. New treaties")
    assert list(zip(tagged.words, tagged.tags, strict=True)) == [
        ("we", "START"), ("saw", "O"), ("mexico", "B-NAME"), ("city", "I-NAME"), ("texas", "B-NAME"), ("and", "O"),
        ("i", "O"), ("the", "O"), ("u", "B-NAME"), ("s", "B-NAME"), ("army", "B-NAME"), ("new", "START"),
        ("treaties", "O"),
    ]  # fmt: skip


# tags, and the entities that they name as type, first word and the word behind the last
ENTITIES = {
    "I- begins and B- divides": (["B-A", "I-A", "O", "I-B", "I-B", "B-B", "I-A"],
                                 [("A", 0, 2), ("B", 3, 5), ("B", 5, 6), ("A", 6, 7)]),
    "none": (["O", "O"], []),
    "without prefixes": (["NOUN", "NOUN", "VERB", "O"], [("NOUN", 0, 2), ("VERB", 2, 3)]),
    "prefixes of other schemes": (["START", "START", "S-A", "E-A"], [("START", 0, 2), ("S-A", 2, 3), ("E-A", 3, 4)]),
}  # fmt: skip


@pytest.mark.parametrize(("tags", "entities"), ENTITIES.values(), ids=ENTITIES)
def test_entities_by_hand(tags, entities):
    """Each entity alone, written with prefixes, is found among those of the tags; so are all, and no others."""
    metric = EntityF1(keep_in_memory=True)

    def right_and_all(chosen):
        alone = ["O"] * len(tags)
        for kind, begin, end in chosen:
            alone[begin:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - begin - 1)]
        return metric.compute(predictions=[tags], references=[alone])

    for entity in entities:
        scores = right_and_all([entity])
        assert (scores["recall"], scores["precision"]) == (1, pytest.approx(1 / len(entities)))
    assert right_and_all(entities)["f1"] == bool(entities)


def test_entity_scores_by_hand():
    true = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"]]
    given = [["B-A", "O", "O", "B-B"], ["B-A", "B-A"]]
    # right: B of the first and A of the second; 4 are given and 3 true
    scores = EntityF1(keep_in_memory=True).compute(predictions=given, references=true)
    precision, recall = 2 / 4, 2 / 3
    f1 = 2 * precision * recall / (precision + recall)
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": f1, "accuracy": 4 / 6})
    nothing = EntityF1(keep_in_memory=True).compute(predictions=[["O"]], references=[["O"]])
    assert nothing == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


def tag_model(tagged):
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0, "intermediate_size": 8}
    return AutoModel.from_config(AutoConfig.for_model("et_full", **sizes, **label_fields(tag_names(tagged))))


@pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)
@pytest.mark.parametrize("overlap", [0, 5])
def test_every_word_has_its_label_once_at_its_first_token(tokenizer, overlap):
    words = ["antidisestablishmentarianism", "frightens", "nobody", "but", "philosophers"] * 4
    tagged = [case_tags("and"), type(case_tags("a"))(words, [None if i == 3 else f"T{i}" for i in range(20)])]
    model = tag_model(tagged)
    data = tag_windows(tagged, tokenizer, 16, task_settings(TagSettings, overlap=overlap), model)
    assert data.notes[0] == 0
    assert data.notes.count(0) == 1
    found = []
    for row, note in zip(data.rows, data.notes, strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) <= 16
        for token in np.flatnonzero(row["labels"] != IGNORED) if note else []:
            name = data.shared[row["labels"][token]]
            # the word begins with what the token stands for
            piece = tokenizer.decode([row["input_ids"][token]]).strip()
            assert words[int(name[1:])].startswith(piece)
            assert piece
            found.append(name)
    assert found == [f"T{i}" for i in range(20) if i != 3]


def test_a_hub_data_set_names_its_tags(monkeypatch):
    kinds = datasets.List(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": kinds})
    train = datasets.Dataset.from_list([{"tokens": ["a", "b"], "ner_tags": [0, 1]}] * 9, features=features)
    monkeypatch.setattr(
        "efficient_transformers.training.data.texts.datasets.load_dataset",
        lambda name, config: datasets.DatasetDict(train=train),
    )
    tagged = load_tagged(task_settings(TagSettings, data="a/b", words_column="tokens", tags_column="ner_tags"))
    assert (tagged["test"][0].words, tagged["test"][0].tags) == (["a", "b"], ["O", "B-X"])


BAD_TAGS = {
    "no list": ({"words": "a b", "tags": ["O"]}, "'words' must be a list with one entry for each word, but line 1 of"),
    "a float": ({"words": ["a"], "tags": [0.5]}, "'tags' must be a list with one entry"),
    "lengths": (
        {"words": ["a", "b"], "tags": ["O"]},
        r"one tag for each word, but line 1 of .* has 2 words and 1 tags",
    ),
    "column": ({"words": ["a"]}, "no column 'tags'; there are: words. Set tags_column"),
}


@pytest.mark.parametrize(("row", "message"), BAD_TAGS.values(), ids=BAD_TAGS)
def test_bad_tags_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_tagged(task_settings(TagSettings, data=str(write_rows(tmp_path / "a.jsonl", [row] * 9))))


def test_a_tag_that_training_lacks_is_refused(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"words": ["a"], "tags": ["O"]}] * 9)
    test = write_rows(tmp_path / "b.jsonl", [{"words": ["a"], "tags": ["B-X"]}])
    with pytest.raises(InputError, match="The test data has tags that are missing in the training data: B-X"):
        load_tagged(task_settings(TagSettings, data=str(train), test_data=str(test)))


def test_windows_must_be_longer_than_what_they_share():
    with pytest.raises(InputError, match=r"overlap \(14\) must be less than the tokens of text in a window \(14\)"):
        tag_windows([case_tags("we are")], bpe(), 16, task_settings(TagSettings, overlap=14), tag_model([]))
