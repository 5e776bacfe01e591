"""`attn_implementation="efficient"` inside models of transformers: the masks that they ask for, and generation."""

import pytest
import torch
from architectures import (
    IN_FLOAT64,
    TOLERANCE,
    Watch,
    compare,
    inputs_of,
    real_outputs,
    text_types,
    tiny_model,
    usable_model,
)
from host_models import model_of
from transformers import AutoModelForCausalLM, StaticCache, masking_utils

from efficient_transformers import set_attention
from efficient_transformers.any_model import masks
from efficient_transformers.models import attn_pattern_tiled

pytestmark = pytest.mark.usefixtures("every_mask_is_long")


FAST = ["bert", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "llama", "longformer", "mistral", "modernbert", "qwen3",
        "roberta", "t5", "deepseek_v32", "deepseek_v3", "gpt_oss", "bigbird_pegasus", "mamba"]  # fmt: skip


# --- what the model asks for


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in text_types()]
)
def test_outputs_and_gradients_equal_those_of_the_reference(kind):
    try:
        usable_model(kind)
    except Exception as error:
        pytest.skip(f"cannot be built tiny from its config: {error}")
    outcome = compare(kind, dtype=torch.float64 if kind in IN_FLOAT64 else torch.float32)
    assert outcome.error <= TOLERANCE, outcome


@pytest.mark.parametrize(
    ("kind", "word"),
    [("modernbert", "tiled"), ("mistral", "tiled"), ("gemma3_text", "tiled"), ("bert", "by rows"),
     ("llama", "by rows"), ("gemma2", "passed on"), ("t5", "passed on"), ("longformer", "refused")],
)  # fmt: skip
def test_engines_serve_the_layers_they_should(kind, word):
    found = compare(kind, gradients=False).word
    assert found == word or (kind == "t5" and found == "refused")  # before it used the interface


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["mistral", "modernbert"])
def test_a_window_costs_what_a_window_should(kind, padding, monkeypatch):
    """The mask of the window is never written out."""
    if kind == "modernbert" and padding == "left":
        pytest.skip("an encoder is padded on the right")
    model = model_of(kind, sliding_window=16, local_attention=32, global_attn_every_n_layers=10)
    model.set_attn_implementation("efficient")

    def dense_mask(**arguments):
        assert "local_size" not in arguments, "the mask of a window is written out"

    monkeypatch.setattr(masks, "sdpa_mask", dense_mask)
    monkeypatch.setattr(attn_pattern_tiled, "is_short", lambda pattern, *_: pattern.is_full)
    with Watch() as watch:
        assert torch.isfinite(real_outputs(model, inputs_of(model, padding, 200))).all()
    assert watch.calls["tiled"]


