"""The tasks with labelled examples beyond classification: their data, windows and scores, and runs from end to end."""

import io
import json
from contextlib import redirect_stdout
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from labelled_rows import OWN, ROWS, TINY_ROWS, choice_row
from repository import ROOT
from training_runs import (
    assert_same_run,
    bpe,
    composed,
    each_variant_of,
    launch_two,
    read_metrics,
    reset_accelerate,
    stop_and_continue,
    wordpiece,
    write_config,
    write_rows,
)
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoTokenizer, CanineTokenizer

from efficient_transformers.cards import loading_code
from efficient_transformers.training.data.excerpts import excerpts, sentences
from efficient_transformers.training.data.packing import IGNORED, overlapping_slices, shortened
from efficient_transformers.training.engine.building import build_config, build_model
from efficient_transformers.training.engine.metrics import AnswerMatch, EntityF1
from efficient_transformers.training.engine.task import label_fields
from efficient_transformers.training.runs import train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.tasks import answer, choose, match, tag_tokens
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
from efficient_transformers.training.tasks.choose import ChooseSettings, choice_rows, load_choices, next_excerpts
from efficient_transformers.training.tasks.match import (
    DocumentMatcher,
    MatchingHead,
    MatchSettings,
    load_pairs,
    same_or_not,
)
from efficient_transformers.training.tasks.tag_tokens import TagSettings, case_tags, load_tagged, tag_names, tag_windows

TASKS = {"case": tag_tokens.TASK, "facts": answer.TASK, "next": choose.TASK, "president": match.TASK}


def settings(settings_class, **values):
    return settings_class.from_dict({"data": "era", "model": {"model_type": "bert"}, **values})


REACHED = {
    "case": ("f1", 1.0),
    "facts": ("exact_match", 1.0),
    "next": ("accuracy", 1.0),
    "president": ("accuracy", 0.9),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {task: write_rows(folder / f"{task}.jsonl", [make(i) for i in range(60)]) for task, make in ROWS.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpora):
    """For each task the folder of a run that was never stopped, and what it printed."""
    done = {}

    def run_once(task):
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            config = write_config(folder, TINY_ROWS | OWN[task], corpora[task])
            with redirect_stdout(io.StringIO()) as printed:
                train.main(["--config", str(config)])
            reset_accelerate()
            done[task] = folder / "out", printed.getvalue()
        return done[task]

    return run_once


each_task = pytest.mark.parametrize("task", TASKS)


@each_task
def test_a_run_learns_and_leaves_a_folder_for_the_hub(finished, task):
    folder, printed = finished(task)
    found = read_metrics(folder)
    name, least = REACHED[task]
    assert found["test"][name] >= least
    assert found["test"]["loss"] < found["history"][0]["loss"]
    assert found["test"]["n"] >= 9
    card = ModelCard.load(folder / "README.md")
    assert {result.metric_value for result in card.data.eval_results} >= {found["test"][name]}
    assert f"training/train.py --config {folder.parent / 'tiny.yaml'}" in card.text
    code = loading_code(str(folder), TASKS[task].auto_class.__name__, found["model"]["max_length"])
    assert code in printed
    with redirect_stdout(io.StringIO()) as shown:
        exec(code, {})
    assert shown.getvalue().strip()


@each_task
def test_a_finished_run_is_evaluated(finished, task):
    folder, _ = finished(task)
    assert TASKS[task].evaluate_folder(folder, ["--eval_batch_size=5"]) == pytest.approx(
        read_metrics(folder)["test"], rel=1e-5
    )


@each_task
def test_sigterm_saves_and_the_run_ends_as_one_never_stopped(monkeypatch, finished, corpora, tmp_path, task):
    folder, _ = finished(task)
    stop_and_continue(monkeypatch, write_config(tmp_path, TINY_ROWS | OWN[task], corpora[task]), 10)
    last = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))[-1]
    files = ("model.safetensors", "matching_head.safetensors")
    if task == "president":  # its head is in a file of its own
        assert [(folder / name).read_bytes() for name in files] == [
            (tmp_path / "out" / name).read_bytes() for name in files
        ]
        assert read_metrics(folder)["history"] == read_metrics(tmp_path / "out")["history"]
    else:
        assert_same_run(tmp_path / "out", folder, last)


@pytest.mark.slow
@each_task
def test_two_processes_score_every_window_once(corpora, tmp_path, task):
    config = write_config(tmp_path, TINY_ROWS | OWN[task] | {"max_steps": 4, "eval_batch_size": 4}, corpora[task])
    launch_two("--config", str(config))
    found = read_metrics(tmp_path / "out")
    assert found["training"]["processes"] == 2
    assert TASKS[task].evaluate_folder(tmp_path / "out", []) == pytest.approx(found["test"], rel=1e-4)


