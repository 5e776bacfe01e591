"""Choosing between continuations, and matching pairs of documents."""

import numpy as np
import pytest
import torch
from labelled_rows import ROWS, choice_row, plain_model, task_settings
from training_runs import bpe, write_rows
from transformers import AutoConfig, AutoModel

from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import choose
from efficient_transformers.training.tasks.choose import ChooseSettings, choice_rows, load_choices, next_excerpts
from efficient_transformers.training.tasks.match import (
    DocumentMatcher,
    MatchingHead,
    MatchSettings,
    load_pairs,
    same_or_not,
)


def test_the_right_choice_is_what_comes_next():
    texts = [" ".join(f"{name}{i} one two." for i in range(40)) for name in "abc"]
    chosen = task_settings(ChooseSettings, examples="next", context_words=7, choice_words=5, num_choices=3)
    found = next_excerpts(texts, np.random.default_rng(0), chosen)
    # pieces are of 6 words, a context of 2 of them, and with the choice 18 of a text's 120 words: 6 examples
    assert len(found) == 18
    for example in found:
        text = next(text for text in texts if example.context in text)
        assert f"{example.context} {example.choices[example.label]}" in text
        assert [choice in text for choice in example.choices].count(True) == 1
    assert {example.label for example in found} == {0, 1, 2}


def test_contexts_are_cut_and_choices_stay():
    tokenizer, row = bpe(), ROWS["next"](2)
    chosen = task_settings(ChooseSettings, max_choice_length=8, keep="end")
    example = load_choices_of(row)
    example.context = "peace " * 50 + "and war"
    data = choice_rows([example], tokenizer, 20, chosen, plain_model())
    texts = [tokenizer.decode(ids) for ids in data.rows[0]["input_ids"]]
    assert all(len(ids) <= 20 for ids in data.rows[0]["input_ids"])
    assert [text.split("[SEP]")[1] for text in texts] == example.choices
    assert all(text.split("[SEP]")[0].endswith("and war") for text in texts)
    assert data.lengths == [max(map(len, data.rows[0]["input_ids"]))]


def load_choices_of(row, **values):
    return choose._choice(("line 1", row), task_settings(ChooseSettings, **values))


def test_columns_of_swag_and_of_race_are_read():
    swag = {"startphrase": "We", "ending0": "go", "ending1": "stay", "label": 1}
    read = load_choices_of(swag, context_column="startphrase", choice_columns=["ending0", "ending1"])
    assert (read.context, read.choices, read.label) == ("We", ["go", "stay"], 1)
    race = {"article": "War.", "question": "What?", "options": ["peace", "war"], "answer": "B"}
    read = load_choices_of(race, context_column="article", question_column="question", choices_column="options",
                           label_column="answer")  # fmt: skip
    assert (read.choices, read.label) == (["What? peace", "What? war"], 1)


@pytest.mark.parametrize("label", ["E", 4, -1, "", 1.5, None])
def test_a_label_outside_of_the_choices_is_refused(label):
    with pytest.raises(
        InputError, match="'label' must name one of 4 choices by its number, from 0 to 3, or by its letter"
    ):
        load_choices_of({**choice_row(0), "label": label})


def test_all_examples_need_as_many_choices(tmp_path):
    rows = [choice_row(i) for i in range(9)]
    rows[3]["choices"] = rows[3]["choices"][:2] * 3
    with pytest.raises(InputError, match=r"the same number of choices, but the numbers are \[4, 6\]"):
        load_choices(task_settings(ChooseSettings, data=str(write_rows(tmp_path / "a.jsonl", rows))))


# --- pairs


def test_pairs_are_of_different_documents():
    documents = [(" ".join(f"{i}w{j} is." for j in range(8)), group) for i, group in enumerate("aabbc")]
    pairs = same_or_not(documents, np.random.default_rng(0), task_settings(MatchSettings, excerpt_words=4))
    # 4 excerpts of each document of a group that has two: c has none to match
    assert [sum(pair.label == label for pair in pairs) for label in (0, 1)] == [16, 16]
    for pair in pairs:
        first, second = (int(text[0]) for text in pair.texts)
        assert first != second
        assert (documents[first][1] == documents[second][1]) == bool(pair.label)


def test_the_matching_head_by_hand():
    first, second = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for interaction, features in (
        ("nli", [first, second, first * second, first - second]),
        ("concat", [first, second]),
    ):
        head = MatchingHead(4, 6, interaction).double()
        hidden = torch.cat(features, -1) @ head.mlp.weight.T + head.mlp.bias
        hidden = hidden.clamp(min=0) @ head.mlp2.weight.T + head.mlp2.bias
        expected = hidden.clamp(min=0) @ head.logits.weight.T + head.logits.bias
        torch.testing.assert_close(head(first, second), expected)
        assert head.mlp2.weight.shape == (3, 6)


def test_a_matcher_is_saved_and_opened_and_its_encoder_alone(tmp_path):
    config = AutoConfig.for_model("et_local", vocab_size=50, hidden_size=8, num_attention_heads=2, num_hidden_layers=1,
                                  intermediate_size=8, max_position_embeddings=16)  # fmt: skip
    matcher = DocumentMatcher(AutoModel.from_config(config), MatchingHead(8, 6, "concat")).eval()
    matcher.save_pretrained(tmp_path)
    again = DocumentMatcher.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 50, (3, 2, 9))
    keep = torch.ones_like(ids)
    keep[0, 1, 4:] = 0
    logits = matcher(ids, attention_mask=keep).logits
    assert torch.equal(again(ids, attention_mask=keep).logits, logits)
    encoder, vectors = AutoModel.from_pretrained(tmp_path).eval(), []
    for document in (0, 1):
        vectors.append(encoder(ids[:, document], attention_mask=keep[:, document]).pooler_output)
    torch.testing.assert_close(matcher.head(*vectors), logits)


BAD_PAIRS = {
    "label": (
        {"text1": "a", "text2": "b", "label": 2},
        r"'label' must be 1 \(a match\) or 0, but line 1 of a.jsonl has 2",
    ),
    "text": ({"text1": "a", "text2": 5, "label": 1}, "Both documents must be text, but line 1 of a.jsonl has 5"),
    "one class": ({"text1": "a", "text2": "b", "label": 1}, "must contain both pairs that match and pairs that do not"),
}


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_pairs(task_settings(MatchSettings, data=str(write_rows(tmp_path / "a.jsonl", [row] * 9))))
