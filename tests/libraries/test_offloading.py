"""Offloading, int8 and adapters on any layer: weights are used by their own module's forward, and nowhere else.

accelerate's hooks keep weights on the meta device and load them for the forward of the module that owns them;
quantisers and adapters replace modules, or their weights, by something that only `forward` knows how to use.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from zoo import MODES, SETTINGS, build, inputs_of, is_first, pack_rows

from efficient_transformers import VARIANTS

# one setting of each variant, and those whose weights are used in another way, run always
KEPT = ("linformer-", "longformer-", "global-external_tokens-")


def fast(param) -> bool:
    return is_first(param) or param.id.startswith(KEPT)


TABLE = [param if fast(param) else pytest.param(*param.values, id=param.id, marks=pytest.mark.slow) for param in MODES]
every_mode = pytest.mark.parametrize(("variant", "settings", "causal"), TABLE)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.slug)


def model_and_inputs(variant, settings, causal, **changes):
    model = build(variant, settings, "CausalLM" if causal else "SequenceClassification", **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin as zero
            nn.init.normal_(parameter, std=0.3)
    ids = inputs_of(model, 2, 23)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


def logits(model, given, implementation="sdpa"):
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = implementation
    with torch.no_grad():
        return model(**given).logits


@every_mode
def test_every_weight_is_loaded_by_its_own_module(variant, settings, causal):
    model, given = model_and_inputs(variant, settings, causal)
    wanted = [logits(model, given, how) for how in ("sdpa", "eager")]
    offloaded = cpu_offload(copy.deepcopy(model), "cpu")
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for how, expected in zip(("sdpa", "eager"), wanted, strict=True):
        torch.testing.assert_close(logits(offloaded, given, how), expected)


@every_variant
def test_offloaded_packed_rows_and_images(variant):
    for settings in SETTINGS[variant.slug][:2]:
        model = build(variant, settings)
        rows = pack_rows([inputs_of(model, 1, 9), inputs_of(model, 1, 5)], [inputs_of(model, 1, 12)], width=15)
        images = build(variant, settings, "ImageClassification")
        for some, given in ((model, rows), (images, {"pixel_values": inputs_of(images, 2, 0)})):
            with torch.no_grad():
                expected = some(**given)[0]
                torch.testing.assert_close(cpu_offload(some, "cpu")(**given)[0], expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.causal], ids=lambda variant: variant.slug)
def test_offloaded_generation(variant):
    model = build(variant, SETTINGS[variant.slug][0], "CausalLM", dtype=torch.float32)
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ids = inputs_of(model, 2, 9)
    expected = model.generate(ids, **how)
    assert cpu_offload(model, "cpu").generate(ids, **how).equal(expected)


@pytest.mark.parametrize("slug", ["longformer", "linformer", "global", "full"])
def test_offloading_to_disk_and_by_a_device_map(slug, tmp_path):
    settings = SETTINGS[slug][1] if slug == "global" else SETTINGS[slug][0]
    model, given = model_and_inputs(VARIANTS[slug], settings, False, dtype=torch.float32)
    expected = logits(model, given)
    model.save_pretrained(tmp_path / "model")
    disk_offload(copied := copy.deepcopy(model), tmp_path / "disk", "cpu")
    torch.testing.assert_close(logits(copied, given), expected)
    devices = {name: "cpu" for name, _ in model.model.named_children()}
    devices = {f"model.{name}": device for name, device in devices.items()} | {"classifier": "disk", "dropout": "cpu"}
    devices |= {name: "disk" for name in devices if "layers" in name or "external" in name or "pooler" in name}
    dispatch_model(copied := copy.deepcopy(model), devices, main_device="cpu", offload_dir=tmp_path / "map")
    torch.testing.assert_close(logits(copied, given), expected)
    devices = {name: "cpu" if name == "model.embeddings" else device for name, device in devices.items()}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=devices, offload_folder=tmp_path / "loaded"
    )
    torch.testing.assert_close(logits(loaded.eval(), given), expected)


@every_variant
@pytest.mark.parametrize("head", ["SequenceClassification", "ImageClassification"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
def test_dynamic_int8(variant, head, same_choices):
    settings = {**SETTINGS[variant.slug][0], "initializer_range": 0.05}
    model = build(variant, settings, head, dtype=torch.float32)
    given = {model.main_input_name: inputs_of(model, 2, 23)}
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    with torch.no_grad():
        exact = model.model(**given).last_hidden_state
        for implementation in ("sdpa", "eager"):
            quantised.config._attn_implementation = implementation
            error = quantised.model(**given).last_hidden_state - exact
            assert error.norm() < 0.05 * exact.norm()
            assert quantised(**given).logits.isfinite().all()


def adapted(model, config):
    """`model` with an adapter that does something."""
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "ia3_" in name:
            nn.init.normal_(parameter, mean=float("ia3_" in name), std=0.3)
    return wrapped.to(model.dtype).eval()


ADAPTERS = {
    "lora": lambda targets: LoraConfig(target_modules=targets, r=2),
    "lora_bias": lambda targets: LoraConfig(target_modules=targets, r=2, lora_bias=True),
    "dora": lambda targets: LoraConfig(target_modules=targets, r=2, use_dora=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
    "ia3_inputs": lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets),
}
KINDS = ["lora_bias", "ia3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "dora", "ia3_inputs"))]


@every_mode
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_any_layer_merge_to_the_same_function(variant, settings, causal, kind):
    model, given = model_and_inputs(variant, settings, causal)
    before = logits(model, given)
    linear = {name: module for name, module in model.model.layers.named_modules() if type(module) is nn.Linear}
    # PEFT cannot merge the bias of an adapter into a layer without one
    names = [name for name, module in linear.items() if kind != "lora_bias" or module.bias is not None]
    wrapped = adapted(model, ADAPTERS[kind](sorted({f"model.layers.{name}" for name in names})))
    fast, eager = (logits(wrapped, given, how) for how in ("sdpa", "eager"))
    assert (fast - before).abs().max() > 1e-3
    torch.testing.assert_close(fast, eager)
    merged = wrapped.merge_and_unload()
    assert not any("lora_" in name or "ia3_" in name for name, _ in merged.named_parameters())
    for how in ("sdpa", "eager"):
        torch.testing.assert_close(logits(merged, given, how), fast)
