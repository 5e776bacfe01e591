"""Equations of the variants whose mixing does not compare tokens: weights are parameters, made of one token, or fixed.

synthesizer · fnet · gmlp · mlp_mixer
"""

import pytest
import torch
from written_out import agree, attention, build, gelu, heads, join, past, positions, softmax, split

from efficient_transformers import VARIANTS

both_directions = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
every_order = pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])


# synthesizer: Tay et al. 2021, sections 3.1 and 3.2 -------------------------------------------------------------------


def scores_of(kind, w, x, config):
    """B (h, n, n) of one kind of synthesizer."""
    length = len(x)
    if kind == "random":
        return w["random_scores"][:, :length, :length]
    if kind == "fixed":
        return w["fixed_scores"][:, :length, :length]
    if kind == "dense":  # W₂ relu(W₁x + b₁), the features of a head by its part of W₁
        hidden = split(w("dense_proj", x), config).clamp(min=0)
        return hidden @ w["dense_weight"][:, :length].transpose(1, 2)
    if kind == "factorized_random":
        return w["row_factors"][:, :length] @ w["column_factors"][:, :length].transpose(1, 2)
    if kind == "factorized_dense":  # a_i[j div c]·b_i[j mod c]
        a, b = (
            split(w(f"{name}_proj", x), config).clamp(min=0) @ w[f"{name}_weight"].transpose(1, 2)
            for name in ("stretch", "period")
        )
        j = torch.arange(length)
        return a[..., j // config.dense_period] * b[..., j % config.dense_period]
    q, k, _ = heads(w, x, config)  # vanilla
    return q @ k.transpose(1, 2) / q.shape[-1] ** 0.5


SYNTHESIZERS = ["random", "fixed", "dense", "factorized_random", "factorized_dense", "vanilla"]
MIXTURES = ["random+vanilla", "dense+random+fixed", "factorized_random+factorized_dense+vanilla"]


@both_directions
@pytest.mark.parametrize("kinds", [*SYNTHESIZERS, *MIXTURES])
def test_synthesizer(kinds, causal):
    """softmax(B)V; a mixture adds scores in shares that a softmax of one parameter each gives."""

    def mix(w, x, config):
        names = kinds.split("+")
        shares = w["mixture"].exp() / w["mixture"].exp().sum() if len(names) > 1 else [1.0]
        scores = sum(share * scores_of(kind, w, x, config) for kind, share in zip(names, shares, strict=True))
        return w("o_proj", join(softmax(scores, past(len(x), config)) @ split(w("v_proj", x), config)))

    fields = {"synthesizer_type": kinds, "factor_rank": 3, "dense_period": 9}
    fields |= {"position_embedding_type": "rotary"} if "vanilla" in kinds else {}
    agree("synthesizer", mix, is_decoder=causal, **fields)


def test_what_a_synthesizer_does_not_compare_it_does_not_have():
    """No queries and keys without `vanilla`, and no training of the fixed scores."""
    assert not {name for name in build("synthesizer").state_dict() if "q_proj" in name or "k_proj" in name}
    fixed = build("synthesizer", synthesizer_type="fixed")
    assert "fixed_scores" not in str([name for name, _ in fixed.named_parameters()])


# fnet: Lee-Thorp et al. 2021, eq. 3 -----------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("projected", [False, True])
def test_fnet(norm_first, projected):
    """Re(F_seq(F_hidden(x))) by the matrices exp(-2πi·jk/n), not normalised; the paper's norms are after the sums."""

    def fourier(n):
        k, j = positions(n)
        return torch.polar(torch.ones(n, n).double(), -2 * torch.pi * (j * k).double() / n)

    def mix(w, x, config):
        return (fourier(len(x)) @ x.to(torch.complex128) @ fourier(x.shape[1])).real

    agree("fnet", mix, norm_first=norm_first, embedding_projection=projected)


def test_fnet_is_post_norm_unless_told_otherwise():
    assert build("fnet").config.norm_first is False


# gmlp: Liu et al. 2021, section 2; the tiny attention of section 4 ----------------------------------------------------


@both_directions
@every_order
@pytest.mark.parametrize("tiny", [None, 5])
def test_gmlp(causal, norm_first, tiny):
    """[Z₁, Z₂] = σ(XU), (Z₁ ⊙ (W·norm(Z₂) + b))V; aMLP adds one head of attention to the gate. No MLP follows."""

    def mix(w, x, config):
        z1, z2 = gelu(w("up_proj", x)).chunk(2, -1)
        n, there = len(x), past(len(x), config)
        weight = w["spatial_weight"][:n, :n] * there
        gate = weight @ w.norm("norm", z2, config.layer_norm_eps) + w["spatial_bias"][:n, None]
        if tiny is not None:
            q, k, v = w("tiny_attention.qkv_proj", x).chunk(3, -1)
            gate = gate + w("tiny_attention.o_proj", attention(q, k, v, there))
        return w("down_proj", z1 * gate)

    agree("gmlp", mix, is_decoder=causal, norm_first=norm_first, tiny_attention_size=tiny)


def test_gmlp_starts_as_an_mlp():
    """Section 2.1: W near zero and b one."""
    config = VARIANTS["gmlp"].config_class(hidden_size=32, max_position_embeddings=64)
    mixer = VARIANTS["gmlp"].model_class(None)(config).layers[0].mixer
    assert mixer.spatial_weight.abs().max() < 0.05
    assert mixer.spatial_bias.eq(1).all()


# mlp_mixer: Tolstikhin et al. 2021, eq. 1 -----------------------------------------------------------------------------


@every_order
def test_mlp_mixer(norm_first):
    """W₂σ(W₁X + b₁) + b₂ over positions, the same for all features; the first rows and columns for a short sequence."""

    def mix(w, x, config):
        n = len(x)
        hidden = gelu(w["reading_weight"][:, :n] @ x + w["reading_bias"][:, None])
        return w["writing_weight"][:n] @ hidden + w["writing_bias"][:n, None]

    agree("mlp_mixer", mix, norm_first=norm_first, token_mixing_size=13)
