"""Synthesizer: every kind of scores against the paper token by token, what they depend on, and what a step keeps."""

import pytest
import torch
from source_models import make
from zoo import ConfigRefused, build, config, inputs, probed, used_parameters

from efficient_transformers import VARIANTS, convert
from efficient_transformers.models import attn_synthesizer as engine
from efficient_transformers.models.base_mixer import SequenceInfo
from efficient_transformers.models.modeling_synthesizer import KINDS
from efficient_transformers.models.ops_score_terms import matrix

SYNTHESIZER = VARIANTS["synthesizer"]
MIXTURES = ["random+vanilla", "random+dense", "fixed+factorized_dense", "dense+factorized_random+vanilla"]


def small(kind, **changes):
    fields = {"synthesizer_type": kind, "factor_rank": 3, "dense_period": 7, "num_hidden_layers": 1}
    return build(SYNTHESIZER, {**fields, "max_position_embeddings": 40, **changes})


def score(mixer, kind, x, head, i, j):
    """S_ij of the paper for one head, of the tokens `x` (n, e)."""
    part = slice(8 * head, 8 * head + 8)
    match kind:
        case "vanilla":
            return mixer.q_proj(x[i])[part] @ mixer.k_proj(x[j])[part] / 8**0.5
        case "random":
            return mixer.random_scores[head, i, j]
        case "fixed":
            return mixer.fixed_scores[head, i, j]
        case "factorized_random":
            return mixer.row_factors[head, i] @ mixer.column_factors[head, j]
        case "dense":
            return mixer.dense_weight[head, j] @ mixer.dense_proj(x[i])[part].relu()
        case "factorized_dense":
            a = mixer.stretch_weight[head] @ mixer.stretch_proj(x[i])[part].relu()
            b = mixer.period_weight[head] @ mixer.period_proj(x[i])[part].relu()
            return a[j // 7] * b[j % 7]


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, *MIXTURES])
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_mixer_equals_the_paper_token_by_token(kind, decoder, implementation):
    mixer = small(kind, is_decoder=decoder).layers[0].mixer
    mixer.config._attn_implementation = implementation
    if "+" in kind:
        mixer.mixture.normal_()
    lengths, hidden = (11, 1, 8, 11), torch.randn(4, 11, 32, dtype=torch.float64)
    keep = torch.arange(11) < torch.tensor(lengths)[:, None]
    out, _ = mixer(
        hidden, SequenceInfo((keep.cumsum(1) - 1).masked_fill(~keep, -1), padding_mask=keep, lengths=lengths)
    )
    shares = mixer.mixture.softmax(0) if "+" in kind else [1.0]
    for row, length in enumerate(lengths):
        x = hidden[row, :length]
        expected = []
        for head in range(4):
            scores = torch.full((length, length), -torch.inf, dtype=torch.float64)
            for i in range(length):
                for j in range(i + 1 if decoder else length):
                    parts = [share * score(mixer, k, x, head, i, j) for share, k in zip(shares, kind.split("+"))]  # noqa: B905
                    scores[i, j] = sum(parts)
            expected.append(scores.softmax(-1) @ mixer.v_proj(x)[:, 8 * head : 8 * head + 8])
        torch.testing.assert_close(out[row, :length], mixer.o_proj(torch.cat(expected, -1)), rtol=1e-10, atol=1e-10)


def weights_of(model, embeds):
    return model(inputs_embeds=embeds, output_attentions=True).attentions[0][0]  # (h, n, n)


@pytest.mark.parametrize("kind", ["random", "fixed", "factorized_random"])
def test_random_is_one_matrix_whatever_the_input(kind):
    model, embeds = small(kind), torch.randn(2, 1, 20, 32, dtype=torch.float64)
    first, second = (weights_of(model, x) for x in embeds)
    assert first.equal(second)
    assert not first[0].equal(first[1])
    assert first.std() > 0.01  # and not nearly a mean
    embeds = embeds[0].requires_grad_()
    probe = torch.randn(4, 20, 20, dtype=torch.float64)
    total = (weights_of(model, embeds) * probe).sum() + 0 * embeds.sum()
    assert torch.autograd.grad(total, embeds)[0].abs().max() == 0


