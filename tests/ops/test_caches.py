"""Everything that is kept between calls has a bound."""

import gc
import importlib
import pkgutil

import pytest
import torch

from efficient_transformers import EtMixedConfig, EtMixedModel, any_model, models
from efficient_transformers.models import attn_pattern, attn_pattern_tiled

MODULES = [
    importlib.import_module(f"{package.__name__}.{found.name}")
    for package in (models, any_model)
    for found in pkgutil.iter_modules(package.__path__)
]


def caches():
    """The functools caches of the modules, by name."""
    return {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name, value in vars(module).items()
        if hasattr(value, "cache_parameters") and value.__module__.startswith("efficient_transformers")
    }


def test_every_cache_has_a_bound():
    found = caches()
    assert len(found) > 8
    assert not [name for name, cache in found.items() if cache.cache_parameters()["maxsize"] is None]


def kept_bytes():
    """The bytes of all tensors that hold data (traced graphs leave others), each storage once."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("patterns", [["local:4"], ["local:4", "stride:8:2"]], ids=["one", "two"])
def test_masks_of_varied_lengths_are_not_all_kept(monkeypatch, patterns):
    heads, longest = 2, 320
    monkeypatch.setattr(attn_pattern_tiled, "SMALL_MASK", 2 * 16**2)
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 4}
    config = EtMixedConfig(
        head_patterns=patterns, num_attention_heads=heads, max_position_embeddings=longest, type_vocab_size=0, **sizes
    )
    model = EtMixedModel(config).eval()
    for cache in caches().values():
        cache.cache_clear()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
        before = kept_bytes()
        lengths = sorted({attn_pattern_tiled.mask_size(length, *()) for length in range(9, longest + 1)})
        for length in lengths:
            model(torch.ones(1, length, dtype=torch.long))
    masks = [4 * heads * length**2 for length in lengths]
    bound = 16 * 4 * 2 * 16**2 + 2 * max(masks)
    assert sum(masks) > 1.3 * bound  # all of them would be too much
    assert kept_bytes() - before < bound + 100_000
    for module in (attn_pattern, attn_pattern_tiled):
        assert module.small_biases.cache_info().currsize <= 16
        assert module.large_biases.cache_info().currsize <= 2
