"""Equations of the variants that attend to tokens chosen by the data.

reformer · routing · sinkhorn
"""

import pytest
import torch
from written_out import (
    EXACT,
    Weights,
    agree,
    attention,
    build,
    encode,
    heads,
    join,
    past,
    positions,
    rows,
    softmax,
    split,
    turned,
)

both_directions = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
every_position = pytest.mark.parametrize("position", ["learned", "rotary"])


def itself_if_alone(counts):
    """A query that has nothing to attend to attends to itself."""
    return counts + torch.diag_embed((counts.sum(-1) == 0).long())


# reformer: Kitaev et al. 2020, section 2 and appendix A ---------------------------------------------------------------


def hashed(x, rotations, buckets: int):
    """h(x) = argmax [xR; -xR] of one round, (h, n), with the first buckets / 2 columns of R."""
    rotated = x @ rotations[:, :, : buckets // 2]
    return torch.cat([rotated, -rotated], -1).argmax(-1)


def chunk_of(bucket, size: int):
    """Number of the chunk of each token (h, n), once they are sorted by bucket and then by position."""
    length = bucket.shape[-1]
    place = (bucket * length + torch.arange(length)).argsort(-1).argsort(-1)
    return place // size


def recent_members(bucket, reach: int):
    """(h, n, n), True at the last `reach` tokens of the same bucket before each token."""
    i, j = positions(bucket.shape[-1])
    same = (bucket[..., :, None] == bucket[..., None, :]) & (j < i)
    later = torch.stack([same[..., number:].sum(-1) for number in range(same.shape[-1])], -1)  # from j on
    return same & (later <= reach)


def lsh_attention(w, x, config, counts):
    """Keys are queries of norm 1, scores are not scaled again (section 2, "shared-QK"); `counts` adds up the rounds."""
    q, v = turned(split(w("q_proj", x), config), config), split(w("v_proj", x), config)
    k = q / ((q * q).sum(-1, keepdim=True) + q.shape[-1] * 1e-6) ** 0.5
    weights = softmax(q @ k.transpose(1, 2), itself_if_alone(counts(q)))
    return w("o_proj", join(weights @ v))


@both_directions
@every_position
def test_reformer(causal, position):
    """Twice as many buckets as chunks, rounded down to a power of two; a token sees its chunk and the one before it.

    Each round adds its sum to numerator and normaliser, so a pair counts once for each round in which it meets. A
    decoder attends to the last c tokens of its bucket, and its number of buckets is that of the longest sequence.
    """
    size = 5

    def mix(w, x, config):
        chunks = (config.max_position_embeddings if causal else len(x)) // size
        buckets = 2 ** ((2 * chunks).bit_length() - 1) if chunks else 1
        i, j = positions(len(x))

        def counts(q):
            total = torch.zeros(len(q), len(x), len(x), dtype=torch.long)
            for number in range(3):
                bucket = hashed(q, w["rotations"][:, :, number], buckets) if buckets > 1 else total[..., 0]
                if causal:
                    total = total + recent_members(bucket, size)
                    continue
                chunk, same = chunk_of(bucket, size), bucket[..., :, None] == bucket[..., None, :]
                behind = chunk[..., :, None] - chunk[..., None, :]
                total = total + (same & ((behind == 0) | (behind == 1)) & (i != j))
            return total

        return lsh_attention(w, x, config, counts)

    fields = {"lsh_chunk_length": size, "num_hashes": 3, "position_embedding_type": position}
    agree("reformer", mix, is_decoder=causal, max_position_embeddings=33, **fields)


@both_directions
def test_reformer_with_two_hashes_for_a_bucket(causal):
    """A number of buckets [a, b] takes two hashes, of which the first is the digit that counts least."""

    def mix(w, x, config):
        i, j = positions(len(x))

        def counts(q):
            first = hashed(q, w["rotations"][:, :, 0, :1], 2)
            bucket = first + 2 * hashed(q, w["rotations"][:, :, 0, 1:], 4)
            if causal:
                return recent_members(bucket, 3).long()
            chunk, same = chunk_of(bucket, 3), bucket[..., :, None] == bucket[..., None, :]
            behind = chunk[..., :, None] - chunk[..., None, :]
            return (same & ((behind == 0) | (behind == 1)) & (i != j)).long()

        return lsh_attention(w, x, config, counts)

    fields = {"lsh_chunk_length": 3, "num_hashes": 1, "num_buckets": [2, 4], "reversible": False}
    agree("reformer", mix, is_decoder=causal, **fields)


@both_directions
def test_reformer_with_one_bucket(causal):
    """Exact attention to every other token."""

    def mix(w, x, config):
        i, j = positions(len(x))
        return lsh_attention(w, x, config, lambda q: ((i != j) & past(len(x), config)).long().expand(len(q), -1, -1))

    agree("reformer", mix, is_decoder=causal, num_buckets=1)


def test_reformer_across_buckets():
    """Chunks of all rounds in a ring, whatever the bucket, as in transformers' Reformer."""

    def mix(w, x, config):
        i, j = positions(len(x))
        last = (len(x) - 1) // 5

        def counts(q):
            chunks = [chunk_of(hashed(q, w["rotations"][:, :, number], 4), 5) for number in range(2)]
            total = torch.zeros(len(q), len(x), len(x), dtype=torch.long)
            for chunk, round_before in zip(chunks, [chunks[1], chunks[0]], strict=True):
                own = chunk[..., :, None]
                total = total + ((own == chunk[..., None, :]) & (i != j))
                total = total + ((own > 0) & (own - 1 == chunk[..., None, :]))
                if last:
                    total = total + ((own == 0) & (round_before[..., None, :] == last) & (i != j))
            return total

        return lsh_attention(w, x, config, counts)

    agree("reformer", mix, attend_across_buckets=True, num_buckets=4, num_hashes=2, lsh_chunk_length=5)


def test_reformer_is_reversible_unless_told_otherwise():
    """Section 3; and the rotations of each layer, head and round are others, entries N(0, 1)."""
    model = build("reformer", lsh_chunk_length=2, num_hashes=8)
    assert model.config.reversible is True
    rotations = torch.cat([layer.mixer.rotations.flatten() for layer in model.layers])
    assert abs(rotations.mean()) < 0.05
    assert abs(rotations.var() - 1) < 0.1
    assert len(rotations.unique()) == len(rotations)


def test_keys_of_a_reformer_near_zero():
    """The epsilon of the norm is 1e-6, under the root of the mean square."""

    def mix(w, x, config):
        i, j = positions(len(x))
        return lsh_attention(w, x, config, lambda q: (i != j).long().expand(len(q), -1, -1))

    model = build("reformer", num_buckets=1, num_hidden_layers=1)
    mixer = model.layers[0].mixer
    for parameter in mixer.q_proj.parameters():
        parameter.data *= 1e-3
    out, x = {}, torch.randn(1, 9, 32).double()
    model.layers[0].mixer_norm.register_forward_hook(lambda *_: x)
    mixer.register_forward_hook(lambda m, i, o: out.update(it=o[0][0]))
    model(torch.ones(1, 9, dtype=torch.long))
    torch.testing.assert_close(out["it"], mix(Weights(mixer.state_dict()), x[0], model.config), rtol=1e-9, atol=1e-12)


# routing: Roy et al. 2020, section 4.1 --------------------------------------------------------------------------------


def directions(x):
    """Vectors of length √d."""
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1]) ** 0.5