@each_variant_of(*TASKS)
def test_every_config_builds_a_tiny_model_and_its_data(monkeypatch, task, variant, tmp_path):
    """A few documents of each split stand in for all."""
    few = {split: datasets.load_dataset("parquet", data_files=str(ROOT / f"data/sotu/{split}.parquet"),
                                        cache_dir=str(tmp_path / "cache"))["train"].to_list()[:7]
           for split in ("train", "validation", "test")}  # fmt: skip
    for split, rows in few.items():
        write_rows(tmp_path / f"{split}.jsonl", [{**row, "text": row["text"][:9000], "name": "ab"[i % 2]}
                                                 for i, row in enumerate(rows)])  # fmt: skip
    task, chosen = composed(task, variant, f"--data={tmp_path}")
    chosen.model |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    ready = task.ready(chosen)
    assert {key: getattr(ready.model.config, key) for key in chosen.model} == chosen.model
    data = ready.encode("test")
    batch = ready.collate([data[i] for i in range(2)])
    assert batch["input_ids"].shape[-1] <= chosen.max_length
    assert ready.model(**batch).loss.isfinite()


@each_task
def test_a_metric_that_is_none_is_refused_before_training(corpora, tmp_path, task):
    config = write_config(tmp_path, TINY_ROWS | OWN[task], corpora[task], best_metric="acuracy")
    with pytest.raises(SystemExit, match=r"best_metric \('acuracy'\) must be one of loss, "):
        train.main(["--config", str(config)])


# --- sentences and windows


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


TOKENIZERS = {"bpe": bpe, "wordpiece": wordpiece}


def tag_model(tagged):
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 0, "intermediate_size": 8}
    return AutoModel.from_config(AutoConfig.for_model("et_full", **sizes, **label_fields(tag_names(tagged))))


@pytest.mark.parametrize("tokenizer", [make() for make in TOKENIZERS.values()], ids=TOKENIZERS)
@pytest.mark.parametrize("overlap", [0, 5])
def test_every_word_has_its_label_once_at_its_first_token(tokenizer, overlap):
    words = ["antidisestablishmentarianism", "frightens", "nobody", "but", "philosophers"] * 4
    tagged = [case_tags("and"), type(case_tags("a"))(words, [None if i == 3 else f"T{i}" for i in range(20)])]
    model = tag_model(tagged)
    data = tag_windows(tagged, tokenizer, 16, settings(TagSettings, overlap=overlap), model)
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
    tagged = load_tagged(settings(TagSettings, data="a/b", words_column="tokens", tags_column="ner_tags"))
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
        load_tagged(settings(TagSettings, data=str(write_rows(tmp_path / "a.jsonl", [row] * 9))))


def test_a_tag_that_training_lacks_is_refused(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"words": ["a"], "tags": ["O"]}] * 9)
    test = write_rows(tmp_path / "b.jsonl", [{"words": ["a"], "tags": ["B-X"]}])
    with pytest.raises(InputError, match="The test data has tags that are missing in the training data: B-X"):
        load_tagged(settings(TagSettings, data=str(train), test_data=str(test)))


def test_windows_must_be_longer_than_what_they_share():
    with pytest.raises(InputError, match=r"overlap \(14\) must be less than the tokens of text in a window \(14\)"):
        tag_windows([case_tags("we are")], bpe(), 16, settings(TagSettings, overlap=14), tag_model([]))


# --- answers


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


def plain_model(model_type="et_full", **fields):
    return AutoModelForQuestionAnswering.from_config(
        AutoConfig.for_model(model_type, vocab_size=4096, hidden_size=8, num_attention_heads=1, num_hidden_layers=1,
                             intermediate_size=8, max_position_embeddings=64, **fields)
    )  # fmt: skip


SHORT = {"max_question_length": 8, "stride": 6, "max_answer_length": 5}


@pytest.mark.parametrize("tokenizer", [bpe(), wordpiece()], ids=TOKENIZERS)
def test_positions_are_those_of_the_answer_wherever_it_is_shown_whole(tokenizer):
    context = "nobody but philosophers frightens unsuspecting parliamentarians and nobody frightens philosophers " * 2
    start = context.index("unsuspecting")
    asked = Question("nobody frightens nobody but whom and why", context, ["unsuspecting parliamentarians"], [start])
    data = answer_windows([asked], tokenizer, 30, settings(AnswerSettings, **SHORT), plain_model())
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
    assert answers_of(spans, windows, asked, settings(AnswerSettings)) == ["peace", "war"]
    assert answers_of(spans, windows, asked, settings(AnswerSettings, null_answers=True)) == ["peace", ""]
    strict = settings(AnswerSettings, null_answers=True, null_threshold=2.0)
    assert answers_of(spans, windows, asked, strict) == ["", ""]


