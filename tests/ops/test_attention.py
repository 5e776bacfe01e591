"""The engines against the written-out formula, in float64: values, gradients, masks, lengths that divide nothing."""

import pytest
import torch

from efficient_transformers import parse_pattern
from efficient_transformers.models import attn_pattern_tiled as engine
from efficient_transformers.models.attn_dense import softmax_attention
from efficient_transformers.models.attn_pattern_blocked import blocked_attention
from efficient_transformers.models.attn_pattern_flex import BLOCK, block_mask, flex_pattern_attention
from efficient_transformers.models.ops_engine import BatchRows
from efficient_transformers.models.ops_patterns import rounded_length
from efficient_transformers.models.ops_tile_types import OwnRead
from efficient_transformers.models.ops_tiles import tiles

PATTERNS = [
    "full", "local:0", "local:1", "local:3", "local:70", "local:200", "stride:5", "stride:5:2", "stride:200",
    "global:2", "random:2:8", "random:1:64",
    "local:7 | global:2", "local:7 | global:3 | random:2:8", "stride:3:2 | global:2",
    "blocks:1:8", "blocks:0:7", "blocks:2:16 | ends", "blocks:1:8 | ends | random:2",
]  # fmt: skip
LENGTHS = [None, (131, 0), (1, 131), (67, 130)]
# where the last block begins is not known to a causal model
CASES = [(text, causal) for text in PATTERNS for causal in (False, True) if not (causal and "ends" in text)]
every_pattern = pytest.mark.parametrize(
    ("text", "causal"), CASES, ids=[f"{text}{' causal' * causal}" for text, causal in CASES]
)
MARKED = (0, 5, 17)


def oracle(q, k, v, pattern, lengths, marked):
    batch, heads, length, _ = q.shape
    allowed = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row, real in enumerate(lengths or [length] * batch):
        tokens = tuple(token for token in marked if token < real)
        allowed[row, :, :real, :real] = pattern.with_global(tokens).dense(real, heads)
    return softmax_attention(q, k, v, allowed)[0]


def tiled(q, k, v, pattern, lengths, marked):
    tokens = [marked] * len(q) if marked else None
    return engine.tiled_attention(q, k, v, pattern, BatchRows(lengths=lengths, global_tokens=tokens))


def blocked(q, k, v, pattern, lengths, marked):
    position = torch.arange(q.shape[2])
    keep = None if lengths is None else position < torch.tensor(lengths)[:, None]
    mask = None
    if marked:
        mask = torch.isin(position, torch.tensor(marked)).expand(len(q), -1)
        mask = mask if keep is None else mask & keep
    return blocked_attention(q, k, v, pattern, BatchRows(padding_mask=keep, global_mask=mask))


@every_pattern
@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "empty-row", "one-token", "padded"])
@pytest.mark.parametrize("evaluate", [tiled, blocked], ids=["tiled", "blocked"])
def test_engine_equals_the_dense_formula(evaluate, text, lengths, causal, monkeypatch):
    monkeypatch.setattr(engine, "is_short", lambda pattern, *sizes: pattern.is_full)
    pattern = parse_pattern(text, causal=causal)
    marked = () if causal or pattern.is_full else MARKED
    # (b, n, h, d) memory as a projection leaves it; all sizes differ, so no swapped axis can pass
    q, k, v = (torch.randn(2, 131, 3, 5, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    expected = oracle(q, k, v, pattern, lengths, marked)
    actual = evaluate(q, k, v, pattern, lengths, marked)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), direction)
    for grad, expected_grad in zip(torch.autograd.grad(actual, (q, k, v), direction), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["local:3 | global:2", "blocks:1:8 | ends"])
