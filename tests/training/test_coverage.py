"""Documents longer than the model sees: what is shown of them, and what is counted as cut, skipped or empty."""

import json
from dataclasses import dataclass

import pytest
import torch
from training_runs import MODEL, TINY, TINY_LANGUAGE, bpe, read_metrics, reset_accelerate, write_config, write_rows

from efficient_transformers.training.data.causal import CausalPacker
from efficient_transformers.training.data.coverage import Coverage
from efficient_transformers.training.data.documents import Documents, cut_windows, encode_documents
from efficient_transformers.training.data.packing import Packer
from efficient_transformers.training.runs import evaluate, train
from efficient_transformers.training.settings import InputError
from efficient_transformers.training.synthetic.generated import Examples
from efficient_transformers.training.tasks.answer import AnswerSettings, Question, answer_windows
from efficient_transformers.training.tasks.choose import Choice, ChooseSettings, choice_rows
from efficient_transformers.training.tasks.classify import ClassifySettings, DocumentScorer
from efficient_transformers.training.tasks.match import MatchSettings, Pair, pair_rows
from efficient_transformers.training.tasks.tag_tokens import Tagged, TagSettings, tag_windows

TEXTS = [" a" * 30, " b", "", " c" * 6]
ROOM = 6  # tokens of text in a window of 8
VALUES = {"data": "era", "tokenizer": "data/tokenizer", "model": MODEL}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFICIENT_TRANSFORMERS_CACHE", str(tmp_path / "cache"))


def encoded(texts=TEXTS, **values):
    settings = ClassifySettings.from_dict(VALUES | values)
    labels = ["x", "y"] * (len(texts) // 2)
    return encode_documents(Documents({"train": (texts, labels)}), "train", bpe(), 8, settings), settings


def test_windows_show_the_whole_document_and_the_last_one_is_full():
    text = " ".join(f"word{i}" for i in range(9))
    ids = bpe()(text, add_special_tokens=False)["input_ids"]
    cut = cut_windows([text], bpe(), 8, whole=True)
    shown = [window[1:-1] for window in cut.windows]
    assert [token for window in shown[:-1] for token in window] + shown[-1][-cut.seen[-1] :] == ids
    assert {len(window) for window in shown} == {ROOM}
    assert shown[-1] == ids[-ROOM:]
    assert sum(cut.seen) == cut.tokens[0] == len(ids)


def test_a_short_document_is_one_window():
    cut = cut_windows([" b", " a" * ROOM], bpe(), 8, whole=True)
    assert [len(window) for window in cut.windows] == [3, 8]


def test_no_room_for_text_is_an_error():
    with pytest.raises(InputError, match=r"max_length \(2\) leaves no room"):
        cut_windows(["a"], bpe(), 2)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_documents_are_shown_whole_by_default(cached):
    for _ in range(2):  # written, and read again
        data, _ = encoded(cache_tokens=cached)
        assert data.documents == [0] * 5 + [1, 3]
        assert data.coverage == Coverage(documents=4, empty=1, cut=0, tokens=37, unseen=0)
    assert "1 documents are empty and left out" in str(data.coverage)


def test_what_is_cut_is_counted():
    data, _ = encoded(long_documents="truncate")
    assert data.documents == [0, 1, 3]
    assert data.coverage == Coverage(documents=4, empty=1, cut=1, tokens=37, unseen=30 - ROOM)
    assert "1 documents are cut, 24 tokens (64.9 %) are not shown" in str(data.coverage)
    # windows of 12, of which the model sees 8, and whose short rest is dropped
    data, _ = encoded(window_length=14, max_length=8, shortest_window=10)
    assert data.coverage == Coverage(documents=4, empty=1, cut=1, tokens=37, unseen=6 + 6 + 6)


def test_truncation_keeps_the_side_that_the_tokenizer_keeps():
    tokenizer = bpe()
    tokenizer.truncation_side = "left"
    cut = cut_windows([" a" * 9 + " b"], tokenizer, 8)
    assert cut.windows == [tokenizer(" a" * 5 + " b")["input_ids"]]


@dataclass
class Outputs:
    logits: torch.Tensor


def test_scores_are_of_documents_whose_windows_are_averaged():
    data, settings = encoded([" a" * 12, " b"])
    assert data.documents == [0, 0, 1]
    scorer = DocumentScorer(data, settings)
    # the first window alone would be wrong, the mean is right; the other document is wrong
    logits = torch.tensor([[0.0, 1.0], [3.0, 0.0], [2.0, 0.0]])
    found = scorer.judge(Outputs(logits), {"labels": torch.tensor([0, 0, 1])})
    scores = scorer.scores(found)
    mean = torch.tensor([[1.5, 0.5], [2.0, 0.0]])
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(mean, torch.tensor([0, 1])).item())
    assert scores["accuracy"] == 0.5
    assert scorer.counts() == {"n": 2}
    data, settings = encoded([" a" * 12, " b"], window_length=8, shortest_window=1)
    assert DocumentScorer(data, settings).counts() == {"n": 3}  # here a window is an example


