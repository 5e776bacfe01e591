import pytest
import torch

from efficient_transformers import AttentionPattern, parse_pattern


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("local:1", ["1100", "1110", "0111", "0011"]),
        ("stride:2", ["1010", "0101", "1010", "0101"]),
        ("global:1", ["1111", "1100", "1010", "1001"]),
        ("local:1 | global:1", ["1111", "1110", "1111", "1011"]),
        ("full", ["1111"] * 4),
    ],
)
def test_a_pattern_is_what_it_says(text, rows):
    pattern = parse_pattern(text)
    assert ["".join(str(int(x)) for x in row) for row in pattern.dense(4)[0]] == rows
    causal = parse_pattern(text, causal=True).dense(4)[0]
    assert causal.equal(pattern.dense(4)[0].tril())
    assert pattern.name == text


def test_random_blocks_are_drawn_per_head_without_repetition():
    pattern = parse_pattern("random:3:4", seed=5)
    drawn = pattern.random_blocks(4, 20)
    assert drawn.shape == (4, 20, 3)
    assert all(len(set(row.tolist())) == 3 for head in drawn for row in head)
    assert drawn.min() >= 0
    assert drawn.max() == 19
    assert not drawn[0].equal(drawn[1])
    assert (drawn != torch.arange(20)[:, None]).all(), "the block itself is the window's"
    near = parse_pattern("local:5 | random:3:4").random_blocks(4, 20)
    assert ((near - torch.arange(20)[:, None]).abs() > 2).all()
    assert drawn.equal(parse_pattern("random:3:4", seed=5).random_blocks(4, 20)), "the same seed draws the same"
    assert not drawn.equal(parse_pattern("random:3:4", seed=6).random_blocks(4, 20))
    # each key block is drawn about equally often: 4 heads × 20 rows × 3 of 20 blocks, 12 expected each
    counts = drawn.flatten().bincount(minlength=20).float()
    assert (counts - 12).abs().max() < 5 * 12**0.5


def test_a_causal_draw_does_not_change_when_the_sequence_grows():
    pattern = parse_pattern("random:2:4", causal=True)
    short, long = pattern.random_blocks(2, 5), pattern.random_blocks(2, 50)
    assert long[:, :5].equal(short)
    assert (short < torch.arange(5)[:, None]).all()
    assert short[:, :2].tolist() == [[[-1, -1], [0, -1]]] * 2, (
        "the first block has nothing to draw from, the second one"
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "near:3", "local", "local:x", "local:-1", "stride:0"),
        *("local:3 | local:4", "local:3 | stride:2", "random:1 | stride:2:1"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match=r"pattern|at most one|at least|dilation"):
        parse_pattern(text)


def test_positions_of_global_tokens_are_checked():
    with pytest.raises(ValueError, match="ascending"):
        AttentionPattern(global_tokens=(3, 1))