def nearest(x, centroids, size: int):
    """(h, k, n), True at the `size` tokens nearest to each centroid."""
    cosine = centroids @ x.transpose(1, 2)
    return cosine >= cosine.topk(min(size, x.shape[1]), -1).values[..., -1:]


@both_directions
@every_position
@pytest.mark.parametrize("size", [None, 6])
def test_routing(causal, position, size):
    """Local heads attend to a window; of the others each centroid takes the n/k nearest queries and keys.

    Rotary positions are applied after the choice. As a decoder queries are keys too, and a token attends to the last
    w tokens of its cluster before it.
    """
    local, clusters = 1, 4

    def mix(w, x, config):
        length, q, v = len(x), split(w("q_proj", x), config), split(w("v_proj", x), config)
        own = w("k_proj", x).unflatten(-1, (-1, 8)).transpose(0, 1)  # of a decoder's local heads alone
        far_q = directions(q[local:])
        far_k = far_q if causal else directions(own[local:])
        if causal:
            bucket = (far_q @ w["centroids"].transpose(1, 2)).argmax(-1)
            counts = recent_members(bucket, size or -(-config.max_position_embeddings // clusters)).long()
        else:
            taken = [nearest(y, w["centroids"], size or -(-length // clusters)).double() for y in (far_q, far_k)]
            counts = (taken[0].transpose(1, 2) @ taken[1]).long()
        i, j = positions(length)
        q, own, far_q, far_k = (turned(y, config) for y in (q, own, far_q, far_k))
        near = attention(q[:local], own[:local], v[:local], ((i - j).abs() <= 3) & past(length, config))
        far = attention(far_q, far_k, v[local:], itself_if_alone(counts))
        return w("o_proj", join(torch.cat([near, far])))

    fields = {"local_heads": local, "num_clusters": clusters, "cluster_size": size, "window_size": 3}
    agree("routing", mix, is_decoder=causal, position_embedding_type=position, **fields)


@both_directions
def test_routing_centroids_follow_their_members(causal):
    """m ← λm + (1 - λ)Σx over the queries and keys nearest to a centroid, μ = m/‖m‖; and not in eval."""
    fields = {"num_clusters": 2, "local_heads": 0, "num_hidden_layers": 1, "ema_decay": 0.6}
    model = build("routing", is_decoder=causal, noise=0, **fields)
    ids = rows()[0]
    mixer, inputs = model.layers[0].mixer, []
    mixer.register_forward_hook(lambda m, args, out: inputs.append(args[0].detach()))
    sums, means = torch.zeros(4, 2, 8).double(), mixer.centroids.clone()
    for training in (True, True, False, True):
        model.train(training)(ids)
        x = inputs[-1].flatten(0, 1)
        members = [
            split(proj(x), model.config) for proj in ([mixer.q_proj] if causal else [mixer.q_proj, mixer.k_proj])
        ]
        members = [y / y.norm(dim=-1, keepdim=True) for y in members]
        if training:
            found = torch.zeros_like(sums)
            for y in members:
                of = torch.nn.functional.one_hot((y @ means.transpose(1, 2)).argmax(-1), 2).double()
                found += of.transpose(1, 2) @ y
            sums = 0.6 * sums + 0.4 * found
            means = sums / sums.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(mixer.centroids, means)
        torch.testing.assert_close(mixer.sums, sums)


def test_routing_defaults():
    """Half of the heads are local, and there are about √n clusters (section 4.1)."""
    config = build("routing", max_position_embeddings=256).config
    assert (config.num_local_heads, config.clusters_per_head, config.ema_decay) == (2, 16, 0.999)


# sinkhorn: Tay et al. 2020, sections 3.1 to 3.4 -----------------------------------------------------------------------


def in_blocks(x, size: int):
    """(…, n, d) -> (…, c, s, d), zeros after the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def scores_of_blocks(w, readers, sources, config):
    """f(x)g(x)ᵀ/√d, (h, c, c), where f and g are two linear layers with a relu between them."""
    f, g = (
        split(w(f"sorting_network.{name}.2", w(f"sorting_network.{name}.0", y).clamp(min=0)), config)
        for name, y in (("reader", readers), ("source", sources))
    )
    return f @ g.transpose(1, 2) / f.shape[-1] ** 0.5


def balanced(scores, iterations: int):
    """exp(scores), rows and columns normalised in turn, the rows once more at the end."""
    order = scores.exp()
    for _ in range(iterations):
        order = order / order.sum(-1, keepdim=True)
        order = order / order.sum(-2, keepdim=True)
    return order / order.sum(-1, keepdim=True)


def balanced_causally(scores, iterations: int):
    """Row i mixes blocks before it; a column is divided by one plus what earlier rows have taken of it."""
    before = torch.ones_like(scores).tril(-1)
    order = scores.exp() * before
    for _ in range(iterations):
        taken = order / order.sum(-1, keepdim=True).clamp(min=1e-300)
        order = order / (1 + taken.cumsum(-2) - taken)
    return order / order.sum(-1, keepdim=True).clamp(min=1e-300)


def sorting(causal: bool, size: int, iterations: int, temperature: float, sortcut: int | None = None, noise=None):
    """Each query attends to its own block and to the sorted block in its place, in one softmax (eq. 4 and 5).

    A sorted token that is there in part, because the last block is short, weighs as much as that part. With `sortcut`
    all queries attend to the first sorted blocks and to nothing else (section 3.4).
    """

    def mix(w, x, config):
        length, (q, k, v) = len(x), heads(w, x, config)
        blocks, real = in_blocks(x, size), in_blocks(torch.ones(length, 1).double(), size)[..., 0]  # (c, s)
        count = len(blocks)
        if causal:
            sums = blocks.sum(1)
            earlier = (sums.cumsum(0) - sums) / (size * torch.arange(count).clamp(min=1))[:, None]
            scores = scores_of_blocks(w, earlier + blocks[:, 0], sums / size, config)
        else:
            means = blocks.sum(1) / real.sum(1, keepdim=True)
            scores = scores_of_blocks(w, means, means, config)
        if noise is not None:
            scores = scores + noise(scores)
        order = (balanced_causally if causal else balanced)(scores / temperature, iterations)
        real = torch.ones_like(real) if causal else real  # an earlier block is whole
        mass = order @ real  # (h, c, s)
        divisor = mass.clamp(min=1e-300)[..., None]
        sorted_k, sorted_v = (
            torch.einsum("hij,hjsd->hisd", order, in_blocks(y, size)) / divisor for y in (k, v)
        )  # (h, c, s, d)
        if sortcut is not None:
            some = [y[:, :sortcut].flatten(1, 2) for y in (sorted_k, sorted_v)]
            return w("o_proj", join(attention(q, *some, mass[:, :sortcut].flatten(1)[:, None])))
        out = []
        for i in range(length):
            block, token = i // size, i % size
            stop = token + 1 if causal else size
            own = slice(block * size, min(block * size + stop, length))
            keys, values = (torch.cat([y[:, own], z[:, block]], 1) for y, z in ((k, sorted_k), (v, sorted_v)))
            there = torch.cat([torch.ones_like(k[:, own, 0]), mass[:, block]], 1)
            out.append(attention(q[:, i, None], keys, values, there[:, None]))
        return w("o_proj", join(torch.cat(out, 1)))

    return mix


@both_directions
@every_position
@pytest.mark.parametrize("iterations", [0, 3])
def test_sinkhorn(causal, position, iterations):
    fields = {"block_size": 4, "sinkhorn_iterations": iterations, "sinkhorn_temperature": 0.6}
    fields["gumbel_noise"] = False  # in training
    mix = sorting(causal, 4, iterations, 0.6)
    agree("sinkhorn", mix, is_decoder=causal, position_embedding_type=position, norm_first=causal, **fields)


def test_sinkhorn_sortcut():
    fields = {"block_size": 4, "sinkhorn_iterations": 2, "sinkhorn_temperature": 1.5, "sortcut_blocks": 2}
    fields["gumbel_noise"] = False
    agree("sinkhorn", sorting(False, 4, 2, 1.5, sortcut=2), **fields)


@both_directions
@pytest.mark.parametrize("noisy", [True, False])
def test_sinkhorn_noise_in_training(causal, noisy, monkeypatch):
    """Gumbel noise -log(-log U) is added before the division by the temperature; -log U is exponential."""

    def drawn(x, lambd=1):
        assert lambd == 1
        return x.copy_(torch.arange(1.0, x.numel() + 1).view_as(x).cos().square() + 0.01)

    monkeypatch.setattr(torch.Tensor, "exponential_", drawn)
    fields = {"block_size": 4, "sinkhorn_iterations": 2, "sinkhorn_temperature": 0.6, "gumbel_noise": noisy}
    fields["hidden_dropout_prob"] = 0.0
    model, ids = build("sinkhorn", is_decoder=causal, **fields), rows()[0][:1]
    noise = (lambda scores: -drawn(torch.empty_like(scores)).log()) if noisy else None
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        for training in (True, False):
            mix = sorting(causal, 4, 2, 0.6, noise=noise if training else None)
            out = model.train(training)(ids).last_hidden_state[0]
            torch.testing.assert_close(out, encode(model, ids[0], mix), **EXACT)
