"""The retrieval benchmark: documents have their length, hold the answer once, and systems are scored by it."""

import pytest
import retrieval
import torch
from retrieval_tasks import TASKS, Filler
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(retrieval.minilm())


def draw(words, name: str, seed: int = 0, length: int = 200):
    return TASKS[name](Filler("test", words, seed), length, 6, 8)


@pytest.mark.parametrize("name", TASKS)
def test_documents_fill_their_length_and_depend_on_the_seed_alone(words, name):
    task = draw(words, name)
    assert len(task.queries) == len(task.answers) == 6
    assert len(task.documents) == 8
    assert task == draw(words, name)
    assert task != draw(words, name, seed=1)
    for document in task.documents:
        assert 100 < len(words(document)["input_ids"]) <= (300 if name == "halves" else 202)


@pytest.mark.parametrize("name", ["passkey", "sentence"])
def test_only_the_answer_holds_what_is_asked_for(words, name):
    task = draw(words, name)
    for query, answer in zip(task.queries, task.answers, strict=True):
        key = query.removeprefix("What is the passkey of ").removesuffix("?")
        assert [key in document for document in task.documents].index(True) == answer
        assert sum(key in document for document in task.documents) == 1


def test_the_referent_is_far_from_what_is_asked_of_it_unless_near(words):
    gaps = {}
    for name in ("referent", "referent, near"):
        task = draw(words, name)
        document, query = task.documents[task.answers[0]], task.queries[0]
        who = query.partition(" won ")[0]
        gaps[name] = document.index("In the end the captain won") - document.index(who)
        assert f"{who} is called the captain" in document or f"{who} the captain" in document
        twin = task.documents[task.answers[0] ^ 1]
        assert f"{who} is called the engineer" in twin or f"{who} the engineer" in twin
    assert gaps["referent"] > 3 * gaps["referent, near"] > 0


def test_accuracy_counts_the_best_document():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    assert retrieval.accuracy(scores, [1, 1, 1]) == pytest.approx(2 / 3)


def test_bm25_finds_a_sentence(words):
    task = draw(words, "sentence")
    assert retrieval.accuracy(retrieval.bm25_scores(task, words), task.answers) == 1


def test_the_table_shows_means_and_spreads():
    rows = [
        {"length": 256, "task": "passkey", "system": "BM25", "accuracy": value, "seed": seed}
        for seed, value in enumerate((0.5, 0.7))
    ]
    rows.append(
        {"length": 256, "task": "halves", "system": "cut 256", "accuracy": 1.0, "vectors": 1.0, "kilobytes": 1.5}
    )
    lines = retrieval.table(rows, 256)
    assert "| BM25 | 0.60 ± 0.14 |  |  |  |  |" in lines
    assert "| cut 256 |  | 1.00 | 1 | 1.5 |  |" in lines
