"""Linformer: full attention where nothing is projected away, sums written out, one matrix where one is shared."""

import pytest
import torch
from zoo import ConfigRefused, build, config, inputs, probed

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.modeling_linformer import LengthProjection

LINFORMER = VARIANTS["linformer"]
SHARING = ["none", "headwise", "key_value", "layerwise"]
LENGTH = 40


def small(sharing, **changes):
    return build(LINFORMER, {"projection_sharing": sharing, "max_position_embeddings": LENGTH, **changes})


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_identity_projections_are_full_attention(sharing, positions):
    """k = N and E = F = 1: the only keys that are not there in full attention are those behind the end, at score 0."""
    fields = {"position_embedding_type": positions}
    model = small(sharing, projected_length=LENGTH, **fields)
    for module in model.modules():
        if isinstance(module, LengthProjection):
            module.weight.data.copy_(torch.eye(LENGTH))
    full = build(VARIANTS["full"], {"max_position_embeddings": LENGTH, **fields})
    report = full.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    assert all("projections" in name or name == "shared.weight" for name in report.unexpected_keys)
    ids = inputs(2, LENGTH)
    torch.testing.assert_close(model(ids).last_hidden_state, full(ids).last_hidden_state, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_mixer_equals_the_paper_token_by_token(sharing, implementation):
    model = small(sharing, projected_length=7)
    model.set_attn_implementation(implementation)
    mixer, hidden, lengths = model.layers[1].mixer, torch.randn(3, 23, 32, dtype=torch.float64), (23, 1, 14)
    keep = torch.arange(23) < torch.tensor(lengths)[:, None]
    out, _ = mixer(hidden, SequenceInfo(keep.cumsum(1) - 1, padding_mask=keep, lengths=lengths, shared=model.shared))
    matrices = [p.weight for p in mixer.projections] or [model.shared.weight]
    for row, length in enumerate(lengths):
        x = hidden[row, :length]
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            q, k, v = (linear(x)[:, part] for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            e, f = (matrix[head % len(matrix), :, :length] for matrix in (matrices[0], matrices[-1]))
            heads.append((q @ (e @ k).T / 8**0.5).softmax(-1) @ (f @ v))
        torch.testing.assert_close(out[row, :length], mixer.o_proj(torch.cat(heads, -1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("sharing", "matrices"), [("none", 2 * 2 * 4), ("headwise", 2 * 2), ("key_value", 2), ("layerwise", 1)]
)
def test_sharing_is_as_many_matrices_as_the_paper_says(sharing, matrices):
    """Section 4, for two layers of four heads; the checkpoint holds no more."""
    model = small(sharing, projected_length=7)
    without = build(VARIANTS["full"], {"max_position_embeddings": LENGTH})
    assert model.num_parameters() - without.num_parameters() == matrices * 7 * LENGTH
    assert sum(p.numel() for p in model.state_dict().values()) == model.num_parameters()


@pytest.mark.parametrize("silent", [0, 1])
def test_every_layer_teaches_a_layerwise_matrix(silent):
    model, ids = small("layerwise", projected_length=7), inputs(2, 30)
    model.layers[silent].mixer.o_proj.weight.data.zero_()
    probed(model(ids).last_hidden_state).backward()
    assert model.shared.weight.grad[..., :30].abs().min() > 0
    assert model.shared.weight.grad[..., 30:].abs().max() == 0


@pytest.mark.parametrize("how", ["reversible", "checkpoints", "reentrant"])
def test_a_layerwise_matrix_gets_its_gradient_from_layers_that_run_twice(how):
    model = small("layerwise", projected_length=7, reversible=how == "reversible").train()
    ids, grads = inputs(2, 30), []
    for twice in (False, True):
        model.zero_grad()
        if twice and how != "reversible":
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        # hidden states are given out by the ordinary stack
        output = model(ids, output_hidden_states=not twice)
        probed(output.last_hidden_state).backward()
        grads.append(model.shared.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_a_decoder_is_refused():
    with pytest.raises(ConfigRefused, match=r"Linformer cannot be causal: .* use et_compressed"):
        config(LINFORMER, {"is_decoder": True})
