"""Equations of the variants without an n×n matrix: sums over keys come before the queries.

efficient · linear · rfa · performer
"""

from itertools import pairwise

import pytest
import torch
from written_out import Weights, agree, build, heads, join, past, softmax, split

both_directions = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
every_position = pytest.mark.parametrize("position", ["learned", "rotary"])


def over_kernel(weights):
    """Σ_j w_ij v_j / Σ_j w_ij with weights (h, n, n) of queries and keys (h, n, d)."""

    def mix(w, x, config):
        q, k, v = heads(w, x, config)
        shares = weights(q, k) * past(len(x), config)
        return w("o_proj", join(shares @ v / shares.sum(-1, keepdim=True)))

    return mix


# efficient: Shen et al. 2018, section 3.2, "softmax normalization" ----------------------------------------------------


@both_directions
@every_position
def test_efficient(causal, position):
    """ρ_q(Q)(ρ_k(K)ᵀV): softmax over the features of a query and over the positions of a feature, without a scale.

    As a decoder, which the paper does not have, over the positions up to the query's.
    """

    def mix(w, x, config):
        q, k, v = heads(w, x, config)
        maps = softmax(k.transpose(-1, -2)[:, None], past(len(x), config)[None, :, None])  # (h, n, f, n)
        features = maps @ v[:, None]  # (h, n, f, d): what each feature attends to, for each query
        return w("o_proj", join((softmax(q)[..., None] * features).sum(2)))

    agree("efficient", mix, is_decoder=causal, position_embedding_type=position)


# linear: Katharopoulos et al. 2020, eq. 4, 5 and 7 --------------------------------------------------------------------


@both_directions
@every_position
def test_linear(causal, position):
    """φ(x) = elu(x) + 1, and elu(x) = x above zero, exp(x) - 1 below; no 1/√d."""

    def phi(x):
        return x.clamp(min=0) + x.clamp(max=0).exp()

    mix = over_kernel(lambda q, k: phi(q) @ phi(k).transpose(-1, -2))
    agree("linear", mix, is_decoder=causal, position_embedding_type=position)


# rfa: Peng et al. 2021, section 3.1 and eq. 6 -------------------------------------------------------------------------


def random_features(w, x, config):
    """φ(q) and φ(k) of vectors of norm 1, w = σ∘w̃, as (h, n, 2D) each; and the values."""
    q, k, v = heads(w, x, config)
    directions = w["scale"] * w["projection"]  # (h, D, d)

    def phi(x):
        angle = x / (x * x).sum(-1, keepdim=True) ** 0.5 @ directions.transpose(-1, -2)
        return torch.cat([angle.sin(), angle.cos()], -1) / directions.shape[1] ** 0.5

    return phi(q), phi(k), v


@both_directions
@every_position
def test_rfa(causal, position):
    """The divisor is at least a tenth of the number of keys, a floor that the paper does not have."""

    def mix(w, x, config):
        q, k, v = random_features(w, x, config)
        there = past(len(x), config).double()
        weights = q @ k.transpose(-1, -2) * there
        total = torch.maximum(weights.sum(-1), 0.1 * there.sum(-1))
        return w("o_proj", join(weights @ v / total[..., None]))

    agree("rfa", mix, is_decoder=causal, num_random_features=11, position_embedding_type=position)


def test_rfa_gated():
    """g_t = sigmoid(w_g·x_t + b_g), S_t = g_t S_{t-1} + (1 - g_t) φ(k_t)v_tᵀ, and z_t likewise: one t at a time."""

    def mix(w, x, config):
        q, k, v = random_features(w, x, config)
        gates, state, total, mass, out = 1 / (1 + (-w("gate_proj", x)).exp()), 0, 0, 0, []
        for t in range(len(x)):
            g = gates[t][:, None]  # (h, 1)
            state = g[..., None] * state + (1 - g)[..., None] * k[:, t, :, None] * v[:, t, None]
            total, mass = g * total + (1 - g) * k[:, t], g * mass + (1 - g)
            divisor = torch.maximum((q[:, t] * total).sum(-1, keepdim=True), 0.1 * mass)
            out.append((q[:, t, :, None] * state).sum(1) / divisor)
        return w("o_proj", torch.stack(out).flatten(1))

    agree("rfa", mix, is_decoder=True, num_random_features=16, gated=True)


