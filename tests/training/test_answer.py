"""Answering questions: scores, spans, windows, needles and refusals."""

import numpy as np
import pytest
import torch
from labelled_rows import plain_model, task_settings
from language_runs import TOKENIZERS
from repository import ROOT
from training_runs import bpe, wordpiece, write_rows
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, CanineTokenizer

from efficient_transformers.training.data.excerpts import sentences
from efficient_transformers.training.engine.building import build_config, build_model
from efficient_transformers.training.engine.metrics import AnswerMatch
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import answer
from efficient_transformers.training.tasks.answer import (
    AnswerSettings,
    Question,
    Window,
    answer_windows,
    answers_of,
    best_span,
    collate_answers,
    load_questions,
    plant,
)
from efficient_transformers.training.tasks.choose import ChooseSettings, choice_rows
from efficient_transformers.training.tasks.tag_tokens import TagSettings, tag_windows

# prediction, right answers, exact match, F1
SQUAD = [
    ("The  Union!", ["union"], 1, 1),
    ("a union", ["the states", "Union."], 1, 1),
    ("unions", ["union"], 0, 0),
    ("the people of the union", ["union of states"], 0, 2 / 3),  # two words of three are common
    ("peace", ["war", "peace now"], 0, 2 / 3),
    ("war war", ["war"], 0, 2 / 3),
    ("", [], 1, 1),
    ("war", [], 0, 0),
    ("", ["war"], 0, 0),
    ("the", ["a"], 1, 1),  # nothing is left of either
]


def test_squad_scores_by_hand():
    metric = AnswerMatch(keep_in_memory=True)
    for given, answers, exact, f1 in SQUAD:
        scores = metric.compute(predictions=[given], references=[answers])
        assert scores == {"exact_match": exact, "f1": pytest.approx(f1)}, given
    given, answers, exact, f1 = zip(*SQUAD, strict=True)
    scores = metric.compute(predictions=given, references=answers)
    assert scores == pytest.approx({"exact_match": sum(exact) / 10, "f1": sum(f1) / 10})


SHORT = {"max_question_length": 8, "stride": 6, "max_answer_length": 5}


@pytest.mark.parametrize("tokenizer", [bpe(), wordpiece()], ids=TOKENIZERS)
def test_positions_are_those_of_the_answer_wherever_it_is_shown_whole(tokenizer):
    context = "nobody but philosophers frightens unsuspecting parliamentarians and nobody frightens philosophers " * 2
    start = context.index("unsuspecting")
    asked = Question("nobody frightens nobody but whom and why", context, ["unsuspecting parliamentarians"], [start])
    data = answer_windows([asked], tokenizer, 30, task_settings(AnswerSettings, **SHORT), plain_model())
    spans, seen = set(), 0
    for row, window in zip(data.rows, data.notes, strict=True):
        assert len(row["input_ids"]) <= 30
        begin, end = row["start_positions"], row["end_positions"]
        shown = window.offsets[0][0] <= start and start + len(asked.answers[0]) <= window.offsets[-1][1]
        seen += shown
        assert (end > 0) == shown
        if shown:
            letters = window.offsets[begin - window.first][0], window.offsets[end - window.first][1]
            assert context[slice(*letters)].strip() == asked.answers[0]
            spans.add((begin, end))
            logits = np.zeros((2, len(row["input_ids"])))
            logits[0, begin] = logits[1, end] = 5
            score, *letters = best_span(*logits, window, longest=20)
            assert (score, context[slice(*letters)].strip()) == (10, asked.answers[0])
    assert seen
    assert len(data) > 2


def test_the_best_span_is_in_order_not_too_long_and_in_the_context():
    window = Window(0, 2, np.array([[0, 2], [3, 5], [6, 8], [9, 11]]))
    start, end = np.array([1.0, 99, 0, 0, 4, 0, 99]), np.array([1.0, 99, 5, 0, 0, 3, 99])
    # the end at token 2 stands before the start at token 4; 4 to 5 makes 7
    assert best_span(start, end, window, longest=4) == (7 - 2, 6, 11)
    assert best_span(start, end, window, longest=1) == (5 - 2, 0, 2)


def test_the_best_window_answers_and_none_may():
    asked = [Question("?", "war and peace", ["peace"], [8]), Question("?", "war", [], [])]
    windows = [Window(0, 0, np.zeros((1, 2))), Window(0, 0, np.zeros((1, 2))), Window(1, 0, np.zeros((1, 2)))]
    spans = [(1.0, 0, 3), (2.0, 7, 13), (-1.0, 0, 3)]
    assert answers_of(spans, windows, asked, task_settings(AnswerSettings)) == ["peace", "war"]
    assert answers_of(spans, windows, asked, task_settings(AnswerSettings, null_answers=True)) == ["peace", ""]
    strict = task_settings(AnswerSettings, null_answers=True, null_threshold=2.0)
    assert answers_of(spans, windows, asked, strict) == ["", ""]


