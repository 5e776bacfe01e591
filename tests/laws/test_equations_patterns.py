"""Equations of the variants whose patterns are drawn by hand: softmax attention over the keys S(i) of each query i.

full · local · stride · global · mixed · longformer · big_bird
"""

import pytest
import torch
from torch import Tensor
from written_out import EXACT, agree, attention, build, encode, heads, join, past, positions, rows, split, turned

both_directions = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
every_position = pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])


@pytest.fixture(autouse=True, params=["dense", "tiled"])
def engine(request, monkeypatch):
    """The engine computes short rows with a dense mask and long ones by tiles: see both."""
    if request.param == "tiled":
        for module in ("attn_pattern_tiled", "attn_pattern"):
            name = f"efficient_transformers.models.{module}.is_short"
            monkeypatch.setattr(name, lambda pattern, *sizes: pattern.is_full)


def over_keys(of_heads):
    """softmax(qkᵀ/√d)v over the keys that `of_heads(n, w, config)` allows, (n, n) or (h, n, n)."""

    def mix(w, x, config):
        counts = of_heads(len(x), w, config) * past(len(x), config)
        return w("o_proj", join(attention(*heads(w, x, config), counts)))

    return mix


def window(length: int, width: int, dilation: int = 1) -> Tensor:
    """|i - j| ≤ width·dilation and dilation | i - j (Beltagy et al. 2020, section 3.1)."""
    i, j = positions(length)
    return ((i - j).abs() <= width * dilation) & ((i - j) % dilation == 0)


def global_ones(length: int, tokens: int) -> Tensor:
    """A token below `tokens` attends to every key and every query attends to it."""
    i, j = positions(length)
    return (i < tokens) | (j < tokens)


