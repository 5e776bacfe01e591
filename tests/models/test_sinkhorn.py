"""Sinkhorn attention: the normalisation against what defines it, the mixer against loops, the sorting learnt."""

from itertools import permutations
from math import exp, log

import pytest
import torch
from torch.nn import functional as F
from zoo import build, config, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models import attn_sinkhorn as engine
from efficient_transformers.models.attn_sinkhorn import GroupedAttention, joint_softmax
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.modeling_sinkhorn import EtSinkhornAttention
from efficient_transformers.models.ops_sinkhorn import causal_sinkhorn, gumbel_noise, sinkhorn

SINKHORN = VARIANTS["sinkhorn"]


# the normalisation ---------------------------------------------------------------------------------------------------


def test_rows_and_columns_of_real_blocks_sum_to_one():
    scores, keep = torch.randn(3, 2, 9, 9, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [4], [0]])
    order = sinkhorn(scores, 200, 0.75, keep[:, None])
    expected = keep[:, None].double().expand(3, 2, 9)
    torch.testing.assert_close(order.sum(-1), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(order.sum(-2), expected, rtol=0, atol=1e-9)
    assert order[1, :, 4:].abs().max() == order[1, :, :, 4:].abs().max() == order[2].abs().max() == 0
    torch.testing.assert_close(order[1, :, :4, :4], sinkhorn(scores[1, :, :4, :4], 200, 0.75))


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_rows_sum_to_one_after_any_number_of_iterations(iterations):
    scores = torch.randn(6, 6) * 20
    order = sinkhorn(scores, iterations, 0.5)
    torch.testing.assert_close(order.sum(-1), torch.ones(6))
    off_by = (order.sum(0) - 1).abs().max()
    assert iterations == 0 or off_by < (sinkhorn(scores, 0, 0.5).sum(0) - 1).abs().max()


def test_masked_scores_have_no_gradient_and_no_nan():
    scores = torch.randn(2, 5, 5, requires_grad=True)
    keep = torch.tensor([[True, True, True, False, False], [False] * 5])
    (sinkhorn(scores, 4, 0.1, keep) * torch.randn(2, 5, 5)).sum().backward()
    assert scores.grad[0, :3, :3].abs().min() > 0
    assert scores.grad[0, 3:].abs().max() == scores.grad[0, :, 3:].abs().max() == scores.grad[1].abs().max() == 0


def test_a_low_temperature_gives_the_permutation_with_the_largest_sum():
    everyone = torch.tensor(list(permutations(range(6))))
    for seed in range(5):
        scores = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        second, best = scores[torch.arange(6), everyone].sum(1).sort().values[-2:]
        expected = F.one_hot(everyone[scores[torch.arange(6), everyone].sum(1).argmax()], 6).double()
        # where the two differ by a cycle of k blocks, e^(−20/k) of the second one is left
        order = sinkhorn(scores, 2000, (best - second).item() / 20)
        torch.testing.assert_close(order, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("iterations", [0, 1, 8])
def test_a_causal_row_knows_nothing_of_later_ones(iterations):
    scores = (3 * torch.randn(2, 9, 9, dtype=torch.float64)).requires_grad_()
    order = causal_sinkhorn(scores, iterations, 0.75)
    for row in range(9):
        torch.testing.assert_close(order[:, row].sum(-1), torch.full((2,), float(row > 0), dtype=torch.float64))
        assert order[:, row, row:].abs().max() == 0
        grad = torch.autograd.grad(
            order[:, row] @ torch.randn(9).double() @ torch.ones(2).double(), scores, retain_graph=True
        )[0]
        assert grad[:, row + 1 :].abs().sum() == 0
        assert grad[:, :, row:].abs().sum() == 0
        if iterations and row > 2:
            assert (grad[:, 2:row, 0].abs() > 0).all()  # of those before it
        changed = scores.detach().clone()
        changed[:, row + 1 :] = torch.randn(2, 8 - row, 9)
        assert causal_sinkhorn(changed, iterations, 0.75)[:, : row + 1].equal(order[:, : row + 1])


def test_causal_normalisation_balances_and_leaves_a_choice():
    """The numbers in its docstring."""
    equal = torch.zeros(64, 64, dtype=torch.float64)
    for iterations, share in ((0, 0.08), (1, 0.11), (4, 0.27), (8, 0.64), (16, 1.00)):
        assert causal_sinkhorn(equal, iterations, 0.75)[1:].diagonal().mean().item() == pytest.approx(share, abs=0.006)
    wanted = torch.tensor(
        [0, *(int(torch.randint(i, (), generator=torch.Generator().manual_seed(i))) for i in range(1, 64))]
    )
    preferring = equal + 10 * F.one_hot(wanted, 64)
    for iterations, least in ((1, 0.99), (8, 0.8)):
        kept = causal_sinkhorn(preferring, iterations, 0.75).gather(1, wanted[:, None])[2:].mean()
        assert kept > least
    most_read = [causal_sinkhorn(torch.randn(64, 64), n, 0.75).sum(0).max().item() for n in (0, 8)]
    assert most_read[1] < most_read[0] / 1.5


def test_gumbel_noise_has_its_distribution():
    noise = gumbel_noise(torch.empty(200_000, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)  # π²/6


# the mixer -----------------------------------------------------------------------------------------------------------


def one_mixer(**settings) -> EtSinkhornAttention:
    return (
        build(SINKHORN, {"num_hidden_layers": 1, "hidden_size": 12, "num_attention_heads": 3, **settings})
        .layers[0]
        .mixer
    )


def softmax(values: list[float]) -> list[float]:
    powers = [exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def soft_permutation(scores: list[list[float]], iterations: int, causal: bool) -> list[list[float]]:
    """In plain numbers, entry by entry; row i over all columns, or those before it."""
    count = len(scores)
    some = [range(i) if causal else range(count) for i in range(count)]
    rows = [
        dict(zip(some[i], softmax([scores[i][j] for j in some[i]]) if len(some[i]) else [], strict=True))
        for i in range(count)
    ]
    for _ in range(iterations):
        if causal:
            taken = [[1 + sum(rows[k].get(j, 0) for k in range(i)) for j in some[i]] for i in range(count)]
        else:
            taken = [[sum(row[j] for row in rows) for j in some[i]] for i in range(count)]
        rows = [{j: rows[i][j] / by for j, by in zip(some[i], taken[i], strict=True)} for i in range(count)]
        rows = [{j: x / sum(row.values()) for j, x in row.items()} for row in rows]
    return [[row.get(j, 0.0) for j in range(count)] for row in rows]


def by_loops(mixer: EtSinkhornAttention, hidden: torch.Tensor) -> torch.Tensor:
    """One row (n, e) without padding, token by token."""
    cfg, length, dim = mixer.config, len(hidden), mixer.head_dim
    size, causal = cfg.block_size, cfg.is_decoder
    blocks = [range(start, min(start + size, length)) for start in range(0, length, size)]
    q, k, v = (proj(hidden) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    means = torch.stack([hidden[list(block)].mean(0) for block in blocks])
    readers = means
    if causal:
        nothing = torch.zeros_like(hidden[0])
        readers = torch.stack([(hidden[: b[0]].mean(0) if b[0] else nothing) + hidden[b[0]] for b in blocks])
    readers, sources = mixer.sorting_network.reader(readers), mixer.sorting_network.source(means)
    out = torch.zeros_like(hidden)
    for head in range(mixer.num_heads):
        part = slice(head * dim, (head + 1) * dim)
        scores = (readers[:, part] @ sources[:, part].T / dim**0.5 / cfg.sinkhorn_temperature).tolist()
        order = soft_permutation(scores, cfg.sinkhorn_iterations, causal)
        for i in range(length):
            at = i // size
            read = []  # (log weight of the key beside its score, key, value)
            if cfg.sortcut_blocks is None:
                read += [(0.0, k[j, part], v[j, part]) for j in blocks[at] if j <= i or not causal]
            for row in [at] if cfg.sortcut_blocks is None else range(min(cfg.sortcut_blocks, len(blocks))):
                for t in range(size):
                    there = [(order[row][b], block[t]) for b, block in enumerate(blocks) if t < len(block)]
                    mass = sum(weight for weight, _ in there)
                    if mass:
                        mixed = [sum(w * x[j, part] for w, j in there) / mass for x in (k, v)]
                        read.append((log(mass), *mixed))
            weights = softmax([(q[i, part] @ key).item() / dim**0.5 + bias for bias, key, _ in read])
            out[i, part] = sum(w * value for w, (_, _, value) in zip(weights, read, strict=True))
    return mixer.o_proj(out)


KINDS = {"both": {}, "causal": {"is_decoder": True}, "sortcut": {"sortcut_blocks": 2}}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_mixer_equals_loops(kind, block_size, implementation):
    mixer = one_mixer(block_size=block_size, sinkhorn_iterations=3, **KINDS[kind])
    mixer.config._attn_implementation = implementation
    lengths, hidden = [23, 1, 14, 8], torch.randn(4, 23, 12, dtype=torch.float64)
    keep = torch.arange(23) < torch.tensor(lengths)[:, None]
    out, weights = mixer(hidden, SequenceInfo(keep.cumsum(1) - 1, padding_mask=keep, lengths=tuple(lengths)))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], by_loops(mixer, hidden[row, :length]), rtol=1e-10, atol=1e-10)
    assert (weights is None) == (implementation == "sdpa")
    alone, _ = mixer(hidden[:1], SequenceInfo(torch.arange(23)[None]))
    torch.testing.assert_close(alone, out[:1], rtol=1e-12, atol=1e-12)


def test_noise_is_added_in_training_alone():
    hidden, sequence = torch.randn(1, 23, 12, dtype=torch.float64), SequenceInfo(torch.arange(23)[None])
    for noise in (True, False):
        mixer = one_mixer(block_size=4, gumbel_noise=noise)
        expected = mixer(hidden, sequence)[0]
        assert mixer(hidden, sequence)[0].equal(expected)
        assert mixer.train()(hidden, sequence)[0].equal(expected) != noise


def test_a_permutation_is_learnt():
    """Block i has to give out what stands in block π(i); where a block stands is part of its embedding."""
    count, size, permutation = 5, 3, torch.tensor([3, 0, 4, 2, 1])
    fields = {
        "hidden_size": 24,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "block_size": size,
        "initializer_range": 0.2,
    }
    mixer = build(SINKHORN, fields, dtype=torch.float32).layers[0].mixer.train()
    sequence = SequenceInfo(torch.arange(count * size)[None].expand(16, -1))
    place = torch.randn(count, 1, 12)
    optimiser = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    for _ in range(300):
        content = torch.randn(16, count, size, 12)
        hidden = torch.cat([place.expand(16, -1, size, -1), content], -1).flatten(1, 2)
        out = mixer(hidden, sequence)[0].unflatten(1, (count, size))
        loss = F.mse_loss(out[..., 12:], content[:, permutation])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    order = mixer.eval().sort(hidden, None)  # (16, 1, c, c)
    assert order.argmax(-1).equal(permutation.expand(16, 1, count))
    assert order.amax(-1).mean() > 0.9


# the loop with its own backward --------------------------------------------------------------------------------------


def reads_of(groups: int, rows: int, widths: tuple[int, ...]):
    tensors = []
    for width in widths:
        tensors += [torch.randn(groups, width, 4), torch.randn(groups, width, 4), torch.randn(groups, 1, width)]
    tensors[2] = torch.zeros(1, rows, widths[0]).masked_fill(torch.rand(rows, widths[0]) < 0.3, -1e30)
    q, *tensors = (x.double() for x in (torch.randn(groups, rows, 4), *tensors))
    return [q.requires_grad_(), *(x.requires_grad_(x.shape[0] == groups) for x in tensors)]


@pytest.mark.parametrize("widths", [(5,), (5, 3)])
@pytest.mark.parametrize("entries", [1, 20, 2**19], ids=["rows", "groups", "whole"])
def test_runs_equal_one_softmax(widths, entries, monkeypatch):
    monkeypatch.setattr(engine, "RUN_ENTRIES", entries)
    q, *tensors = reads_of(3, 4, widths)
    out = GroupedAttention.apply(q, 0.0, 0, *tensors)
    reads = [tensors[start : start + 3] for start in range(0, len(tensors), 3)]
    parts = joint_softmax(q, [(k, bias) for k, _, bias in reads]).split(widths, -1)
    expected = sum(part @ v for part, (_, v, _) in zip(parts, reads, strict=True))
    torch.testing.assert_close(out, expected)
    leaves, probe = [x for x in (q, *tensors) if x.requires_grad], torch.randn_like(out)
    grads = [torch.autograd.grad((x * probe).sum(), leaves, retain_graph=True) for x in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("entries", [20, 2**19])
def test_dropout_is_the_same_in_forward_and_backward(entries, monkeypatch):
    monkeypatch.setattr(engine, "RUN_ENTRIES", entries)
    q, *tensors = reads_of(2, 3, (4, 3))
    assert torch.autograd.gradcheck(lambda q, *tensors: GroupedAttention.apply(q, 0.4, 7, *tensors), (q, *tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_the_mean(kind):
    mixer = one_mixer(block_size=4, attention_probs_dropout_prob=0.3, gumbel_noise=False, **KINDS[kind])
    hidden = torch.randn(1, 23, 12, dtype=torch.float64).expand(4000, -1, -1)
    sequence = SequenceInfo(torch.arange(23)[None].expand(4000, -1))
    with torch.no_grad():
        expected = mixer(hidden[:1], SequenceInfo(torch.arange(23)[None]))[0]
        dropped = mixer.train()(hidden, sequence)[0]
    assert (dropped - expected).abs().mean() > 0.05
    error = (dropped.mean(0) - expected[0]).abs() / dropped.std(0)
    assert error.max() < 5 / 4000**0.5  # standard errors


# the cache -----------------------------------------------------------------------------------------------------------


def test_a_block_is_sorted_once_in_generation():
    model = build(SINKHORN, {"block_size": 5, "num_hidden_layers": 1}, "CausalLM")
    calls, mixer = [], model.model.layers[0].mixer
    mixer.sorting_network.register_forward_hook(lambda *_: calls.append(1))
    cache = None
    with torch.no_grad():
        for length in (7, *[1] * 13):  # tokens 7 to 19: the rest of the block at 5, and two more
            cache = model(inputs(2, length), past_key_values=cache).past_key_values
    assert len(calls) == 1 + 1 + 2  # the prompt, its block for the first token behind it, and two new blocks


def test_a_gradient_goes_through_the_cache():
    model = build(SINKHORN, {"block_size": 4}, "CausalLM")
    embeds = model.get_input_embeddings()(inputs(1, 19)).detach().requires_grad_()
    whole = model(inputs_embeds=embeds, use_cache=False).logits[:, 10:].square().sum()
    cache, loss = model(inputs_embeds=embeds[:, :10], use_cache=True).past_key_values, 0
    for start, stop in ((10, 16), (16, 17), (17, 18), (18, 19)):
        loss = loss + model(inputs_embeds=embeds[:, start:stop], past_key_values=cache).logits.square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, embeds)[0] for x in (whole, loss)))


def test_a_decoder_with_sortcut_is_refused():
    with pytest.raises(ValueError, match=r"sortcut_blocks \(2\) cannot be causal.*set sortcut_blocks=None"):
        SINKHORN.model_class("CausalLM")(config(SINKHORN, {"sortcut_blocks": 2}))
