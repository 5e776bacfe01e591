"""`attn_implementation="eager"` takes another path than "sdpa": otherwise a comparison of the two shows nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import MODES, build, inputs

# one matrix product over positions is all there is: the fast path is the formula
ONE_PATH = {
    *(f"mlp_mixer-{name}-encoder" for name in ("default", "post_norm", "reversible")),
    *(f"gmlp-{name}-encoder" for name in ("default", "post_norm")),
}

NAMED = [pytest.param(*mode.values, mode.id, id=mode.id) for mode in MODES]
every_mode = pytest.mark.parametrize(("variant", "settings", "causal", "name"), NAMED)


class Recorder(TorchDispatchMode):
    """Operations and the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((str(func), tuple(out.shape) if isinstance(out, torch.Tensor) else None))
        return out


def operations(model, ids) -> list[tuple]:
    with torch.no_grad():
        model(ids)  # what is made once and kept is made here
        with Recorder() as recorder:
            model(ids)
    return recorder.operations


@every_mode
def test_eager_takes_another_path(variant, settings, causal, name):
    model, ids = build(variant, settings, is_decoder=causal, use_cache=False), inputs(2, 90)
    assert model.config._attn_implementation == "sdpa"
    fast = operations(model, ids)
    assert operations(model, ids) == fast
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert (operations(model, ids) == fast) == (name in ONE_PATH)
    model.set_attn_implementation("sdpa")
    assert operations(model, ids) == fast


@every_mode
def test_a_head_hands_the_implementation_on(variant, settings, causal, name):
    model = build(variant, settings, "CausalLM" if causal else "TokenClassification")
    model.set_attn_implementation("eager")
    assert model.model.config._attn_implementation == "eager"
    assert all(layer.mixer.config._attn_implementation == "eager" for layer in model.model.layers)
