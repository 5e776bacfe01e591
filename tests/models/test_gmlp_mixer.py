"""gMLP and MLP-Mixer: their formulas, how they begin, what they learn, what they refuse."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from zoo import ConfigRefused, build, config, counted_flops, inputs

from efficient_transformers import VARIANTS, costs
from efficient_transformers.conversion import convert
from efficient_transformers.models import ops_tril_matmul
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.ops_tril_matmul import triangular_product

GMLP, MIXER = VARIANTS["gmlp"], VARIANTS["mlp_mixer"]
both = pytest.mark.parametrize("variant", [GMLP, MIXER], ids=lambda variant: variant.slug)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(ops_tril_matmul, "ROWS", 5)


# the triangle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 23])
def test_the_triangular_product_is_the_product_with_a_triangle(length, few_rows):
    weight, x = torch.randn(length, length).double(), torch.randn(3, length, 4).double()
    weight, x, gradient = weight.requires_grad_(), x.requires_grad_(), torch.randn(3, length, 4).double()
    actual, expected = triangular_product(weight, x), weight.tril() @ x
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(y, (weight, x), gradient) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_stands_above_the_diagonal_is_not_read(few_rows):
    weight, x = torch.randn(23, 23), torch.randn(1, 23, 4)
    above = torch.ones_like(weight).triu(1).bool()
    assert triangular_product(weight.masked_fill(above, torch.nan), x).equal(triangular_product(weight, x))


def test_a_causal_gate_is_half_the_work(few_rows):
    model = build(GMLP, {}, dtype=torch.float32, is_decoder=True, use_cache=False)
    assert counted_flops(model, 61) == costs.forward_flops(model, 61)
    both_ways = costs.attention_flops(config(GMLP, {}), 61)
    assert 0.5 < costs.attention_flops(model.config, 61) / both_ways < 0.56


def test_a_causal_gate_trains_under_autocast(few_rows):
    model = build(GMLP, {"tiny_attention_size": 11}, "CausalLM", dtype=torch.float32, initializer_range=0.1).train()
    ids, grads = inputs(2, 40), []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad.flatten() for p in model.parameters()])
    assert {grad.dtype for grad in grads[1]} == {torch.float32}
    assert F.cosine_similarity(*map(torch.cat, grads), dim=0) > 0.98


# formulas ------------------------------------------------------------------------------------------------------------


def mixer_of(variant, length=12, **fields):
    """One mixer in float64 with random weights and biases, for sequences up to `length` tokens."""
    model = build(variant, fields, num_hidden_layers=1, max_position_embeddings=length)
    mixer = model.layers[0].mixer
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def sequence_of(keep):
    return SequenceInfo(
        torch.where(keep, keep.cumsum(1) - 1, -1), padding_mask=keep, lengths=tuple(keep.sum(1).tolist())
    )


@pytest.mark.parametrize("size", [None, 7], ids=["gMLP", "aMLP"])
@pytest.mark.parametrize("decoder", [False, True], ids=["both", "causal"])
def test_gmlp_is_its_formula(size, decoder, few_rows):
    """The pseudocode of the paper (its figures 1 and 6), one sequence at a time."""
    mixer = mixer_of(GMLP, tiny_attention_size=size, is_decoder=decoder)
    hidden, keep = torch.randn(3, 11, 32).double(), torch.arange(11) < torch.tensor([11, 6, 1])[:, None]
    actual = mixer(hidden, sequence_of(keep))[0]
    for x, real, y in zip(hidden, keep, actual, strict=True):
        x, n = x[real], int(real.sum())
        u, v = F.gelu(F.linear(x, mixer.up_proj.weight, mixer.up_proj.bias)).chunk(2, -1)
        v = F.layer_norm(v, v.shape[-1:], mixer.norm.weight, mixer.norm.bias, 1e-12)
        weight = mixer.spatial_weight[:n, :n]
        allowed = torch.ones(n, n, dtype=torch.bool)
        if decoder:
            weight, allowed = weight.tril(), allowed.tril()
        gate = torch.einsum("nm,mf->nf", weight, v) + mixer.spatial_bias[:n, None]
        if size is not None:
            tiny = mixer.tiny_attention
            q, k, v = F.linear(x, tiny.qkv_proj.weight, tiny.qkv_proj.bias).chunk(3, -1)
            scores = (torch.einsum("nd,md->nm", q, k) / size**0.5).masked_fill(~allowed, -torch.inf)
            gate = gate + F.linear(scores.softmax(-1) @ v, tiny.o_proj.weight, tiny.o_proj.bias)
        torch.testing.assert_close(y[real], F.linear(u * gate, mixer.down_proj.weight, mixer.down_proj.bias))


def test_mixer_is_its_formula():
    """W₂ σ(W₁ X) of equation 1 with the biases of its MLP, one sequence and one feature at a time."""
    mixer = mixer_of(MIXER, token_mixing_size=7)
    hidden, keep = torch.randn(3, 11, 32).double(), torch.arange(11) < torch.tensor([11, 6, 1])[:, None]
    actual = mixer(hidden, sequence_of(keep))[0]
    for x, real, y in zip(hidden, keep, actual, strict=True):
        n = int(real.sum())
        for feature in (0, 31):
            read = F.gelu(F.linear(x[:n, feature], mixer.reading_weight[:, :n], mixer.reading_bias))
            expected = F.linear(read, mixer.writing_weight[:n], mixer.writing_bias[:n])
            torch.testing.assert_close(y[:n, feature], expected)


def test_a_gmlp_block_has_no_mlp_of_its_own():
    block = build(GMLP, {}).layers[0]
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"mixer", "mixer_norm"}


# how they begin, what they learn -------------------------------------------------------------------------------------


def jacobian(mixer, hidden):
    """(n, n): how much output i moves with input j, over all features."""
    keep = torch.ones(1, len(hidden), dtype=torch.bool)
    rows = torch.autograd.functional.jacobian(lambda x: x + mixer(x[None], sequence_of(keep))[0][0], hidden)
    return rows.square().sum((1, 3)).sqrt()


@both
def test_at_first_each_position_reads_itself(variant):
    mixer = build(variant, {}, num_hidden_layers=1, initializer_range=0.02).layers[0].mixer
    matrix = jacobian(mixer, torch.randn(20, 32).double())
    own = matrix.diagonal()
    assert (matrix - own.diag()).max() < 0.02 * own.min()
    assert own.min() > 3


@both
def test_the_planted_permutation_is_learned(variant):
    """Position i has to give what stands at position π(i)."""
    length, permutation = 12, torch.randperm(12)
    fields = {"token_mixing_size": 48} if variant is MIXER else {"intermediate_size": 128}
    model = build(variant, fields, num_hidden_layers=1, max_position_embeddings=length, initializer_range=0.02)
    block = model.layers[0].float()
    optimiser = torch.optim.Adam(block.parameters(), lr=1e-2)
    everything = sequence_of(torch.ones(64, length, dtype=torch.bool))
    losses = []
    for _ in range(300):
        hidden = torch.randn(64, length, 32)
        loss = F.mse_loss(block(hidden, everything)[0], hidden[:, permutation])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    hidden = torch.randn(length, 32)
    one = sequence_of(torch.ones(1, length, dtype=torch.bool))
    rows = torch.autograd.functional.jacobian(lambda x: block(x[None], one)[0][0], hidden)
    assert rows.square().sum((1, 3)).argmax(1).equal(permutation)


@both
def test_a_shorter_sequence_uses_the_first_positions(variant):
    long, short = build(variant, {}, max_position_embeddings=40), build(variant, {}, max_position_embeddings=23)
    state = long.state_dict()
    axes = long.layers[0].mixer.position_axes
    for name in state:
        for axis in axes.get(name.rpartition(".")[2], ()):
            state[name] = state[name].narrow(axis, 0, 23)
    short.load_state_dict(state)
    ids = inputs(2, 23)
    torch.testing.assert_close(short(ids).last_hidden_state, long(ids).last_hidden_state)


# refusals and conversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (GMLP, {"intermediate_size": 37}, r"intermediate_size \(37\) must be a multiple of 2.*gates the other"),
        (GMLP, {"tiny_attention_size": 0}, r"tiny_attention_size \(0\) must be at least 1: None has no attention"),
        (GMLP, {"reversible": True}, r"reversible \(True\) needs .* set reversible=False"),
        (MIXER, {"token_mixing_size": 0}, r"token_mixing_size \(0\) must be at least 1"),
        (MIXER, {"is_decoder": True}, "MLP-Mixer cannot be causal"),
    ],
)
def test_bad_fields_are_refused(variant, fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(variant, fields)


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 38}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99, max_position_embeddings=40))


def test_a_mixer_takes_all_of_bert_but_its_attention():
    conversion = convert(bert(), "mlp_mixer")
    assert {name.rpartition(".mixer.")[2] for name in conversion.report.created} == {
        "reading_weight", "reading_bias", "writing_weight", "writing_bias"
    }  # fmt: skip
    assert set(conversion.report.left.values()) == {"the variant has no attention"}
    assert conversion.model.config.position_embedding_type == "learned"


def test_a_gmlp_cannot_hold_the_mlp_of_bert():
    with pytest.raises(ValueError, match=r"et_gmlp cannot hold the source's 'encoder.layer.0.intermediate"):
        convert(bert(), "gmlp")
