"""Late pooling: spans of one pass as the vectors of a `MultiVectorEncoder`."""

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Transformer
from torch.nn import functional as F
from words import small

from efficient_transformers import VARIANTS
from efficient_transformers.late_pooling import LatePooling, inverse_document_frequencies

TEXTS = ["word1 good word2 word3", "bad", "word9 word8 good word7 word6 word5 word4"]


@pytest.fixture
def body(tokenizer, tmp_path) -> Transformer:
    small(VARIANTS["local"], None).save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    return Transformer(str(tmp_path / "body"), max_seq_length=32)


@pytest.mark.parametrize(("length", "spans"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_each_vector_is_the_mean_of_its_span(length, spans):
    states = torch.randn(length, 6)
    vectors = LatePooling(span=4).pool_one(states)
    assert len(vectors) == spans
    for vector, part in zip(vectors, states.split(4), strict=True):
        torch.testing.assert_close(vector, F.normalize(part.mean(0), dim=0))


def test_spans_overlap_by_their_stride_and_cover_every_token():
    states = torch.randn(11, 6)
    vectors = LatePooling(span=4, stride=2).pool_one(states)
    parts = [states[at : at + 4] for at in (0, 2, 4, 6, 8)]
    torch.testing.assert_close(vectors, torch.stack([F.normalize(part.mean(0), dim=0) for part in parts]))


def test_weights_are_those_of_the_tokens_of_documents():
    idf = torch.rand(20)
    states, ids = torch.randn(2, 7, 6), torch.randint(20, (2, 7))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    features = {"token_embeddings": states, "attention_mask": mask, "input_ids": ids}
    found = LatePooling(span=4, idf=idf)(dict(features), task="document")
    assert found["attention_mask"].tolist() == [[True, True], [True, False]]
    wanted = F.normalize((idf[ids[1, 3:], None] * states[1, 3:]).sum(0), dim=0)
    torch.testing.assert_close(found["token_embeddings"][1, 0], wanted)
    query = LatePooling(span=4, idf=idf)(dict(features), task="query")["token_embeddings"]
    torch.testing.assert_close(query[:, 0], F.normalize(torch.stack([states[0].mean(0), states[1, 3:].mean(0)]), dim=1))


def test_a_model_ranks_by_the_best_span_and_survives_saving(body, tokenizer, tmp_path):
    idf = inverse_document_frequencies(tokenizer, TEXTS)
    model = MultiVectorEncoder(modules=[body, LatePooling(span=3, idf=idf)], device="cpu")
    documents, queries = model.encode_document(TEXTS), model.encode_query(["good", "word5 word4"])
    assert [len(vectors) for vectors in queries] == [1, 1]
    scores = model.similarity(queries, documents)
    wanted = torch.tensor([[float((query @ vectors.T).max()) for vectors in documents] for query in queries])
    torch.testing.assert_close(scores, wanted)
    for text, vectors in zip(TEXTS, documents, strict=True):  # a batch equals one by one
        torch.testing.assert_close(model.encode_document([text])[0], vectors, rtol=1e-4, atol=1e-5)
    model.save(str(tmp_path / "saved"))
    again = MultiVectorEncoder(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert again[1].idf.equal(idf)
    for a, b in zip(again.encode_document(TEXTS), documents, strict=True):
        torch.testing.assert_close(a, b)


def test_rare_tokens_weigh_more(tokenizer):
    weights = inverse_document_frequencies(tokenizer, ["good word1", "good word2", "good"])
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("good", "word1", "word9")}
    assert 0 < weights[ids["good"]] < weights[ids["word1"]] < weights[ids["word9"]]
    with pytest.raises(ValueError, match="at least one text"):
        inverse_document_frequencies(tokenizer, [])


@pytest.mark.parametrize(
    "sizes", [{"span": 0}, {"span": 4, "stride": 5}, {"span": 4, "stride": 0}, {"span": 4, "stride": -1}], ids=str
)
def test_senseless_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"span|stride"):
        LatePooling(**sizes)
