"""The engine of (VK)Q and its feature maps: sums against the written-out formula, estimates against their kernels."""

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from zoo import build, bytes_kept, inputs, probed

from efficient_transformers import VARIANTS
from efficient_transformers.models import attn_linear as engine
from efficient_transformers.models.attn_linear import (
    attention_matrix,
    causal_linear_attention,
    linear_attention,
    linear_attention_step,
)
from efficient_transformers.models.ops_feature_maps import (
    FEATURE_MAPS,
    gaussian_projection,
    log_positive_random_features,
    orthogonal_projection,
    relu_random_features,
    trigonometric_random_features,
)

HEADS, DIM = 3, 8
every_map = pytest.mark.parametrize("name", FEATURE_MAPS)
every_rule = pytest.mark.parametrize("rule", ["both", "causal", "gated"])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Let short sequences have several chunks and, with `segments`, several segments."""
    monkeypatch.setattr(engine, "CHUNK", 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projection_of(name: str):
    return orthogonal_projection(HEADS, 12, DIM, generator()).double() if FEATURE_MAPS[name].is_random else None


def tensors(length: int, dtype=torch.float64, scale: float = 1.0):
    q, k, v = (torch.randn(2, HEADS, length, DIM, dtype=dtype) * scale for _ in range(3))
    if scale == 1:  # short enough for sines and cosines not to cancel, which no rounding survives
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, max(1, length - 3) :] = False
    decay = torch.randn(2, HEADS, length, dtype=dtype).sigmoid().log() * keep[:, None]
    return [x.requires_grad_() for x in (q, k, v, decay.detach())], keep


def written_out(name, q, k, v, keep, causal, log_decay):
    """One query after another, in plain exponentials: an oracle without chunks, states or shifts."""
    feature_map, rows = FEATURE_MAPS[name], []
    queries, keys = (feature_map(x, projection_of(name)) for x in (q, k))
    if feature_map.in_logs:
        queries, keys = queries.exp(), keys.exp()
    for i in range(q.shape[2]):
        seen = keep & (torch.arange(q.shape[2]) <= i) if causal else keep
        there = keys * seen[:, None, :, None]
        if feature_map.per_feature:
            query = queries[:, :, i] / queries[:, :, i].sum(-1, keepdim=True)
            found = (there[..., None] * v[..., None, :]).sum(2) / there.sum(2)[..., None]  # (b, h, f, d)
            rows.append((query[..., None] * found).sum(2))
            continue
        weights = (queries[:, :, i, None] * there).sum(-1)  # (b, h, n)
        mass = seen[:, None].double()
        if log_decay is not None:
            left = [log_decay[..., j + 1 : i + 1].sum(-1).exp() * (1 - log_decay[..., j].exp()) for j in range(i + 1)]
            weights, mass = weights[..., : i + 1] * torch.stack(left, -1), torch.stack(left, -1)
        divisor = torch.maximum(weights.sum(-1, keepdim=True), feature_map.floor * mass.sum(-1, keepdim=True))
        rows.append((weights[..., None] * v[:, :, : weights.shape[-1]]).sum(2) / divisor)
    return torch.stack(rows, 2) * keep[:, None, :, None]


@every_map
@every_rule
@pytest.mark.parametrize("length", [1, 5, 16, 37])
@pytest.mark.parametrize("segments", ["one", "several", "checkpointed"])
def test_sums_equal_the_written_out_formula(name, rule, length, segments, monkeypatch):
    if segments != "one":
        monkeypatch.setattr(engine, "SEGMENT_ENTRIES", 1)  # a chunk each
    if segments == "checkpointed":
        monkeypatch.setattr(engine, "KEPT_ENTRIES", 0)
    (q, k, v, decay), keep = tensors(length)
    how, leaves = (FEATURE_MAPS[name], projection_of(name), keep), [q, k, v]
    if rule == "both":
        out, gate = linear_attention(q, k, v, *how), None
    else:
        gate = decay if rule == "gated" and not FEATURE_MAPS[name].per_feature else None
        leaves += [] if gate is None else [decay]
        out, _ = causal_linear_attention(q, k, v, *how, gate)
    out = out * keep[:, None, :, None]
    expected = written_out(name, q, k, v, keep, rule != "both", gate)
    matrix = attention_matrix(q, k, *how, rule != "both", gate) @ v
    probe = torch.randn_like(out)
    for other in (expected, matrix):
        torch.testing.assert_close(out, other, rtol=1e-9, atol=1e-9)
        grads, others = (torch.autograd.grad((x * probe).sum(), leaves, retain_graph=True) for x in (out, other))
        torch.testing.assert_close(grads, others, rtol=1e-7, atol=1e-8)


@every_map
@pytest.mark.parametrize("gated", [False, True])
def test_steps_and_pieces_end_where_the_whole_does(name, gated):
    (q, k, v, decay), keep = tensors(37)
    gated = gated and not FEATURE_MAPS[name].per_feature

    def run(rule, first, last, state):
        some = slice(first, last)
        gate = decay[..., some] if gated else None
        how = FEATURE_MAPS[name], projection_of(name), keep[:, some], gate, state
        return rule(*(x[:, :, some] for x in (q, k, v)), *how)

    whole, end = run(causal_linear_attention, 0, 37, None)
    for cuts in ([0, 20, 37], [0, 1, 2, 30, 37], list(range(38))):
        parts, state = [], None
        for first, last in pairwise(cuts):
            rule = linear_attention_step if last == first + 1 else causal_linear_attention
            part, state = run(rule, first, last, state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            [x for x in state if x is not None], [x for x in end if x is not None], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", ["softmax", "positive"])
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits_do_not_overflow(name, causal):
    """exp(80) is beyond float32 squared; the sums are in units of the largest key of each feature."""
    (q, k, v, _), keep = tensors(30, torch.float32, scale=30.0)
    how = FEATURE_MAPS[name], None if name == "softmax" else projection_of(name).float(), keep
    out = causal_linear_attention(q, k, v, *how)[0] if causal else linear_attention(q, k, v, *how)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), [q, k, v])
    assert all(grad.isfinite().all() for grad in grads)
    if not causal:  # of huge logits a softmax is a choice, which float64 makes likewise
        exact = attention_matrix(q.double(), k.double(), how[0], None if how[1] is None else how[1].double(), keep)
        torch.testing.assert_close(out * keep[:, None, :, None], (exact @ v.double()).float(), rtol=1e-3, atol=1e-2)


@every_map
def test_a_state_in_bfloat16_is_kept_in_float32(name):
    (q, k, v, _), keep = tensors(37)
    projection = projection_of(name)
    rounded = [x.to(torch.bfloat16) for x in (q, k, v)]
    out, state = causal_linear_attention(*rounded, FEATURE_MAPS[name], projection, keep)
    assert out.dtype == torch.bfloat16
    assert state.sums.dtype == torch.float32


@pytest.mark.parametrize("rule", ["both", "causal", "step, gated", "matrix"])
def test_weights_that_cancel_are_divided_by_the_floor(rule):
    """One pair of features of vectors far apart: the estimate of the kernel is negative, and the division is not."""
    q, v = torch.tensor([[[[3.0]]]]).double(), torch.ones(1, 1, 1, 1).double()
    k, how = -q / 3, (FEATURE_MAPS["trigonometric"], torch.ones(1, 1, 1).double())
    gate = torch.full((1, 1, 1), 0.3).log().double()
    out = {
        "both": lambda: linear_attention(q, k, v, *how),
        "causal": lambda: causal_linear_attention(q, k, v, *how)[0],
        "step, gated": lambda: linear_attention_step(q, k, v, *how, log_decay=gate)[0],
        "matrix": lambda: attention_matrix(q, k, *how) @ v,
    }[rule]()
    assert out.item() == pytest.approx(math.cos(4) / 0.1)


@every_map
def test_bfloat16_is_stable_at_64k_tokens(name, monkeypatch):
    """The sums run over all tokens; were they rounded to eight bits, the last ones would change nothing."""
    monkeypatch.setattr(engine, "CHUNK", 128)
    q, k, v = (torch.randn(1, 1, 65536, 16).to(torch.bfloat16) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v[:, :, 32768:] += 1  # the mean over the past must move
    projection = orthogonal_projection(1, 32, 16, generator()) if FEATURE_MAPS[name].is_random else None
    out, _ = causal_linear_attention(q, k, v, FEATURE_MAPS[name], projection)
    exact, _ = causal_linear_attention(q.double(), k.double(), v.double(), FEATURE_MAPS[name], projection)
    last = slice(60000, None)
    assert (exact[:, :, last].mean() - exact[:, :, 30000:32000].mean()) > 0.3
    error = (out.double() - exact)[:, :, last].abs().max()
    assert error < torch.finfo(torch.bfloat16).eps * exact[:, :, last].abs().max()


@pytest.mark.parametrize("gated", [False, True])
def test_the_kernels_of_flash_linear_attention_are_called_as_they_want(gated, monkeypatch):
    """Their signature, played by a loop: layout (b, n, h, ·), no scale, the state in and out."""

    class Kernels:
        @staticmethod
        def chunk_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
            assert (scale, output_final_state) == (1.0, True)
            assert all(x.is_contiguous() for x in (q, k, v))
            state = (
                torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state
            )
            rows = []
            for t in range(q.shape[1]):
                kept = state if g is None else state * g[:, t, :, None, None].exp()
                state = kept + k[:, t, :, :, None] * v[:, t, :, None, :]
                rows.append((q[:, t, :, :, None] * state).sum(2))
            return torch.stack(rows, 1), state

    (q, k, v, decay), keep = tensors(37, torch.float32)
    arguments = (q, k, v, FEATURE_MAPS["elu"], None, keep, decay if gated else None)
    expected, end = causal_linear_attention(*arguments)
    again, later = causal_linear_attention(*arguments, end)
    monkeypatch.setattr(engine, "fla", Kernels)
    monkeypatch.setattr(engine, "fla_takes", lambda q: True)
    out, state = causal_linear_attention(*arguments)
    torch.testing.assert_close((out, *state[:2]), (expected, *end[:2]), rtol=1e-4, atol=1e-5)
    out, state = causal_linear_attention(*arguments, end)
    torch.testing.assert_close((out, *state[:2]), (again, *later[:2]), rtol=1e-4, atol=1e-5)


# features ------------------------------------------------------------------------------------------------------------


def softmax_kernel(x, y):
    return (x * y).sum(-1).exp()


def gaussian_kernel(x, y):
    return (-(x - y).square().sum(-1) / 2).exp()


KERNELS = {
    "positive, orthogonal": (
        softmax_kernel,
        orthogonal_projection,
        lambda x, w: log_positive_random_features(x, w).exp(),
    ),
    "positive, independent": (
        softmax_kernel,
        gaussian_projection,
        lambda x, w: log_positive_random_features(x, w).exp(),
    ),
    "trigonometric": (gaussian_kernel, gaussian_projection, trigonometric_random_features),
}
every_kernel = pytest.mark.parametrize(("kernel", "draw", "features"), KERNELS.values(), ids=KERNELS)


def estimates(draw, features, count: int, draws: int):
    """`draws` estimates of the kernel of 20 pairs of unit vectors in eight dimensions, and the pairs."""
    x, y = F.normalize(torch.randn(2, 20, DIM, generator=generator(1), dtype=torch.float64), dim=-1)
    projection = draw(draws, count, DIM, generator(2)).double()
    return (features(x, projection) * features(y, projection)).sum(-1), x, y


@every_kernel
def test_random_features_are_unbiased(kernel, draw, features):
    found, x, y = estimates(draw, features, 16, 20_000)
    error = (found.mean(0) - kernel(x, y)) / (found.std(0) / found.shape[0] ** 0.5)
    assert error.abs().max() < 4.5  # standard errors, the largest of 20


@every_kernel
def test_the_error_of_random_features_falls_as_one_over_the_root(kernel, draw, features):
    counts = [16, 32, 64, 128, 256, 512, 1024]
    errors = []
    for count in counts:
        found, x, y = estimates(draw, features, count, 400)
        errors.append((found - kernel(x, y)).square().mean().sqrt().log2().item())
    slope = (
        torch.linalg.lstsq(
            torch.stack([torch.tensor(counts).log2(), torch.ones(len(counts))], 1), torch.tensor(errors)[:, None]
        )
        .solution[0]
        .item()
    )
    assert slope == pytest.approx(-0.5, abs=0.05)


def test_orthogonal_features_err_less():
    errors = []
    for draw in (gaussian_projection, orthogonal_projection):
        found, x, y = estimates(draw, KERNELS["positive, orthogonal"][2], 16, 4000)
        errors.append((found - softmax_kernel(x, y)).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_orthogonal_rows_are_orthogonal_in_blocks_and_gaussian_in_length():
    projection = orthogonal_projection(200, 20, DIM, generator()).double()
    assert projection.shape == (200, 20, DIM)
    for block in projection.split(DIM, 1):
        gram = block @ block.transpose(-1, -2)
        off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-4
    squares = projection.square().sum(-1)  # chi squared with d degrees of freedom: mean d, variance 2d
    assert squares.mean() == pytest.approx(DIM, rel=0.05)
    assert squares.var() == pytest.approx(2 * DIM, rel=0.15)
    assert projection.mean(0).abs().max() < 5 / math.sqrt(200)


def test_performer_comes_near_softmax_attention():
    """The whole layer: with more features its output approaches that of full attention with the same weights."""
    full = build(VARIANTS["full"], {}, num_hidden_layers=1, initializer_range=0.1)
    ids, errors = inputs(1, 60), []
    expected = full(ids).last_hidden_state
    for count in (16, 64, 256, 1024, 4096):
        found = []
        for seed in range(4):
            settings = {"num_random_features": count, "feature_seed": seed, "num_hidden_layers": 1}
            model = build(VARIANTS["performer"], settings, initializer_range=0.1)
            weights = full.state_dict()
            assert set(model.load_state_dict(weights, strict=False).missing_keys) <= {
                f"layers.0.mixer.{name}" for name in ("projection", "passes")
            }
            found.append((model(ids).last_hidden_state - expected).square().mean())
        errors.append(torch.stack(found).mean().sqrt().item())
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.2 * errors[0], errors


def test_relu_features_estimate_the_kernel_of_their_own():
    """E[relu(w·x) relu(w·y)] is the arc-cosine kernel of order 1 (Cho and Saul 2009), halved."""
    x, y = torch.randn(2, 20, DIM, generator=generator(1), dtype=torch.float64)
    projection = orthogonal_projection(400, 512, DIM, generator(2)).double()
    found = (relu_random_features(x, projection) * relu_random_features(y, projection)).sum(-1).mean(0)
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    angle = torch.acos((x * y).sum(-1) / norms)
    expected = norms * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


# draws ---------------------------------------------------------------------------------------------------------------


def test_features_are_drawn_again_in_training_only():
    model = build(VARIANTS["performer"], {"feature_redraw_interval": 3}, dtype=torch.float32)
    mixer, ids = model.layers[0].mixer, inputs(2, 9)
    first = mixer.projection.clone()
    for _ in range(5):
        model(ids)
    assert mixer.projection.equal(first)
    model.train()
    drawn = []
    for _ in range(7):
        model(ids).last_hidden_state.sum().backward()
        drawn.append(mixer.projection.clone())
    assert [x.equal(first) for x in drawn] == [True, True, False, False, False, False, False]
    assert drawn[2].equal(drawn[4])
    assert not drawn[4].equal(drawn[5])
    assert drawn[5].equal(mixer.draw(2))
    assert not model.layers[1].mixer.projection.equal(mixer.projection)


def test_gradient_checkpointing_does_not_count_twice():
    model = build(VARIANTS["performer"], {"feature_redraw_interval": 2}, dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    for _ in range(3):
        model(inputs(2, 9)).last_hidden_state.sum().backward()
    assert model.layers[0].mixer.passes == 3


def test_a_redraw_between_forward_and_backward_does_no_harm():
    model = build(VARIANTS["performer"], {"feature_redraw_interval": 1}, dtype=torch.float32).train()
    once, ids = deepcopy(model), inputs(1, 9)
    total = sum(probed(model(ids).last_hidden_state) for _ in range(3))
    total.backward()
    for _ in range(3):  # the same features, with no redraw between a forward pass and its backward pass
        probed(once(ids).last_hidden_state).backward()
    for (name, a), b in zip(model.named_parameters(), once.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_continued_model_has_the_features_it_had(tmp_path):
    model = build(VARIANTS["performer"], {"feature_redraw_interval": 2}, dtype=torch.float32).train()
    for _ in range(3):
        model(inputs(1, 9))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    for _ in range(3):
        for one in (model, again):
            torch.manual_seed(0)
            one(inputs(1, 9))
        assert again.layers[1].mixer.projection.equal(model.layers[1].mixer.projection)
        assert again.layers[1].mixer.passes == model.layers[1].mixer.passes


# variants ------------------------------------------------------------------------------------------------------------


def test_a_gate_needs_a_decoder():
    with pytest.raises(ValueError, match=r"gated=True needs a causal model.*set is_decoder=True"):
        build(VARIANTS["rfa"], {"gated": True})


@pytest.mark.parametrize("slug", ["efficient", "linear", "rfa", "performer"])
def test_the_state_has_one_size(slug):
    model = build(VARIANTS[slug], {}, "CausalLM")
    sizes = []
    for length in (1, 100):
        cache = model(inputs(2, length), use_cache=True).past_key_values
        sizes.append([x.shape for layer in cache.layers for x in layer.state if x is not None])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("slug", ["efficient", "linear", "rfa", "performer"])
def test_memory_of_a_causal_training_step_is_linear(slug, monkeypatch):
    """Bytes kept for the backward pass of one bare layer, where segments are computed again: no features among them."""
    monkeypatch.setattr(engine, "CHUNK", 32)
    monkeypatch.setattr(engine, "SEGMENT_ENTRIES", 1)
    monkeypatch.setattr(engine, "KEPT_ENTRIES", 0)
    model = build(
        VARIANTS[slug], {}, num_hidden_layers=1, dtype=torch.float32, is_decoder=True, max_position_embeddings=4096
    )
    mixer, kept = model.layers[0].mixer, []
    for length in (512, 1024):
        q, k, v = (torch.randn(1, 4, length, 8, requires_grad=True) for _ in range(3))
        kept.append(
            bytes_kept(lambda x=(q, k, v): causal_linear_attention(*x, mixer.config.features, mixer.projection))
        )
    assert kept[1] < 2.1 * kept[0]
