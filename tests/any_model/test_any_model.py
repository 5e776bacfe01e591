"""`attn_implementation="efficient"` and `set_attention` inside models of transformers."""

import json
import logging

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
from host_models import SIZES, model_of
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache, masking_utils

from efficient_transformers import set_attention
from efficient_transformers.any_model import attention, masks
from efficient_transformers.any_model.rules import parse_rule
from efficient_transformers.models import attn_pattern_tiled
from efficient_transformers.models.attn_pattern_blocked import blocked_attention
from efficient_transformers.models.ops_engine import BatchRows

FAST = ["bert", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "llama", "longformer", "mistral", "modernbert", "qwen3",
        "roberta", "t5", "deepseek_v32", "deepseek_v3", "gpt_oss", "bigbird_pegasus", "mamba"]  # fmt: skip


@pytest.fixture(autouse=True)
def every_mask_is_long(monkeypatch):
    """The engines take over at any length."""
    monkeypatch.setattr(masks, "SHORT_LENGTH", 0)


@pytest.fixture
def warnings(caplog):
    """Messages of this test, each of them given once more."""
    type(masks.logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "efficient_transformers"):
        yield caplog


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


# --- rules of set_attention


PATTERNS = [
    "local:8", "local:8 | global:2", "global:2:3", "local:4 | global:1:1", "longformer", "big_bird", "stride:4:3",
    "local:4 | random:2:16", ["local:8", "global:1", "stride:8", "full"], ["local:4 | random:1:16", "full"],
]  # fmt: skip
ENCODERS_ONLY = ("global:2:3", "local:4 | global:1:1", "big_bird")