def test_packed_rows_equal_their_documents_alone(warnings):
    model = model_of("mistral", sliding_window=8)
    model.set_attn_implementation("efficient")
    ids = torch.randint(3, 99, (2, 60))
    lengths = [[25, 35], [60]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with Watch() as watch:
        packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    assert watch.calls["tiled"]
    assert not watch.calls["passed on"]
    alone = [
        model(part[None]).last_hidden_state[0] for row, of in zip(ids, lengths, strict=True) for part in row.split(of)
    ]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not warnings.messages


@pytest.mark.parametrize("extra", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_masks_with_parts_of_their_own_are_passed_on_and_named(extra, warnings):
    """Also where a sample of index pairs would not notice: the overlay changes one block of four tokens."""
    model = model_of("mistral", sliding_window=8)
    config, embeds = model.config, torch.randn(1, 200, 32)
    blocks = torch.full((1, 200), -1)
    blocks[:, 101:105] = 0
    value = {
        "or_mask_function": lambda b, h, q, k: (q == 101) & (k == 103),
        "and_mask_function": lambda b, h, q, k: ~((q == 103) & (k == 101)),
        "block_sequence_ids": blocks,
    }[extra]
    made = {}
    for implementation in ("sdpa", "efficient"):
        config._attn_implementation = implementation
        arguments = {"config": config, "inputs_embeds": embeds, "attention_mask": None, "past_key_values": None}
        made[implementation] = masking_utils.create_sliding_window_causal_mask(**arguments, **{extra: value})
    assert type(made["efficient"]) is torch.Tensor
    assert made["efficient"].equal(made["sdpa"])
    assert len(warnings.messages) == 1
    assert "passes layers on to SDPA" in warnings.messages[0]


def test_a_known_mask_function_that_means_something_else_is_passed_on(monkeypatch, warnings):
    """As after a change in transformers: the name is known, the rule is not."""
    monkeypatch.setattr(masks, "recognise", lambda function: masks.MaskRule(before=7, after=0))
    function = masking_utils.sliding_window_causal_mask_function(7)
    arguments = {"batch_size": 2, "q_length": 50, "kv_length": 50, "mask_function": function, "device": "cpu"}
    mask = masks.efficient_mask(**arguments, local_size=7, dtype=torch.float32)
    assert mask.equal(masking_utils.sdpa_mask(**arguments, local_size=7))
    assert "differs from the meaning of its parts" in warnings.messages[0]


def test_a_mask_of_the_callers_own_is_used():
    model = model_of("llama")
    ids, mask = torch.randint(3, 99, (2, 20)), torch.rand(2, 1, 20, 20) < 0.5
    mask |= torch.eye(20, dtype=torch.bool)
    expected = model(ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation("efficient")
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state, expected)


def test_a_mask_with_holes_is_passed_on():
    model = model_of("mistral", sliding_window=8)
    ids, keep = torch.randint(3, 99, (2, 60)), torch.ones(2, 60, dtype=torch.long)
    keep[0, 20:30] = 0
    expected = model(ids, attention_mask=keep).last_hidden_state
    model.set_attn_implementation("efficient")
    actual = model(ids, attention_mask=keep).last_hidden_state
    torch.testing.assert_close(actual[keep.bool()], expected[keep.bool()], atol=1e-5, rtol=1e-5)


def test_a_lazy_mask_is_the_matrix_in_every_operation(warnings):
    arguments = {
        "batch_size": 2, "q_length": 30, "kv_length": 30, "device": "cpu", "dtype": torch.float32, "local_size": 5,
        "mask_function": masking_utils.sliding_window_causal_mask_function(5),
        "attention_mask": torch.arange(30)[None] < torch.tensor([[30], [20]]), "config": model_of("mistral").config,
    }  # fmt: skip
    lazy, dense = masks.efficient_mask(**arguments), masking_utils.sdpa_mask(**arguments)
    assert isinstance(lazy, masks.LazyMask)
    assert (lazy.shape, lazy.dtype, lazy.dim()) == (dense.shape, dense.dtype, 4)
    assert not warnings.messages
    assert lazy[:, :, -3:].equal(dense[:, :, -3:])
    assert (lazy & dense).equal(dense)
    assert torch.where(lazy, 0.0, -1.0).equal(torch.where(dense, 0.0, -1.0))
    assert "computes with their mask" in warnings.messages[0]


def test_dropout_and_checkpointing_in_training():
    model = model_of("mistral", sliding_window=8, attention_dropout=0.2).train()
    model.set_attn_implementation("efficient")
    ids = torch.randint(3, 99, (2, 80))
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        out = model(ids).last_hidden_state
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)
    model.eval()
    assert not torch.allclose(out, model(ids).last_hidden_state, atol=1e-3)


def test_half_precision():
    model = model_of("mistral", sliding_window=8)
    ids = torch.randint(3, 99, (2, 80))
    expected = model(ids).last_hidden_state
    model.bfloat16().set_attn_implementation("efficient")
    actual = model(ids).last_hidden_state
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


# --- generation


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "llama"])
def test_greedy_generation_equals_sdpa(kind, cache):
    model = model_of(kind, AutoModelForCausalLM, sliding_window=8)
    ids, keep = torch.randint(3, 99, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    keep[0, :11] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": keep, "use_cache": cache is not None}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(ids, **options)
    model.set_attn_implementation("efficient")
    assert model.generate(ids, **options).equal(expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "llama"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_prefill_in_pieces_equals_one_pass(kind, static):
    model = model_of(kind, AutoModelForCausalLM, sliding_window=8)
    ids = torch.randint(3, 99, (2, 50))
    whole = model(ids).logits
    model.set_attn_implementation("efficient")
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    found = []
    for piece in ids.split([21, 13, 1, 15], 1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_a_mask_from_which_queries_are_cut_stays_causal(kind):
    """Layers that share keys compute only the last queries, whose mask must not become None."""
    model = tiny_model(kind)
    head = type(AutoModelForCausalLM.from_config(model.config))(model.config).eval()
    ids = torch.randint(3, 99, (1, 30))
    expected = head(ids, logits_to_keep=3, use_cache=False).logits
    head.set_attn_implementation("efficient")
    torch.testing.assert_close(head(ids, logits_to_keep=3, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


# --- graphs


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", ["local:8 | global:2", None])
@pytest.mark.parametrize("kind", ["bert", "llama", "mistral"])
def test_a_compiled_model_gives_the_same(kind, rule):
    model = model_of(kind, sliding_window=8)
    ids, keep = torch.randint(3, 99, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    keep[0, -9:] = False
    positions = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)  # packed, in the decoders
    packed = {"position_ids": positions, "use_cache": False} if kind != "bert" else {}
    model.set_attn_implementation("efficient")
    if rule is not None:
        set_attention(model, rule)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if kind == "mistral" and rule is not None:  # its own windows are in the mask
            with pytest.raises(Exception, match="windows of its own"):
                compiled(ids, attention_mask=keep.long())
            return
        for inputs in ({"attention_mask": keep.long()}, packed):
            torch._dynamo.reset()
            real = keep if "attention_mask" in inputs else torch.ones_like(keep)
            expected, actual = (run(ids, **inputs).last_hidden_state[real] for run in (model, compiled))
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
