"""Attention inside groups that the data has chosen: against loops over tokens, written out again."""

import pytest
import torch
from torch import Tensor
from zoo import bytes_kept

from efficient_transformers.models import ops_bucket_runs
from efficient_transformers.models.attn_bucketed import batched_attention, bucketed_attention
from efficient_transformers.models.attn_dense import softmax_attention
from efficient_transformers.models.ops_buckets import BucketLayout, chained_chunks, recent_counts, sorted_chunks

LENGTHS = [(1, 1), (2, 1), (13, 7), (40, 40), (67, 31)]  # real tokens of two rows


def drawn(longest: int, rounds: int, num_buckets: int, heads: int = 3) -> Tensor:
    return torch.randint(0, num_buckets, (2, heads, rounds, longest))


def tensors(longest: int, heads: int = 3, dim: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, heads, longest, dim, dtype=dtype, requires_grad=True) for _ in range(3)]


def kept(lengths: tuple[int, int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def bucket_counts(buckets: Tensor, lengths: tuple[int, int], chunk: int, causal: bool) -> Tensor:
    """Who reads whom, by the words of the paper: sort, cut into chunks, look one chunk back, within the bucket."""
    counts = torch.zeros(*buckets.shape[:2], buckets.shape[-1], buckets.shape[-1], dtype=torch.long)
    for row, length in enumerate(lengths):
        for head in range(buckets.shape[1]):
            for bucket in buckets[row, head].tolist():
                order = sorted(range(length), key=lambda token, of=bucket: (of[token], token))
                for at, i in enumerate(order):
                    for other, j in enumerate(order):
                        near = at // chunk - other // chunk in (0, 1)
                        if causal:  # the last `chunk` members of the bucket, wherever the chunks begin
                            near = 0 < at - other <= chunk
                        counts[row, head, i, j] += near and bucket[i] == bucket[j] and i != j
            for i in range(length):
                counts[row, head, i, i] = int(counts[row, head, i].sum() == 0)
    return counts


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize(("rounds", "num_buckets", "chunk"), [(1, 4, 8), (3, 2, 7), (2, 30, 4), (2, 1, 16)])
def test_sorted_buckets_read_what_the_paper_says(lengths, causal, rounds, num_buckets, chunk):
    buckets = drawn(max(lengths), rounds, num_buckets)
    layout = sorted_chunks(buckets, kept(lengths), chunk, causal)
    assert layout.counts(max(lengths)).equal(bucket_counts(buckets, lengths, chunk, causal))


@pytest.mark.parametrize("length", [1, 13, 40])
def test_the_causal_rule_without_sorting(length):
    """What a cache computes, over holes: the same counts."""
    buckets, keep = drawn(length, 2, 4), torch.rand(2, length) < 0.7
    positions = (keep.cumsum(1) - 1).masked_fill(~keep, -1)
    counts = recent_counts(buckets, buckets, positions, positions, 5)
    for row in range(2):
        real = keep[row].nonzero().flatten()
        expected = bucket_counts(buckets[row, None][..., real], (len(real),), 5, causal=True)[0]
        assert counts[row][:, real][:, :, real].equal(expected)
        assert counts[row].sum() == expected.sum()


def some_layout(kind: str, lengths: tuple[int, int], causal: bool) -> BucketLayout:
    longest, keep = max(lengths), kept(lengths)
    if kind == "sorted":
        return sorted_chunks(drawn(longest, 3, 4), keep, 8, causal)
    if kind == "chained":
        return chained_chunks(drawn(longest, 2, 4), keep, 8, causal)
    # clusters: other keys than queries, some tokens several times, some never
    draw = [torch.stack([torch.randint(0, n, (3, 4, size)) for n in lengths]) for size in (5, 6)]
    draw = [torch.where(torch.rand(x.shape) < 0.2, -1, x) for x in draw]
    draw[1][..., 0] = 0
    queries = draw[0].sort(-1).values
    queries = torch.where(torch.nn.functional.pad(queries.diff(dim=-1) == 0, (1, 0)), -1, queries)  # once in a group
    taken = torch.zeros(2, 3, longest + 1, dtype=torch.bool).scatter(2, queries.flatten(2) % (longest + 1), True)
    missed = keep[:, None] & ~taken[..., :longest]
    return BucketLayout(queries, keys=draw[1], missed=missed, causal=False)


KINDS = [("sorted", False), ("sorted", True), ("chained", False), ("chained", True), ("clusters", False)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("kind", "causal"), KINDS, ids=str)
@pytest.mark.parametrize("bundle", [1, 500, 2**14, None], ids=["each head alone", "some", "all heads", "batched"])
def test_the_engine_equals_softmax_with_counts(kind, causal, lengths, bundle, monkeypatch):
    monkeypatch.setattr(ops_bucket_runs, "RUN_ENTRIES", 300)  # several runs, one of a single group
    monkeypatch.setattr(ops_bucket_runs, "BUNDLE_SLOTS", bundle)
    layout, (q, k, v) = some_layout(kind, lengths, causal), tensors(max(lengths))
    expected, _ = softmax_attention(q, k, v, layout.counts(max(lengths)))
    if bundle:
        out = bucketed_attention(q, k, v, layout)
    else:
        out = batched_attention(q, k, v, layout, 0.0)
        out = out if layout.missed is None else out + v * layout.missed[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    if kind != "clusters":
        assert (out.abs().amax(-1) > 0).equal(kept(lengths)[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize(("kind", "causal"), KINDS, ids=str)
def test_dropout_has_the_gradient_of_its_own_masks(kind, causal):
    """Along a line, with the same draw each time."""
    layout, (q, k, v) = some_layout(kind, (23, 17), causal), tensors(23)

    def value(step: float) -> Tensor:
        torch.manual_seed(7)
        return (
            bucketed_attention(*(x + step * way for x, way in zip((q, k, v), ways, strict=True)), layout, 0.4) * probe
        ).sum()

    ways, probe = [torch.randn_like(x) for x in (q, k, v)], torch.randn_like(v)
    grads = torch.autograd.grad(value(0.0), (q, k, v))
    slope = sum((g * way).sum() for g, way in zip(grads, ways, strict=True))
    step = 1e-6
    torch.testing.assert_close((value(step) - value(-step)) / (2 * step), slope, rtol=1e-6, atol=1e-6)
    torch.manual_seed(8)
    other = bucketed_attention(q, k, v, layout, 0.4)
    assert not other.equal(bucketed_attention(q, k, v, layout, 0.0))


def test_dropout_keeps_the_mean():
    layout, (q, k, v) = some_layout("sorted", (23, 17), causal=False), tensors(23)
    with torch.no_grad():
        expected = bucketed_attention(q, k, v, layout)
        mean = sum(bucketed_attention(q, k, v, layout, 0.3) for _ in range(2000)) / 2000
    assert (mean - expected).abs().max() < 0.1 < expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "causal"), KINDS, ids=str)
def test_half_precision_stays_within_its_roundings(kind, causal, dtype):
    layout, half = some_layout(kind, (67, 31), causal), tensors(67, dtype=dtype)
    whole = [x.detach().double().requires_grad_() for x in half]
    out, expected = bucketed_attention(*half, layout), bucketed_attention(*whole, layout)
    assert out.dtype == dtype
    grad = torch.randn_like(expected)
    pairs = [(out, expected)]
    pairs += zip(
        torch.autograd.grad(out, half, grad.to(dtype)), torch.autograd.grad(expected, whole, grad), strict=True
    )
    for a, b in pairs:
        budget = 16 * torch.finfo(dtype).eps * b.abs().max().item()
        assert (a.double() - b).abs().max().item() <= budget


def test_memory_for_the_backward_is_a_few_rows_per_token():
    """Not the weights, and not a copy for every round."""
    q, k, v = tensors(4096, dtype=torch.float32)
    layout = sorted_chunks(drawn(4096, 4, 128), None, 64, causal=False)
    assert bytes_kept(lambda: bucketed_attention(q, k, v, layout)) < 5 * q.numel() * q.element_size()