def dense_mask(pattern, keep: torch.Tensor, causal: bool, num_heads: int = 4) -> torch.Tensor:
    """The rule of layer 0 written out, (b, h, n, n), each row at its own length."""
    batch, length = keep.shape
    mask, rule = torch.zeros(batch, num_heads, length, length, dtype=torch.bool), parse_rule(pattern, causal)
    for row in range(batch):
        at = keep[row].nonzero()[:, 0]
        for head_rule, heads in rule.groups(num_heads):
            allowed = head_rule.pattern.dense(len(at), len(heads)).clone()
            last = list(head_rule.last_tokens(len(at)))
            allowed[:, last] = True
            allowed[:, :, last] = True
            for number, head in enumerate(heads):
                mask[row, head][at[:, None], at] = allowed[number]
    return mask


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_rule_equals_its_mask(kind, pattern, padding):
    if kind == "llama" and pattern in ENCODERS_ONLY:
        pytest.skip("not causal")
    model = model_of(kind, num_hidden_layers=1)
    ids, keep = torch.randint(3, 99, (3, 150)), torch.ones(3, 150, dtype=torch.bool)
    if padding == "holes":
        keep[0, 40:60] = False
    else:
        keep[0, -50:] = keep[1, -1:] = False
        keep = keep.flip(1) if padding == "left" else keep
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    mask = dense_mask(pattern, keep, causal=kind == "llama")
    expected = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    set_attention(model, pattern)
    actual = model(ids, attention_mask=keep.long(), position_ids=positions).last_hidden_state
    torch.testing.assert_close(actual[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_gradients_of_a_rule_equal_those_of_its_mask():
    ids, keep = torch.randint(3, 99, (2, 150)), torch.ones(2, 150, dtype=torch.bool)
    keep[0, -30:] = False
    pattern, grads = ["local:8 | global:1:1", "stride:4:3"], []
    model = model_of("bert", num_hidden_layers=1)
    for attention_mask in (dense_mask(pattern, keep, causal=False), keep.long()):
        if attention_mask.dim() == 2:
            set_attention(model, pattern)
        model.zero_grad()
        out = model(ids, attention_mask=attention_mask).last_hidden_state[keep]
        (out * torch.linspace(-1, 1, 32)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["local:8", "local:4 | global:2", "local:4 | random:1:16", "linear", "efficient",
                                     "performer:32", "rfa:16", ["full", "local:4"]], ids=str)  # fmt: skip
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_by_a_rule_equals_that_without_cache(pattern, cache):
    model = model_of("llama", AutoModelForCausalLM)
    set_attention(model, pattern)
    ids, keep = torch.randint(3, 99, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    keep[0, :17] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": keep}
    expected = model.generate(ids, use_cache=False, **options)
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    assert model.generate(ids, **kind, **options).equal(expected)


def test_packed_rows_have_the_rule_in_each_document():
    model = model_of("llama")
    ids, positions = torch.randint(3, 99, (1, 60)), torch.cat([torch.arange(25), torch.arange(35)])[None]
    for pattern in ("local:4 | global:2", "linear"):
        set_attention(model, pattern)
        packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        alone = torch.cat([model(part).last_hidden_state[0] for part in ids.split([25, 35], 1)])
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["linear", "efficient", "performer:64", "rfa:32"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_changes_nothing_in_kernel_mixers(kind, pattern):
    model = model_of(kind)
    set_attention(model, pattern)
    ids = torch.randint(3, 99, (1, 50))
    alone = model(ids).last_hidden_state
    padded = F.pad(ids, (7, 0), value=5)
    keep = F.pad(torch.ones_like(ids), (7, 0))
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=keep, position_ids=positions).last_hidden_state[:, 7:]
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


def test_a_performer_with_many_features_estimates_softmax():
    model = model_of("bert", initializer_range=0.02)
    ids = torch.randint(3, 99, (1, 64))
    exact, errors = model(ids).last_hidden_state, []
    for features in (16, 4096):
        set_attention(model, f"performer:{features}")
        errors.append((model(ids).last_hidden_state - exact).abs().max().item())
    assert errors[1] < errors[0] / 4


def test_a_softcapped_model_gets_its_rule_as_a_mask(warnings):
    model = tiny_model("gemma2", "eager")
    ids, keep = torch.randint(3, 99, (2, 60)), torch.ones(2, 60, dtype=torch.bool)
    mask = dense_mask("local:8", keep, causal=True)
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=dict.fromkeys(model.config.layer_types, bias)).last_hidden_state
    set_attention(model, "local:8")
    torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert "softcap" in warnings.messages[0]


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


@pytest.mark.parametrize("pattern", ["local:8 | global:2:3", "stride:4:3", "local:4 | random:2:16"])
def test_engines_of_other_devices_take_the_same_rows(pattern, monkeypatch):
    """The masks that they need are made on the CPU here, where they are compared with the tiled engine."""
    q, k, v = (torch.randn(2, heads, 70, 8) for heads in (4, 2, 2))
    rule, lengths = parse_rule(pattern).heads[0], (70, 41)
    expected = attention.pattern_attention(q, k, v, lengths, rule, 0.0)
    given = attention.batch_rows(lengths, rule, q.to("meta"))
    assert given.keep is not None
    position = torch.arange(70)
    keep = position < torch.tensor(lengths)[:, None]
    marked = keep & (position >= torch.tensor(lengths)[:, None] - rule.last) if rule.last else None
    assert (given.global_mask is None) == (marked is None)
    rows = BatchRows(keep=keep, global_mask=marked)
    monkeypatch.setattr(attention, "batch_rows", lambda *_: rows)
    monkeypatch.setattr(attention, "engine", lambda *args, implementation, **kw: blocked_attention(*args, **kw))
    torch.testing.assert_close(attention.pattern_attention(q, k, v, lengths, rule, 0.0), expected, atol=1e-5, rtol=1e-5)


# --- where a rule is stored


def attention_of(folder) -> tuple:
    config = json.loads((folder / "config.json").read_text())
    return config.get("efficient_attention"), config.get("attn_implementation")


@pytest.mark.parametrize(
    "layers",
    [None, [1], slice(1, None), lambda layer: layer == 1, [-1]],
    ids=["all", "list", "slice", "function", "negative"],
)
def test_a_rule_survives_saving_twice(layers, tmp_path):
    model = model_of("llama", AutoModelForCausalLM)
    set_attention(model, "local:4 | global:1", layers)
    rule = "local:4 | global:1"
    stored = {"pattern": rule} if layers is None else {"layers": [None, rule]}
    ids = torch.randint(3, 99, (1, 40))
    expected = model(ids).logits
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        assert attention_of(tmp_path / name) == (stored, "efficient")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config._attn_implementation == "efficient"
        assert model(ids).logits.equal(expected)
    AutoConfig.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "config")
    assert attention_of(tmp_path / "config") == (stored, "efficient")


def test_rules_of_layers_add_up_and_none_restores(tmp_path):
    model = model_of("llama", AutoModelForCausalLM)
    ids = torch.randint(3, 99, (1, 40))
    expected = model(ids).logits
    set_attention(model, "local:4", [0])
    set_attention(model, ["full", "local:2"], [1])
    assert model.config.efficient_attention == {"layers": ["local:4", ["full", "local:2"]]}
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    set_attention(model, None)
    torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    assert attention_of(tmp_path) == (None, None)


def test_a_text_config_inside_another_one_is_written_through(tmp_path):
    text = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModel.from_config(config).eval()
    set_attention(model, "local:4")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "efficient"
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.text_config.efficient_attention == {"pattern": "local:4"}
    ids = torch.randint(3, 99, (1, 40))
    assert again(input_ids=ids).last_hidden_state.equal(model(input_ids=ids).last_hidden_state)


# --- errors


@pytest.mark.parametrize(
    ("kind", "pattern", "layers", "message"),
    [
        ("longformer", "local:4", None, "does not use transformers' attention interface.*convert"),
        ("mpnet", "local:4", None, "does not use transformers' attention interface"),
        ("bart", "local:4", None, "cross-attention"),
        ("distilbert", "local:4", [0], "no layer_idx"),
        ("bert", "local:4", [9], r"numbered 0 to 3"),
        ("bert", "lokal:4", None, "'lokal:4'.*no attention pattern"),
        ("bert", "performer", None, "performer:<number of features>"),
        ("bert", ["linear", "full"], None, "all heads of a layer"),
        ("bert", ["full"] * 3, None, "3 patterns cannot be tiled over 4"),
        ("bert", [], None, "at least one"),
        ("llama", "global:1:1", None, "causal"),
        ("llama", "big_bird", None, "causal"),
    ],
)
def test_errors_name_the_value_and_the_way_out(kind, pattern, layers, message):
    model = tiny_model(kind, None)
    with pytest.raises(ValueError, match=message):
        set_attention(model, pattern, layers)
    assert model.config.efficient_attention is None


def test_a_sliding_cache_that_has_dropped_what_the_rule_needs_is_refused():
    model = model_of("mistral", AutoModelForCausalLM, sliding_window=8)
    set_attention(model, "local:4 | global:1")
    with pytest.raises(ValueError, match="BoundedCache"):
        model.generate(torch.randint(3, 99, (1, 30)), max_new_tokens=3, do_sample=False)
    set_attention(model, "local:4")  # all it needs is there
    ids = torch.randint(3, 99, (1, 30))
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)
    assert model.generate(ids, max_new_tokens=9, do_sample=False).equal(expected)