def test_questions_are_marked_where_a_variant_takes_marks():
    asked = [Question("who frightens nobody", "philosophers and parliamentarians", [], [])]
    chosen = settings(AnswerSettings, max_question_length=16, stride=2)
    tokenizer = bpe()
    row = answer_windows(asked, tokenizer, 40, chosen, plain_model("et_longformer")).rows[0]
    marked = row["input_ids"][row["global_attention_mask"] == 1].tolist()
    assert marked == tokenizer(asked[0].question)["input_ids"]
    # the model whose config knows the separator marks all of these but the separator by itself
    config = build_config(settings(AnswerSettings, model={"model_type": "et_longformer"}), tokenizer)
    assert config.sep_token_id is None
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    longformer = settings(AnswerSettings, model={"model_type": "et_longformer", **sizes})
    config = answer.TASK.build_config(longformer, tokenizer)
    model = build_model(longformer, config, AutoModelForQuestionAnswering)
    ids = torch.from_numpy(row["input_ids"].astype(np.int64))[None]
    assert ids[model.global_tokens(ids, None)].tolist() == marked[:-1]
    for model_type, values in (("et_local", {}), ("et_longformer", {"mark_question": False})):
        chosen = settings(AnswerSettings, max_question_length=16, stride=2, **values)
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
    chosen = settings(AnswerSettings, needle_words=40, distractors=2)
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
    first = load_questions(settings(AnswerSettings, **chosen, seed=1))
    assert load_questions(settings(AnswerSettings, **chosen, seed=2)) == first
    assert load_questions(settings(AnswerSettings, **chosen, split_seed=1)) != first
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
        load_questions(settings(AnswerSettings, data=str(write_rows(tmp_path / "a.jsonl", rows))))


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer, model = CanineTokenizer(), plain_model()
    encoders = ((answer_windows, AnswerSettings), (tag_windows, TagSettings), (choice_rows, ChooseSettings))
    for encode, settings_class in encoders:
        with pytest.raises(InputError, match="CanineTokenizer is not from the tokenizers library"):
            encode([], tokenizer, 64, settings(settings_class), model)


# --- choices


def test_the_right_choice_is_what_comes_next():
    texts = [" ".join(f"{name}{i} one two." for i in range(40)) for name in "abc"]
    chosen = settings(ChooseSettings, examples="next", context_words=7, choice_words=5, num_choices=3)
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
    chosen = settings(ChooseSettings, max_choice_length=8, keep="end")
    example = load_choices_of(row)
    example.context = "peace " * 50 + "and war"
    data = choice_rows([example], tokenizer, 20, chosen, plain_model())
    texts = [tokenizer.decode(ids) for ids in data.rows[0]["input_ids"]]
    assert all(len(ids) <= 20 for ids in data.rows[0]["input_ids"])
    assert [text.split("[SEP]")[1] for text in texts] == example.choices
    assert all(text.split("[SEP]")[0].endswith("and war") for text in texts)
    assert data.lengths == [max(map(len, data.rows[0]["input_ids"]))]


def load_choices_of(row, **values):
    return choose._choice(("line 1", row), settings(ChooseSettings, **values))


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
        load_choices(settings(ChooseSettings, data=str(write_rows(tmp_path / "a.jsonl", rows))))


# --- pairs


def test_pairs_are_of_different_documents():
    documents = [(" ".join(f"{i}w{j} is." for j in range(8)), group) for i, group in enumerate("aabbc")]
    pairs = same_or_not(documents, np.random.default_rng(0), settings(MatchSettings, excerpt_words=4))
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


def test_a_matcher_goes_on_with_its_head(finished, corpora, tmp_path):
    folder, _ = finished("president")
    values = {"model": {"checkpoint": str(folder)}, "max_steps": 1, "eval_first": True, "gradient_accumulation": 1}
    config = write_config(tmp_path, TINY_ROWS | OWN["president"] | values, corpora["president"])
    train.main(["--config", str(config)])
    best = read_metrics(folder)["validation"]
    assert read_metrics(tmp_path / "out")["before"] == pytest.approx(
        {name: best[name] for name in ("loss", "accuracy")}
    )
    # another head begins anew
    reset_accelerate()
    other = match.run(MatchSettings.from_yaml(config, ["--head_size=8", f"--out={tmp_path / 'other'}"]))
    assert other["before"]["loss"] != pytest.approx(best["loss"], rel=1e-3)
    assert json.loads((tmp_path / "other/matching_head.json").read_text())["head_size"] == 8


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
        load_pairs(settings(MatchSettings, data=str(write_rows(tmp_path / "a.jsonl", [row] * 9))))