def test_questions_are_marked_where_a_variant_takes_marks():
    asked = [Question("who frightens nobody", "philosophers and parliamentarians", [], [])]
    chosen = task_settings(AnswerSettings, max_question_length=16, stride=2)
    tokenizer = bpe()
    row = answer_windows(asked, tokenizer, 40, chosen, plain_model("et_longformer")).rows[0]
    marked = row["input_ids"][row["global_attention_mask"] == 1].tolist()
    assert marked == tokenizer(asked[0].question)["input_ids"]
    # the model whose config knows the separator marks all of these but the separator by itself
    config = build_config(task_settings(AnswerSettings, model={"model_type": "et_longformer"}), tokenizer)
    assert config.sep_token_id is None
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    longformer = task_settings(AnswerSettings, model={"model_type": "et_longformer", **sizes})
    config = answer.TASK.build_config(longformer, tokenizer)
    model = build_model(longformer, config, AutoModelForQuestionAnswering)
    ids = torch.from_numpy(row["input_ids"].astype(np.int64))[None]
    assert ids[model.global_tokens(ids, None)].tolist() == marked[:-1]
    for model_type, values in (("et_local", {}), ("et_longformer", {"mark_question": False})):
        chosen = task_settings(AnswerSettings, max_question_length=16, stride=2, **values)
        assert (
            "global_attention_mask" not in answer_windows(asked, tokenizer, 40, chosen, plain_model(model_type)).rows[0]
        )


def test_answers_are_padded_on_the_right():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tokenizer", padding_side="left")
    rows = [
        {"input_ids": np.arange(5, 5 + n), "start_positions": n, "global_attention_mask": np.ones(n, int)}
        for n in (2, 4)
    ]
    batch = collate_answers(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == batch["global_attention_mask"].tolist() == [[1, 1, 0, 0], [1] * 4]
    assert batch["start_positions"].tolist() == [2, 4]


def test_a_needle_is_in_the_text_and_asked_for():
    text = " ".join(f"Word{i} word and word." for i in range(200))
    chosen = task_settings(AnswerSettings, needle_words=40, distractors=2)
    depths, begins = [], set()
    for seed in range(60):
        needle = plant(text, np.random.default_rng(seed), chosen)
        (code,), (start,) = needle.answers, needle.starts
        name = needle.question.removeprefix("What is the code of ").removesuffix("?")
        assert needle.context[start:].startswith(f"{code}.")
        assert f"The code of {name} is {code}." in needle.context
        assert needle.context.count("The code of ") == 3
        rest = [line for line in sentences(needle.context) if not line.startswith("The code")]
        assert len(rest) == 10
        assert " ".join(rest) in text
        depths.append(start / len(needle.context))
        begins.add(rest[0])
    assert min(depths) < 0.15 < 0.85 < max(depths)
    assert len(begins) > 40
    short = plant("Short text.", np.random.default_rng(0), chosen)
    assert "Short text." in short.context


def test_needles_follow_from_split_seed(tmp_path):
    data = str(write_rows(tmp_path / "a.jsonl", [{"text": f"We are {i}. And so on."} for i in range(20)]))
    chosen = {"data": data, "examples": "needle", "needles_per_document": 2}
    first = load_questions(task_settings(AnswerSettings, **chosen, seed=1))
    assert load_questions(task_settings(AnswerSettings, **chosen, seed=2)) == first
    assert load_questions(task_settings(AnswerSettings, **chosen, split_seed=1)) != first
    assert [len(split) for split in first.values()] == [28, 6, 6]


BAD_QUESTIONS = {
    "place": ({"text": ["war"], "answer_start": [1]}, r"'war' of line 1 of a.jsonl is not .* at character 1"),
    "form": (["war"], r"'answers' must be \{'text': \[...\], 'answer_start': \[...\]\}.*has \['war'\]"),
    "lengths": ({"text": ["war"], "answer_start": []}, "with lists of equal length"),
    "none": ({"text": [], "answer_start": []}, "Line 1 of a.jsonl has no answer: set null_answers to true"),
}


@pytest.mark.parametrize(("answers", "message"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_answers_are_refused(tmp_path, answers, message):
    rows = [{"question": "what", "context": "war and peace", "answers": answers}] * 9
    with pytest.raises(InputError, match=message):
        load_questions(task_settings(AnswerSettings, data=str(write_rows(tmp_path / "a.jsonl", rows))))


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer, model = CanineTokenizer(), plain_model()
    encoders = ((answer_windows, AnswerSettings), (tag_windows, TagSettings), (choice_rows, ChooseSettings))
    for encode, settings_class in encoders:
        with pytest.raises(InputError, match="CanineTokenizer is not from the tokenizers library"):
            encode([], tokenizer, 64, task_settings(settings_class), model)