# --- other tasks


@pytest.mark.parametrize("packer", [Packer, CausalPacker])
@pytest.mark.parametrize("packing", ["documents", "best_fit", "padding"])
def test_language_models_are_shown_all_but_short_rests(packer, packing):
    tokenizer = bpe()
    tokenizer.eos_token = tokenizer.sep_token
    pack = packer(tokenizer, 8, packing, shortest_window=8)
    pack([" a" * 8, " b", ""])
    # with padding the rest of the first document is too short; the causal one has an end token in it
    unseen = 0 if packing != "padding" else 2 if packer is Packer else 1
    assert pack.coverage == Coverage(documents=3, empty=1, cut=int(unseen > 0), tokens=9, unseen=unseen)


class Model:
    has_marked_tokens = False
    base_model = None
    config = type("Config", (), {"label2id": {"x": 0}, "id2label": {0: "x"}, "is_decoder": False})


def test_tasks_with_parts_that_are_cut_count_them():
    answer = AnswerSettings.from_dict(VALUES | {"max_question_length": 3, "stride": 1})
    questions = [Question("who is it then", " a" * 20, [" a"], [0]), Question("who", "", [], [])]
    found = answer_windows(questions, bpe(), 12, answer, Model()).coverage
    asked = len(bpe()("who is it then", add_special_tokens=False)["input_ids"])
    assert found == Coverage(documents=2, empty=1, cut=1, tokens=asked + 20, unseen=asked - 3)

    choose = ChooseSettings.from_dict(VALUES | {"max_choice_length": 2})
    room = 12 - bpe().num_special_tokens_to_add(pair=True) - 2
    found = choice_rows([Choice(" a" * 20, [" b", " c" * 5], 0)], bpe(), 12, choose, Model()).coverage
    assert found == Coverage(documents=1, cut=1, tokens=26, unseen=20 - room + 3)

    match = MatchSettings.from_dict(VALUES)
    found = pair_rows([Pair((" a" * 20, " b"), 1)], bpe(), 8, match, Model()).coverage
    assert found == Coverage(documents=2, cut=1, tokens=21, unseen=20 - ROOM)

    tag = TagSettings.from_dict(VALUES | {"overlap": 0})
    found = tag_windows([Tagged(["a"] * 20, ["x"] * 7 + [None] * 13), Tagged([], [])], bpe(), 8, tag, Model()).coverage
    assert found == Coverage(documents=2, empty=1, cut=1, tokens=20, unseen=20 - 2 * ROOM)

    assert Examples([torch.arange(9).numpy()], [0], 4).coverage == Coverage(1, 0, 1, 9, 5)


# --- a run


@pytest.mark.parametrize("tiny", [TINY, TINY_LANGUAGE | {"task": "pretrain_clm"}], ids=["classify", "pretrain_clm"])
def test_a_run_shows_what_it_reads_and_keeps_it(tmp_path, capsys, tiny):
    names = ["peace", "war"]
    rows = [{"text": f"{names[i % 2]} " * (3 + 40 * (i % 3)), "label": names[i % 2]} for i in range(48)]
    corpus = write_rows(tmp_path / "documents.jsonl", [*rows, {"text": "", "label": "war"}])
    short = {"max_steps": 2, "gradient_accumulation": 1, "eval_steps": 2, "eval_first": False}
    train.main(["--config", str(write_config(tmp_path, tiny, corpus, **short))])
    printed, counts = capsys.readouterr().out, read_metrics(tmp_path / "out")["data"]
    assert sum(split["documents"] for split in counts.values()) == 49
    assert sum(split["empty"] for split in counts.values()) == 1
    assert not any(split["unseen"] for split in counts.values())
    card = (tmp_path / "out/README.md").read_text()
    for name, split in counts.items():
        line = str(Coverage(**split))
        assert f"{name}: {line}" in printed
        assert f"| documents, {name} | {line} |" in card
    if tiny is TINY:
        assert read_metrics(tmp_path / "out")["test"]["n"] == counts["test"]["documents"] - counts["test"]["empty"]
        assert "average the logits of windows over the whole text" in card
        reset_accelerate()
        evaluate.main([str(tmp_path / "out"), "--long_documents=truncate"])
        out, err = capsys.readouterr()
        assert "documents are cut" in err
        assert json.loads(out.splitlines()[-1])["n"] == read_metrics(tmp_path / "out")["test"]["n"]