def test_rfa_estimates_the_gaussian_kernel():
    """One query, two keys: weights near exp(-‖q - k‖²/2) of vectors of norm 1, so directions are drawn from N(0, I)."""
    model = build("rfa", num_random_features=20000, num_hidden_layers=1, max_position_embeddings=8)
    mixer = model.layers[0].mixer
    mixer.scale.data.fill_(1)
    x = torch.randn(8, 32).double()
    q, k, _ = random_features(Weights(mixer.state_dict()), x, model.config)
    unit = [split(proj(x), model.config) for proj in (mixer.q_proj, mixer.k_proj)]
    unit = [y / y.norm(dim=-1, keepdim=True) for y in unit]
    kernel = (-torch.cdist(*unit).square() / 2).exp()
    torch.testing.assert_close(q @ k.transpose(-1, -2), kernel, rtol=0, atol=0.04)


# performer: Choromanski et al. 2020, lemma 1, sections 2.2 to 2.4 -----------------------------------------------------


@both_directions
@every_position
def test_performer(causal, position):
    """φ(x) = exp(Wx - ‖x‖²/2)/√m of queries and keys over d^(1/4)."""

    def mix(w, x, config):
        def phi(x):
            x = x / x.shape[-1] ** 0.25
            features = x @ w["projection"].transpose(-1, -2) - (x * x).sum(-1, keepdim=True) / 2
            return features.exp() / w["projection"].shape[1] ** 0.5

        return over_kernel(lambda q, k: phi(q) @ phi(k).transpose(-1, -2))(w, x, config)

    agree("performer", mix, is_decoder=causal, num_random_features=20, position_embedding_type=position)


@both_directions
def test_performer_relu(causal):
    """φ(x) = (max(Wx, 0) + 0.001)/√m; the constant is that of the authors' code."""

    def mix(w, x, config):
        def phi(x):
            return (x / x.shape[-1] ** 0.25 @ w["projection"].transpose(-1, -2)).clamp(min=0) + 0.001

        return over_kernel(lambda q, k: phi(q) @ phi(k).transpose(-1, -2))(w, x, config)

    agree("performer", mix, is_decoder=causal, num_random_features=7, kernel="relu")


def test_performer_estimates_softmax():
    """exp(q·k/√d): the projection has the distribution that lemma 1 asks for, and q and k the right scale."""
    model = build("performer", num_random_features=40000, num_hidden_layers=1, initializer_range=0.1, noise=0)
    w, x = Weights(model.layers[0].mixer.state_dict()), torch.randn(8, 32).double()
    q, k, v = heads(w, x, model.config)
    exact = w("o_proj", join(softmax(q @ k.transpose(-1, -2) / 8**0.5) @ v))
    hooked = {}
    model.layers[0].mixer_norm.register_forward_hook(lambda *_: x[None])
    model.layers[0].mixer.register_forward_hook(lambda m, i, out: hooked.update(out=out[0][0]))
    model(torch.ones(1, 8, dtype=torch.long))
    torch.testing.assert_close(hooked["out"], exact, rtol=0, atol=0.05)


# The draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["rfa", "performer"])
def test_projections_are_standard_normal(slug):
    """Entries N(0, 1), in each head and layer others; orthogonal within blocks of d for Performer (section 2.4)."""
    model = build(slug, num_random_features=800)
    first, second = (layer.mixer.projection for layer in model.layers)
    for projection in (*first, *second):  # (800, 8) each
        assert projection.mean().abs() < 0.05
        assert abs(projection.var() - 1) < 0.05
        assert abs(projection.square().sum(-1).var() - 16) < 6  # of χ² with d = 8 degrees of freedom
        blocks = projection.unflatten(0, (-1, 8))
        angles = (blocks @ blocks.transpose(1, 2)).triu(1).abs()
        assert (angles.max() < 1e-5) == (slug == "performer")
    assert not any(torch.allclose(a, b) for a in first for b in second)
    assert not torch.allclose(first[0], first[1])


def test_performer_draws_again_after_the_interval_in_training():
    """Section 4.2: other features after `feature_redraw_interval` passes in training, the same ones in eval."""
    model, ids = build("performer", feature_redraw_interval=2), torch.ones(1, 4, dtype=torch.long)
    seen = []
    for training in (False, False, True, True, True, True):
        model.train(training)(ids)
        seen.append(model.layers[0].mixer.projection.clone())
    changed = [not a.equal(b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, True]
