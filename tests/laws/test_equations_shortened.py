"""Equations of the variants whose keys and values are fewer than the tokens.

linformer · compressed
"""

import pytest
import torch
from written_out import agree, attention, build, heads, join, past, positions

both_directions = pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
every_position = pytest.mark.parametrize("position", ["learned", "rotary"])


# linformer: Wang et al. 2020, eq. 7; sharing: section 4 ---------------------------------------------------------------


@every_position
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_linformer(sharing, position):
    """softmax(Q(EK)ᵀ/√d)FV; a shorter sequence takes the first columns of E and F."""

    def mix(w, x, config):
        q, k, v = heads(w, x, config)
        names = {"none": [0, 1], "headwise": [0, 1], "key_value": [0, 0]}
        if sharing == "layerwise":
            e = f = type(w)(w.values)["shared.weight"]
        else:
            e, f = (w[f"projections.{number}.weight"] for number in names[sharing])
        n = len(x)
        return w("o_proj", join(attention(q, e[..., :n] @ k, f[..., :n] @ v)))

    agree("linformer", mix, projection_sharing=sharing, projected_length=7, position_embedding_type=position)


def test_linformer_sharing_is_what_the_paper_counts():
    """Projections of an L-layer model with h heads: 2hL, 2L, L and 1 (section 4)."""
    counts = {}
    for sharing in ("none", "headwise", "key_value", "layerwise"):
        parameters = build("linformer", projection_sharing=sharing, projected_length=7).named_parameters()
        counts[sharing] = sum(p.numel() for name, p in parameters if "projections" in name or "shared" in name) // (
            7 * 64
        )
    assert counts == {"none": 16, "headwise": 4, "key_value": 2, "layerwise": 1}


# compressed: Liu et al. 2018, section 4.2.3 ---------------------------------------------------------------------------


@both_directions
@every_position
@pytest.mark.parametrize("kernel", [None, 3, 4, 8])
def test_compressed(causal, position, kernel):
    """A strided convolution leaves one key and value for each segment of f tokens, and ends with the segment.

    A decoder attends to the segments that end with the query or before it. Layers in turn are local: a query attends
    to its block.
    """
    factor, size = 3, 5

    def shortened(x, weight):
        """k'_s = Σ_t C_t k_{(s+1)f - κ + t} of (h, n, d), zeros outside of the sequence."""
        length, reach = x.shape[1], weight.shape[1]
        out = []
        for segment in range(-(-length // factor)):
            inside = [(t, (segment + 1) * factor - reach + t) for t in range(reach)]
            out.append(sum(x[:, None, at] @ weight[:, t] for t, at in inside if 0 <= at < length))
        return torch.cat(out, 1)

    def mix(w, x, config):
        q, k, v = heads(w, x, config)
        i, j = positions(len(x))
        if w.layer == 1:
            return w("o_proj", join(attention(q, k, v, (i // size == j // size) & past(len(x), config))))
        k, v = (shortened(y, weight) for y, weight in zip((k, v), w["convolution"], strict=True))
        whole = (torch.arange(k.shape[1]) + 1) * factor <= i + 1
        return w("o_proj", join(attention(q, k, v, whole if causal else torch.ones_like(whole))))

    fields = {"attention_layers": ["compressed", "local"], "compression_factor": factor, "block_size": size}
    agree("compressed", mix, is_decoder=causal, kernel_size=kernel, position_embedding_type=position, **fields)


def test_compressed_layers_alternate():
    """The paper's layers are local and compressed in turn, the first one local, and start as means of segments."""
    model = build("compressed", noise=0, num_hidden_layers=4, compression_factor=4)
    assert ["convolution" in dict(layer.mixer.named_parameters()) for layer in model.layers] == [False, True] * 2
    start = model.layers[1].mixer.convolution
    torch.testing.assert_close(start, torch.eye(8).double().expand_as(start) / 4)
