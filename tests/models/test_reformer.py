"""Reformer: its hashes, transformers' LSH attention given the same rotations, exact attention in one bucket, recall."""

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention
from zoo import build, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models.attn_bucketed import bucketed_attention
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.ops_buckets import chained_chunks, sorted_chunks
from efficient_transformers.models.ops_lsh import assign_buckets, bucket_factors, narrowed, random_rotations

REFORMER = VARIANTS["reformer"]


def rotations_of(heads: int, dim: int, rounds: int, factors: list[int]) -> Tensor:
    return random_rotations(heads, dim, rounds, factors, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("factors", [[8], [2, 6], [4, 2, 2], [1, 8], [1, 1]], ids=str)
def test_a_bucket_is_the_nearest_of_the_directions_and_their_negatives(factors):
    x, rotations = torch.randn(2, 3, 11, 5).double(), rotations_of(3, 5, 4, factors)
    buckets = assign_buckets(x, rotations, factors)
    for row, head, round_, token in torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 11))).tolist():
        expected, value, column = 0, 1, 0
        for factor in factors:
            directions = rotations[head, :, round_, column : column + factor // 2]
            if factor > 1:
                products = x[row, head, token] @ torch.cat([directions, -directions], -1)
                expected += value * int(products.argmax())
            value, column = value * factor, column + factor // 2
        assert buckets[row, head, round_, token] == expected


def test_rows_hash_as_if_alone():
    """Each row has its own number of buckets; more columns than it needs change nothing."""
    x, widest = torch.randn(4, 3, 11, 5).double(), [4, 16]
    rotations = rotations_of(3, 5, 2, widest)
    factors = torch.tensor([[1, 2], [1, 16], [4, 8], [1, 1]])
    together = assign_buckets(x, rotations, widest, factors)
    for row, needed in enumerate(factors.tolist()):
        alone = assign_buckets(x[row, None], narrowed(rotations, widest, needed), needed)
        assert together[row, None].equal(alone)
        assert alone.max() < needed[0] * needed[1]


def test_the_number_of_buckets_is_that_of_transformers():
    for longest, chunk in ((4096, 64), (65536, 32), (1000, 4)):
        for length in (1, chunk - 1, chunk, 2 * chunk, 3 * chunk, longest // 3, longest):
            theirs = LSHSelfAttention(their_config(chunk, None, 1, False, max_position_embeddings=longest))
            limit = 2 * max(int((longest // chunk) ** 0.5), chunk)
            first, second = bucket_factors(torch.tensor([length]), chunk, limit)[0].tolist()
            if length < chunk:
                assert (first, second) == (1, 1)
                continue
            theirs._set_num_buckets(length)
            assert theirs.num_buckets == (second if first == 1 else [first, second])


def their_config(chunk: int, num_buckets, num_hashes: int, causal: bool, **sizes) -> ReformerConfig:
    return ReformerConfig(
        hidden_size=32, num_attention_heads=4, attention_head_size=8, attn_layers=["lsh"], hash_seed=5,
        lsh_attn_chunk_length=chunk, num_buckets=num_buckets, num_hashes=num_hashes, is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0, **sizes,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("length", "chunk", "num_buckets", "num_hashes"),
    [(96, 8, 4, 1), (96, 8, 6, 2), (96, 16, 2, 4), (60, 4, [2, 4], 3), (60, 30, 2, 2), (128, 64, 4, 5)],
)
def test_lsh_attention_equals_that_of_transformers(length, chunk, num_buckets, num_hashes, padded, causal):
    theirs = LSHSelfAttention(their_config(chunk, num_buckets, num_hashes, causal)).double().eval()
    hidden, keep = torch.randn(2, length, 32).double(), torch.ones(2, length, dtype=torch.bool)
    if padded:
        keep[0, length // 2 - 3 :] = keep[1, length - 5 :] = False
    expected = theirs(hidden, attention_mask=keep.long()).hidden_states

    factors = num_buckets if isinstance(num_buckets, list) else [num_buckets]
    torch.manual_seed(5)  # as they do, in the forward pass
    rotations = torch.randn(4, 8, num_hashes, sum(factors) // 2, dtype=torch.float64)
    q, v = (layer(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (theirs.query_key, theirs.value))
    k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    buckets = assign_buckets(q, rotations, factors)
    # their ring holds the chunks of padding, too
    layout = chained_chunks(buckets, keep, chunk, causal, chunks=torch.full((2,), length // chunk))
    out = bucketed_attention(q, k, v, layout).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[keep], expected[keep], rtol=1e-10, atol=1e-10)


def test_the_layer_equals_that_of_transformers_with_its_weights():
    theirs = LSHSelfAttention(their_config(16, [2, 4], 3, False)).double().eval()
    settings = {"num_hashes": 3, "num_buckets": [2, 4], "lsh_chunk_length": 16, "attend_across_buckets": True}
    mixer = build(REFORMER, settings).layers[0].mixer
    hidden = torch.randn(2, 96, 32).double()
    expected = theirs(hidden).hidden_states
    torch.manual_seed(5)
    mixer.rotations = torch.randn(4, 8, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        mixer.q_proj.weight.copy_(theirs.query_key.weight)
        mixer.v_proj.weight.copy_(theirs.value.weight)
        mixer.o_proj.weight.copy_(torch.eye(32))
        for layer in (mixer.q_proj, mixer.v_proj, mixer.o_proj):
            layer.bias.zero_()
    out, _ = mixer(hidden, SequenceInfo(positions=torch.arange(96).expand(2, -1)))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("settings", [{"num_buckets": 1, "lsh_chunk_length": 4}, {"lsh_chunk_length": 64}], ids=str)
def test_one_bucket_is_exact_attention_with_shared_queries_and_keys(settings, causal):
    """Asked for, or because there is less than a chunk; a decoder's buckets do not depend on the length."""
    longest = 63 if causal else 128
    mixer = build(REFORMER, settings, is_decoder=causal, max_position_embeddings=longest).layers[0].mixer
    hidden, length = torch.randn(2, 53, 32).double(), 53
    out, _ = mixer(hidden, SequenceInfo(positions=torch.arange(length).expand(2, -1)))
    q, v = (layer(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (mixer.q_proj, mixer.v_proj))
    scores = q @ (q / (q.square().sum(-1, keepdim=True) + 8e-6).sqrt()).transpose(-1, -2)
    forbidden = torch.eye(length, dtype=torch.bool)
    if causal:
        forbidden = torch.ones(length, length, dtype=torch.bool).triu()
        forbidden[0, 0] = False  # the first token has nothing but itself
    exact = scores.masked_fill(forbidden, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, mixer.o_proj(exact.transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_more_rounds_find_more_of_the_true_top_keys(causal):
    """256 directions with 8 tokens around each: how many of a token's 7 nearest does it read?"""
    centres = torch.nn.functional.normalize(torch.randn(1, 2, 256, 1, 64), dim=-1)
    x = (centres + 0.05 * torch.randn(1, 2, 256, 8, 64)).flatten(2, 3)[:, :, torch.randperm(2048)]
    k = torch.nn.functional.normalize(x, dim=-1)
    scores = (x @ k.transpose(-1, -2)).masked_fill(torch.eye(2048, dtype=torch.bool), -9.0)
    if causal:
        scores = scores.tril()
    nearest = scores.topk(7).indices
    near = scores.gather(-1, nearest) > 0.5  # as a decoder, those that came before
    rotations = random_rotations(2, 64, 16, [64], torch.Generator().manual_seed(1))
    recall = []
    for rounds in (1, 2, 4, 8, 16):
        buckets = assign_buckets(x, rotations[:, :, :rounds], [64])
        counts = sorted_chunks(buckets, None, 64, causal).counts(2048)
        recall.append((counts.gather(-1, nearest)[near] > 0).double().mean().item())
    assert recall == sorted(set(recall))
    assert recall[0] < 0.5
    assert recall[-1] > 0.95


def test_a_decoder_has_the_buckets_of_its_longest_input():
    model = build(REFORMER, {"lsh_chunk_length": 4}, "CausalLM", max_position_embeddings=100)
    assert model.config.widest_factors == (4, 8)  # 2·⌊100 / 4⌋ rounded down, past the limit of 2·⌊√25⌋
    ids = inputs(1, 100)
    torch.testing.assert_close(model(ids[:, :40]).logits, model(ids).logits[:, :40])