@pytest.mark.parametrize("kind", ["dense", "factorized_dense"])
def test_dense_weights_of_a_token_react_to_it_alone(kind):
    model = small(kind, position_embedding_type="none")
    embeds = torch.randn(1, 20, 32, dtype=torch.float64, requires_grad=True)
    weights, probe = weights_of(model, embeds), torch.randn(4, 20, dtype=torch.float64)
    for i in (0, 7, 19):
        grad = torch.autograd.grad((weights[:, i] * probe).sum(), embeds, retain_graph=True)[0][0].abs().sum(-1)
        assert (grad > 0).nonzero().tolist() == [[i]]


def test_fixed_scores_are_drawn_from_the_seed_and_stay():
    first, again = (small("fixed").layers[0].mixer.fixed_scores for _ in range(2))
    assert first.equal(again)
    assert not small("fixed", synthesizer_seed=1).layers[0].mixer.fixed_scores.equal(first)
    two = small("fixed", num_hidden_layers=2)
    assert not two.layers[0].mixer.fixed_scores.equal(two.layers[1].mixer.fixed_scores)
    assert "fixed_scores" not in dict(two.layers[0].mixer.named_parameters())


@pytest.mark.parametrize("kind", ["random", "factorized_dense", "random+vanilla", "fixed+dense+factorized_dense"])
@pytest.mark.parametrize("decoder", [False, True])
def test_many_tiles_are_one(kind, decoder, monkeypatch):
    """Values and gradients in tiles of four queries, with padding."""
    model, grads, outputs = small(kind, is_decoder=decoder), [], []
    ids, mask = inputs(4, 40), torch.ones(4, 40, dtype=torch.long)
    mask[1, 29:] = mask[2, :3] = mask[3, :3] = 0
    for entries in (2**20, 40 * 4):
        monkeypatch.setattr(engine, "TILE_ENTRIES", entries)
        output = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        grads.append(torch.autograd.grad(probed(output), used_parameters(model)))
        outputs.append(output)
    assert len(engine.query_runs(40)) == 10
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "factorized_dense", "random+vanilla"])
def test_a_step_keeps_no_matrix_of_weights(kind):
    """Of the tensors that autograd keeps, only parameters have n² entries."""
    model, sizes = small(kind, max_position_embeddings=256), []
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        if x.untyped_storage().data_ptr() not in known:
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(inputs(1, 256))
    assert max(sizes) < 256 * 256


def test_dropout_drops_the_same_in_forward_and_backward():
    model = small("random+dense", attention_probs_dropout_prob=0.3).train()
    mixer, hidden = model.layers[0].mixer, torch.randn(2, 9, 32, dtype=torch.float64)
    sequence = SequenceInfo(torch.arange(9).expand(2, -1))

    def rule(scores):
        torch.manual_seed(4)
        return torch.func.functional_call(mixer, {"random_scores": scores}, (hidden, sequence))[0]

    scores = mixer.random_scores.detach()[:, :9, :9].clone().requires_grad_()
    assert not rule(scores).equal(mixer.eval()(hidden, sequence)[0])
    mixer.train()
    torch.autograd.gradcheck(rule, scores)


def test_a_bert_becomes_a_mixture_with_its_queries_and_keys():
    source = make("Bert", "MaskedLM")
    conversion = convert(source, "synthesizer", synthesizer_type="random+vanilla")
    created = {name.rpartition(".")[2] for name in conversion.report.created}
    assert created == {"random_scores", "mixture"}
    with pytest.raises(ValueError, match=r"et_synthesizer cannot hold the source's .*query.weight"):
        convert(source, "synthesizer", synthesizer_type="random")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"synthesizer_type": "sparse"}, r"synthesizer_type \('sparse'\) must be one of vanilla, dense, "),
        ({"synthesizer_type": "random+random"}, r"'random\+random'\) must be one of .* joined by '\+'"),
        ({"synthesizer_type": ""}, r"synthesizer_type \(''\) must be one of"),
        ({"factor_rank": 0}, r"factor_rank \(0\) must be at least 1"),
        ({"dense_period": 0}, r"dense_period \(0\) must be at least 1"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ConfigRefused, match=message):
        config(SYNTHESIZER, fields)


def test_half_precision_scores_have_the_gradients_of_single_precision():
    """Scores that are a parameter, whose gradient is written tile by tile, and no float32 copy of it instead."""
    scores, v, probe = (torch.randn(shape).bfloat16() for shape in ((1, 2, 8, 8), (3, 2, 8, 4), (3, 2, 8, 4)))
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [x.detach().to(dtype).requires_grad_() for x in (scores, v)]
        out = engine.synthetic_attention([matrix(given[0])], given[1])
        grads.append([x.float() for x in torch.autograd.grad((out * probe.to(dtype)).sum(), given)])
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)
