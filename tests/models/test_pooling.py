"""Pooling: real tokens alone, and vectors that are standardized by the statistics of training."""

import pytest
import torch
import transformers
from zoo import build, inputs

from efficient_transformers import VARIANTS

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_reads_real_tokens(pooling):
    model = build(VARIANTS["local"], {}, classifier_pooling=pooling)
    ids, mask = inputs(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = mask[0, 10:] = 0
    output = model(ids, attention_mask=mask)
    hidden = output.last_hidden_state[0, 3:10]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    torch.testing.assert_close(output.pooler_output[0], torch.tanh(model.pooler.dense(vector)))


def standardizing(**fields):
    return build(VARIANTS["local"], {}, "SequenceClassification", num_labels=3, standardize_pooled=True, **fields)


def test_pooled_vectors_are_standardized_by_the_examples_of_training():
    """By all of them, while they are few; then the last ones count most."""
    model = standardizing()
    plain = build(VARIANTS["local"], {}, "SequenceClassification", num_labels=3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler.norm" not in k})
    ids = inputs(7, 30)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)  # nothing is known yet

    pooled = model.model(ids).last_hidden_state.mean(1)
    model.train()
    for rows in (ids[:3], ids[3:6], ids[6:]):
        model(rows)
    norm, dense = model.model.pooler.norm, model.model.pooler.dense
    normal = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + norm.EPSILON).sqrt()
    torch.testing.assert_close(norm.mean, pooled.mean(0))
    model.eval()
    torch.testing.assert_close(model.model(ids).pooler_output, torch.tanh(dense(normal)))

    later = pooled + torch.linspace(-5, 5, pooled.shape[1])
    for _ in range(30):
        norm.watch(later)
    torch.testing.assert_close(norm.mean, later.mean(0))
    torch.testing.assert_close(norm.variance, later.var(0, correction=0))


def test_standardized_pooling_learns_from_single_examples():
    """The first example alone has no deviation."""
    model = standardizing(dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for row in inputs(4, 12):
        model(row[None], labels=torch.tensor([1])).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    assert model.model.pooler.norm.seen == 4


def test_the_statistics_of_pooled_vectors_are_saved(tmp_path):
    """In float32, whatever the weights are in; a checkpoint without them begins at none."""
    model = standardizing(dtype=torch.float32).train()
    ids = inputs(5, 30)
    model(ids)
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    rounded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.model.pooler.norm.mean, model.model.pooler.norm.mean)
    torch.testing.assert_close(rounded(ids).logits.float(), model(ids).logits, rtol=0.1, atol=0.1)

    build(VARIANTS["local"], {}, "MaskedLM").save_pretrained(tmp_path)
    begun = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, standardize_pooled=True)
    assert begun.model.pooler.norm.seen == 0
    assert not begun.model.pooler.norm.mean.any()