def test_global_tokens_read_everything_in_every_row(text):
    """Without padding and marks, where the rows of a batch share their global tokens."""
    pattern = parse_pattern(text)
    q, k, v = (torch.randn(2, 67, 3, 5, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    expected = oracle(q, k, v, pattern, None, ())
    torch.testing.assert_close(blocked_attention(q, k, v, pattern, BatchRows()), expected, rtol=1e-12, atol=1e-12)


def test_a_block_of_the_whole_length_is_one_dense_product():
    """A window of 0 blocks still reads its block."""
    pattern = parse_pattern("blocks:0:4096")
    assert engine.is_short(pattern, 4096, 1)
    assert not engine.is_short(parse_pattern("local:0"), 4096, 1)


@every_pattern
def test_a_short_sequence_equals_the_dense_formula(text, causal):
    """As above, through one dense product where that is cheaper."""
    pattern = parse_pattern(text, causal=causal)
    for length in (1, 9, 70):
        assert length > 8 or engine.is_short(pattern, length, 3)
        q, k, v = (torch.randn(2, length, 3, 5, dtype=torch.float64).transpose(1, 2) for _ in range(3))
        for lengths in (None, (length,) * 2, (max(1, length - 2),) * 2):
            actual = engine.tiled_attention(q, k, v, pattern, BatchRows(lengths=lengths))
            torch.testing.assert_close(actual, oracle(q, k, v, pattern, lengths, ()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 129, 300])
def test_tiles_read_each_pair_of_the_pattern_once(length):
    """No key twice in a softmax, none missed: the tiles, painted, are the dense mask."""
    for text, causal in CASES:
        pattern = parse_pattern(text, causal=causal)
        if pattern.is_full:
            continue
        painted = torch.zeros(2, length, length)
        for tile in tiles(pattern, length, 2, torch.float32, torch.device("cpu")):
            for head in tile.heads(2):
                paint(painted, tile, head)
        assert painted.equal(pattern.dense(length, 2).float()), (text, causal)


def paint(painted, tile, head):
    """Count the pairs of a tile in `painted` (h, n, n)."""
    heads, length, _ = painted.shape
    position = torch.arange(length).expand(heads, -1)[..., None].contiguous()
    queries = tile.queries.of(position, head)[..., 0]  # (h or count, size)
    for read in tile.reads:
        keys = read.keys.of(position, head)[..., 0]  # (h or count, m)
        once = torch.ones(*queries.shape, 1 if isinstance(read, OwnRead) else keys.shape[1])
        for patch in read.patches:
            once[..., patch.columns] *= patch.of(head).exp()
        for batch in range(len(queries)):
            where = batch if head is None else head
            if tile.is_global:
                painted[where, queries[batch]] = 0
            columns = keys[batch][:, None] if isinstance(read, OwnRead) else keys[batch].expand(once[batch].shape)
            pairs = torch.zeros(len(columns), length)
            painted[where, queries[batch]] += pairs.scatter_add(1, columns, once[batch].expand(columns.shape))


def test_dropout_is_the_same_in_forward_and_backward():
    """With the seed fixed the function is deterministic, so its gradient must agree with finite differences."""
    pattern = parse_pattern("local:3 | global:2")
    q, k, v = (torch.randn(1, 2, 40, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with_dropout = lambda *x: engine.TiledAttention.apply(*x, [pattern], [37], 0.4, 7)  # noqa: E731
    assert torch.autograd.gradcheck(with_dropout, (q, k, v), fast_mode=True)
    assert not with_dropout(q, k, v).equal(engine.TiledAttention.apply(q, k, v, [pattern], [37], 0.0, 7))


def test_dropout_keeps_the_mean():
    pattern = parse_pattern("local:2")
    q, k, v = (torch.randn(1, 1, 64, 4, dtype=torch.float64) for _ in range(3))
    exact = engine.TiledAttention.apply(q, k, v, [pattern], [64], 0.0, 0)
    drawn = torch.stack([engine.TiledAttention.apply(q, k, v, [pattern], [64], 0.3, seed) for seed in range(800)])
    spread = drawn.std(0) / 800**0.5
    assert ((drawn.mean(0) - exact).abs() < 6 * spread + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "text", ["local:128", "stride:64:2", "global:2", "local:32 | global:2 | random:2", "blocks:1 | ends | random:3"]
)
def test_half_precision_stays_within_its_rounding_budget(text, dtype):
    """At 8,192 tokens: finite, and within 8 roundings of the largest value."""
    pattern = parse_pattern(text)
    q, k, v = (torch.randn(1, 2, 8192, 16).to(dtype).requires_grad_() for _ in range(3))
    actual = engine.tiled_attention(q, k, v, pattern, BatchRows())
    wide = engine.tiled_attention(*(x.detach().double() for x in (q, k, v)), pattern, BatchRows())
    error = (actual.double() - wide).abs().max().item()
    budget = 8 * torch.finfo(dtype).eps * wide.abs().max().item()
    assert error <= budget, f"error {error:.2e} over budget {budget:.2e}"
    actual.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.slow  # compiles a kernel per pattern
@pytest.mark.parametrize("text", ["full", "local:3", "stride:5:2", "global:2", "local:7 | global:2 | random:2:16"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_flex_attention_equals_the_tiles(text, causal):
    pattern = parse_pattern(text, causal=causal)
    q, k, v = (torch.randn(2, 2, 130, 16) for _ in range(3))
    lengths = (130, 77)
    keep = torch.arange(130) < torch.tensor(lengths)[:, None]
    actual = flex_pattern_attention(q, k, v, pattern, BatchRows.of(keep))
    expected = engine.tiled_attention(q, k, v, pattern, BatchRows(lengths=lengths))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_flex_attention_says_that_it_cannot_train_on_a_cpu():
    q = torch.randn(1, 1, 8, 16, requires_grad=True)
    with pytest.raises(ValueError, match="no backward: use attn_implementation='sdpa'"):
        flex_pattern_attention(q, q, q, parse_pattern("local:2"), BatchRows())


LONG = [
    "full", "local:3", "local:300", "stride:5:2", "stride:200:3", "stride:150", "global:2", "blocks:2:50",
    "blocks:0:128", "random:3:300", "local:7 | global:2 | random:2:16", "blocks:1:100 | ends:100 | random:2:100",
]  # fmt: skip


@pytest.mark.parametrize(("text", "causal"), [(x, causal) for x in LONG for causal in {False, "ends" not in x}])
def test_the_blocks_of_flex_attention_hold_what_the_pattern_reads(text, causal):
    pattern, real, heads, length = parse_pattern(text, causal=causal), torch.tensor([640, 300, 1]), 2, 640
    marked = torch.zeros(3, length, dtype=torch.bool)
    marked[1, 200], marked[0, 256:384] = True, True
    for marks in (None, marked):
        mask = block_mask(pattern, heads, length, real, marks, 3)
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (3, heads, length, length)), indexing="ij")
        pairs = mask.mask_mod(b, h, i, j)
        if marks is None:
            for row, tokens in enumerate(real.tolist()):
                assert pairs[row, :, :tokens, :tokens].equal(pattern.dense(tokens, heads))
                assert not pairs[row, :, tokens:].any()
                assert not pairs[row, :, :, tokens:].any()
        blocks = pairs.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4).flatten(4)
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (partial & whole).any()
        assert (partial | whole >= blocks.any(-1)).all()
        assert (whole <= blocks.all(-1)).all()
        if not pattern.num_random_blocks and not pattern.in_blocks:  # of a row without padding no more than needed
            assert (partial | whole)[0].expand(blocks.shape[1:-1]).equal(blocks.any(-1)[0])


def listed(counts, indices):
    """(b, h, c, c) bool of the lists that the kernel reads."""
    there = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), there)


def test_lengths_of_flex_attention_are_few():
    lengths = [rounded_length(n, BLOCK) for n in range(1, 65537)]
    assert all(n <= padded < n * 1.25 + BLOCK for n, padded in enumerate(lengths, start=1))
    assert all(padded % BLOCK == 0 for padded in lengths)
    assert len({*lengths}) < 34
