"""Memory in costs.py against models and their caches. FLOPs are in test_flops.py."""

import pytest
import torch
from torch import Tensor
from zoo import CASES, CAUSAL, IDS, build, config, inputs

from efficient_transformers import VARIANTS, costs

CAUSAL_CASES = pytest.mark.parametrize(
    ("variant", "settings"), [c for c, _ in CAUSAL], ids=[name for _, name in CAUSAL]
)


def held(layer) -> int:
    """Numbers in one layer of a cache, without the room it has to grow."""
    if hasattr(layer, "state"):
        return sum(x.numel() for x in layer.state if x is not None)
    if isinstance(getattr(layer, "stored", None), dict):
        layer.write()
        return sum(x[:, : layer.count].numel() for x in layer.stored.values())
    if hasattr(layer, "pending"):
        layer.write(lambda pair: pair[:, :, :, :: layer.factor])  # only how many there are matters
        stored = 0 if layer.stored is None else layer.stored[:, :, :, : layer.count].numel()
        return stored + layer.pending.numel()
    return sum(x.numel() for x in (layer.keys, layer.values) if isinstance(x, Tensor))


@CAUSAL_CASES
@pytest.mark.parametrize("length", [5, 100])
def test_the_state_of_a_decoder_is_what_its_cache_holds(variant, settings, length):
    model = build(variant, settings, is_decoder=True)
    with torch.no_grad():
        cache = model(inputs(1, length)).past_key_values
    for number, layer in enumerate(cache.layers):
        needed = costs.layer_state_size(model.config, number, length)
        span = getattr(layer, "span", None)
        if span is not None and length <= layer.num_prefix + 2 * span:  # it has not forgotten yet
            assert needed <= held(layer) == 2 * length * 32
        else:
            assert needed == held(layer)
    assert costs.state_size(model.config, length) == sum(
        costs.layer_state_size(model.config, number, length) for number in range(2)
    )


@pytest.mark.parametrize(("variant", "settings"), CASES, ids=IDS)
def test_the_table_has_what_the_functions_count(variant, settings):
    cfg = config(variant, settings)
    model = build(variant, settings)
    head, _, names, _, first, second = costs.costs_table(cfg, [7, 128]).splitlines()
    parameters = sum(p.numel() for p in model.parameters())
    assert head == f"{parameters:,} parameters, {4 * parameters / 2**20:,.1f} MB"
    assert "multiplications" in names
    for length, line in ((7, first), (128, second)):
        cells = line.strip("| ").split(" | ")
        assert cells[0] == str(length)
        assert cells[1] == f"{costs.forward_flops(model, length) / 2e6:,.1f}"
        assert cells[2] == f"{costs.attention_flops(cfg, length) / 2e6:,.1f}"
        decoder = costs.as_decoder(cfg)
        assert cells[4] == ("-" if decoder is None else f"{4 * costs.state_size(decoder, length) / 1024:,.1f}")
    assert not cfg.is_decoder


def test_full_attention_beside_it_has_the_same_sizes():
    sizes = {"hidden_size": 36, "num_attention_heads": 3, "is_decoder": True}
    cells = costs.costs_table(config(VARIANTS["linear"], {}, **sizes), [100]).splitlines()[-1].strip("| ").split(" | ")
    assert cells[3] == f"{costs.attention_flops(config(VARIANTS['full'], {}, **sizes), 100) / 2e6:,.1f}"


def test_who_has_no_state_and_who_has_no_room():
    assert costs.as_decoder(config(VARIANTS["fnet"], {})) is None
    assert costs.as_decoder(config(VARIANTS["sinkhorn"], {"block_size": 5, "sortcut_blocks": 3})) is None
    assert costs.as_decoder(config(VARIANTS["global"], {"global_token_type": "external"})) is None
    with pytest.raises(ValueError, match=r"is_decoder \(False\) must be True"):
        costs.state_size(config(VARIANTS["full"], {}), 10)
    with pytest.raises(ValueError, match=r"length \(129\) must lie between 1 and max_position_embeddings \(128\)"):
        costs.costs_table(config(VARIANTS["full"], {}), [129])