def random_ones(length: int, pattern, num_heads: int) -> Tensor:
    """Keys of the blocks that the pattern draws for each block of queries, (h, n, n)."""
    size = pattern.block_size
    table = pattern.random_blocks(num_heads, -(-length // size))
    i, j = positions(length)
    return (table[:, i // size] == j[..., None] // size).any(-1)


# full: Vaswani et al. 2017, eq. 1 ------------------------------------------------------------------------------------


@both_directions
@every_position
def test_full(causal, position):
    def allowed(length, w, config):
        return torch.ones(length, length)

    agree("full", over_keys(allowed), is_decoder=causal, position_embedding_type=position, rope_theta=50.0)


# local: Beltagy et al. 2020, section 3.1, with w counted to one side --------------------------------------------------


@both_directions
def test_local(causal):
    def allowed(length, w, config):
        return window(length, [3, 5][w.layer])

    agree("local", over_keys(allowed), is_decoder=causal, window_size=[3, 5], position_embedding_type="rotary")


# stride: Child et al. 2019, section 4.2; a few hops are a dilated window ----------------------------------------------


@both_directions
@pytest.mark.parametrize("hops", [None, 2])
def test_stride(causal, hops):
    def allowed(length, w, config):
        return window(length, length if hops is None else hops, dilation=3)

    agree("stride", over_keys(allowed), is_decoder=causal, stride=3, hops=hops)


# global: Beltagy et al. 2020, section 3.1; Ainslie et al. 2020, section 3.2 -------------------------------------------


@both_directions
def test_global_internal(causal):
    def allowed(length, w, config):
        return global_ones(length, 2) | torch.eye(length, dtype=torch.bool)

    agree("global", over_keys(allowed), is_decoder=causal, num_global_tokens=2, position_embedding_type="rotary")


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_global_external(position):
    """Learned tokens before the sequence, which the equation's x holds already; they shift rotary positions."""

    def allowed(length, w, config):
        return global_ones(length, 3) | torch.eye(length, dtype=torch.bool)

    fields = {"global_token_type": "external", "num_global_tokens": 3, "position_embedding_type": position}
    agree("global", over_keys(allowed), **fields)


@pytest.mark.parametrize("slug", ["global", "longformer"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_marked_tokens_are_global(slug, implementation):
    """`global_attention_mask` adds to the first tokens, wherever padding is."""
    fields = {"global": {"num_global_tokens": 1}, "longformer": {"num_global_tokens": 1, "attention_window": 4}}[slug]
    model = build(slug, attn_implementation=implementation, **fields)
    ids, mask = rows()
    marks = torch.zeros_like(mask)
    marks[:, [4, 7, 20]] = 1
    padded = model(ids, attention_mask=mask, global_attention_mask=marks).last_hidden_state
    for row, real in enumerate(mask.bool()):
        tokens = {0, *marks[row, real].nonzero()[:, 0].tolist()}
        mix = longformer(tokens, 2) if slug == "longformer" else over_keys(marked(tokens))
        torch.testing.assert_close(padded[row, real], encode(model, ids[row, real], mix), **EXACT)


def marked(tokens: set[int]):
    def allowed(length, w, config):
        is_global = torch.tensor([i in tokens for i in range(length)])
        return is_global[:, None] | is_global | torch.eye(length, dtype=torch.bool)

    return allowed


# mixed: Child et al. 2019, section 4.2, a pattern for each head -------------------------------------------------------


@both_directions
def test_mixed(causal):
    def allowed(length, w, config):
        own = torch.eye(length, dtype=torch.bool)
        drawn = random_ones(length, config.attention_patterns(w.layer)[3], 1)[0]
        near, far = window(length, 3), window(length, 2, dilation=4)
        return torch.stack([near, far, global_ones(length, 2) | own, drawn | own])

    patterns = ["local:3", "stride:4:2", "global:2", "random:2:5"]
    agree("mixed", over_keys(allowed), is_decoder=causal, head_patterns=patterns, position_embedding_type="rotary")


@both_directions
def test_mixed_united_and_tiled(causal):
    """A union is one softmax over both sets; a shorter list repeats over the heads."""

    def allowed(length, w, config):
        i, j = positions(length)
        blocks = ((i // 7 - j // 7).abs() <= 1) | global_ones(length, 1)
        return torch.stack([blocks, torch.ones_like(blocks)] * 2)

    agree("mixed", over_keys(allowed), is_decoder=causal, head_patterns=["blocks:1:7 | global:1", "full"])


# longformer: Beltagy et al. 2020, section 3.1 -------------------------------------------------------------------------


def longformer(tokens: set[int], width: int, dilations: tuple = (1, 1, 1, 1)):
    """Window and global tokens in one softmax; the rows of global tokens by projections of their own."""

    def mix(w, x, config):
        length, q, k, v = len(x), *heads(w, x, config)
        is_global = torch.tensor([i in tokens for i in range(length)])
        near = torch.stack([window(length, width, s) for s in dilations])
        out = attention(q, k, v, near | is_global)
        q, k, v = (split(w(f"global_{name}_proj", x), config) for name in "qkv")
        everything = attention(turned(q, config), turned(k, config), v)
        return w("o_proj", join(everything.where(is_global[:, None], out)))

    return mix


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("tokens", [0, 2])
def test_longformer(position, tokens):
    """The paper's w counts both sides."""
    fields = {"attention_window": 6, "num_global_tokens": tokens, "position_embedding_type": position}
    agree("longformer", longformer(set(range(tokens)), 3), **fields)


def test_longformer_dilated():
    dilations = (1, 2, 3, 2)
    fields = {"attention_window": 4, "num_global_tokens": 1, "attention_dilation": [[1, 2, 3, 2]] * 2}
    agree("longformer", longformer({0}, 2, dilations), **fields)


def test_longformer_causal():
    """A decoder has one set of projections, and global tokens that attend to what precedes them."""

    def allowed(length, w, config):
        return window(length, [2, 4][w.layer]) | global_ones(length, 2)

    fields = {"is_decoder": True, "attention_window": [4, 8], "num_global_tokens": 2}
    agree("longformer", over_keys(allowed), **fields)


@both_directions
def test_longformer_per_head(causal):
    def allowed(length, w, config):
        own = torch.eye(length, dtype=torch.bool)
        kinds = [window(length, 2), window(length, 2, dilation=5), global_ones(length, 1) | own]
        return torch.stack([*kinds, kinds[0]])

    fields = {"head_layout": "per_head", "attention_window": 4, "stride": 5, "num_global_tokens": 1}
    agree("longformer", over_keys(allowed), is_decoder=causal, **fields)


# big_bird: Zaheer et al. 2020, section 2 and appendix D ---------------------------------------------------------------


def in_blocks(length: int, size: int, window: int = 1) -> Tensor:
    i, j = positions(length)
    return (i // size - j // size).abs() <= window


def ends(length: int, size: int) -> Tensor:
    """The first and the last block attend to everything and everything attends to them."""
    block = torch.arange(length) // size
    is_end = (block == 0) | (block == (length - 1) // size)
    return is_end[:, None] | is_end


def test_big_bird():
    def allowed(length, w, config):
        drawn = random_ones(length, config.attention_patterns(w.layer)[0], 4)
        return in_blocks(length, 4) | ends(length, 4) | drawn

    agree("big_bird", over_keys(allowed), block_size=4, num_random_blocks=2, position_embedding_type="rotary")


def test_big_bird_window():
    def allowed(length, w, config):
        return in_blocks(length, 3, window=2) | ends(length, 3)

    agree("big_bird", over_keys(allowed), block_size=3, num_random_blocks=0, num_window_blocks=5)


def test_big_bird_external():
    def allowed(length, w, config):
        drawn = random_ones(length, config.attention_patterns(w.layer)[0], 4)
        return in_blocks(length, 5) | global_ones(length, 3) | drawn

    fields = {"block_size": 5, "global_token_type": "external", "num_global_tokens": 3, "num_random_blocks": 1}
    agree("big_bird", over_keys(allowed), **fields)


def test_big_bird_stored():
    """A stored block adds its keys once more even where the window or a global block holds them already."""

    def counts(length, w, config):
        i, j = positions(length)
        times = (w["random_blocks"][:, i // 4] == j[..., None] // 4).sum(-1)
        block = torch.arange(length) // 4
        is_end = (block == 0) | (block == (length - 1) // 4)
        return (in_blocks(length, 4) | ends(length, 4)) + times * ~is_end[:, None]

    agree("big_bird", over_keys(counts), block_size=4, num_random_blocks=2, random_blocks="stored")


def test_big_bird_per_head():
    def allowed(length, w, config):
        own, drawn = torch.eye(length, dtype=torch.bool), random_ones(length, config.attention_patterns(w.layer)[0], 1)
        return torch.stack([own | drawn[0], in_blocks(length, 4), window(length, 2, dilation=5), ends(length, 4) | own])

    agree("big_bird", over_keys(allowed), block_size=4, head_layout="per_head", stride=5, num_random_blocks=2)


def test_random_blocks_add_to_the_others():
    """Of each head and layer its own: different blocks outside the window and the global ends, as many as asked for."""
    model = build("big_bird", block_size=4, num_random_blocks=3)
    tables = [model.config.attention_patterns(layer)[0].random_blocks(4, 16) for layer in range(2)]
    assert len({tuple(table[head].flatten().tolist()) for table in tables for head in range(4)}) == 8
    for table in tables:
        for head in range(4):
            for block, drawn in enumerate(table[head].tolist()):
                assert len(set(drawn)) == 3
                assert not set(drawn) & {block - 1, block, block + 1, 0, 15}
                assert set(drawn) <= set(range(16))
    assert {block for table in tables for block in table.flatten().tolist()} == set(range(1, 15))
