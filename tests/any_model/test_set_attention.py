"""`set_attention`: rules against their masks, where a config stores them, and errors."""

import json

import pytest
import torch
from architectures import tiny_model
from host_models import SIZES, model_of
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from efficient_transformers import set_attention
from efficient_transformers.any_model import attention
from efficient_transformers.any_model.rules import parse_rule
from efficient_transformers.models.attn_pattern_blocked import blocked_attention
from efficient_transformers.models.ops_engine import BatchRows

pytestmark = pytest.mark.usefixtures("every_mask_is_long")


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


@pytest.mark.parametrize("pattern", ["local:8 | global:2:3", "stride:4:3", "local:4 | random:2:16"])
def test_engines_of_other_devices_take_the_same_rows(pattern, monkeypatch):
    """The masks that they need are made on the CPU here, where they are compared with the tiled engine."""
    q, k, v = (torch.randn(2, heads, 70, 8) for heads in (4, 2, 2))
    rule, lengths = parse_rule(pattern).heads[0], (70, 41)
    expected = attention.pattern_attention(q, k, v, lengths, rule, 0.0)
    given = attention.batch_rows(lengths, rule, q.to("meta"))
    assert given.padding_mask is not None
    position = torch.arange(70)
    keep = position < torch.tensor(lengths)[:, None]
    marked = keep & (position >= torch.tensor(lengths)[:, None] - rule.last) if rule.last else None
    assert (given.global_mask is None) == (marked is None)
    rows = BatchRows(padding_mask=keep, global_mask=marked)
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
        ("bert", "local:4", [9], r"layers contains 9, but .* are numbered 0 to 3"),
        ("bert", "lokal:4", None, "'lokal:4'.*no attention pattern"),
        ("bert", "performer", None, "performer:<number of features>"),
        ("bert", ["linear", "full"], None, "all heads of a layer"),
        ("bert", ["full"] * 3, None, "3 patterns cannot be tiled over 4"),
        ("bert", [], None, "must not be empty"),
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
