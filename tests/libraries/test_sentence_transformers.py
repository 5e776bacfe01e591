"""sentence-transformers on a saved folder of every variant: it encodes, saves, loads and trains."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from words import small
from zoo import every_variant

TEXTS = ["word1 good word2 word3", "bad", "word9 word8 good word7 word6 word5 word4"]


@pytest.fixture
def folder(variant, tokenizer, tmp_path):
    """A saved body with its tokenizer."""
    model = small(variant, None)
    model.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    return tmp_path / "body"


def sentences(folder) -> SentenceTransformer:
    body = Transformer(str(folder), max_seq_length=32)
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu")


def mean_of_hidden_states(variant, folder, tokenizer) -> torch.Tensor:
    model = variant.model_class(None).from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@every_variant
def test_a_padded_batch_is_encoded_as_the_mean_of_its_hidden_states(variant, folder, tokenizer, tmp_path):
    model = sentences(folder)
    expected = mean_of_hidden_states(variant, folder, tokenizer)
    actual = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in TEXTS])
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)

    model.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), actual)


@every_variant
def test_one_step_of_training_brings_positives_together(variant, folder):
    model = sentences(folder)
    loss = MultipleNegativesRankingLoss(model)
    pairs = [model.preprocess(texts) for texts in (["good word1", "bad word2"], ["good word3", "bad word4"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.eval()  # no dropout and no moving statistics: both values are of the same function

    def value() -> torch.Tensor:
        return loss([dict(batch) for batch in pairs], None)  # a copy: each module adds its output to the batch

    before = value()
    before.backward()
    used = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert any("embeddings" in name for name in used)
    assert any("layers.1" in name for name in used)
    optimizer.step()
    assert value() < before
