"""Training with DistributedDataParallel as it comes: it waits for a gradient of every parameter in every step."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from zoo import CASES, IDS, SETTINGS, build, inputs_of, labels_for, pack_rows

from efficient_transformers import VARIANTS

LONGFORMER = VARIANTS["longformer"]
# settings in which something may be unused, besides those of the table
MORE = {
    "full-reversible": (VARIANTS["full"], {"reversible": True}),
    "global-reversible": (VARIANTS["global"], {"num_global_tokens": 2, "reversible": True}),
    "longformer-no-global": (LONGFORMER, {"attention_window": 6}),
    "longformer-no-global-rotary": (LONGFORMER, {"attention_window": 6, "position_embedding_type": "rotary"}),
    "longformer-no-global-reversible": (LONGFORMER, {"attention_window": 6, "reversible": True}),
    "rfa-gated": (VARIANTS["rfa"], {"gated": True}),
}
TABLE = dict(zip(IDS, CASES, strict=True)) | MORE


def trainable(variant, settings, head) -> bool:
    if settings.get("gated"):  # the gate is causal
        return head == "CausalLM"
    return head != "CausalLM" or not (settings.keys() & {"sortcut_blocks", "attend_across_buckets"})


ALL = [
    pytest.param(
        *case,
        head,
        id=f"{name}-{head}",
        marks=[] if case[1] is SETTINGS[case[0].slug][0] or name in MORE else pytest.mark.slow,
    )
    for name, case in TABLE.items()
    for head in case[0].config_class.heads
    if trainable(*case, head)
]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(("variant", "settings", "head"), ALL)
def test_every_step_has_a_gradient_of_every_parameter(variant, settings, head, process_group):
    model = build(variant, settings, head, standardize_pooled=True).train()
    parallel = DistributedDataParallel(model)
    for length in (1, 7, 1):  # a parameter without a gradient stops the next step
        model.zero_grad()
        ids = inputs_of(model, 2, length)
        parallel(ids, **labels_for(model, ids)).loss.backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("slug", ["longformer", "global", "big_bird"])
def test_packed_rows_have_a_gradient_of_every_parameter(slug):
    settings = {"longformer": {"attention_window": 6}}.get(slug, SETTINGS[slug][1])
    model = build(VARIANTS[slug], settings)
    rows = pack_rows([inputs_of(model, 1, 9), inputs_of(model, 1, 1)], width=12)
    model(**rows).pooler_output.sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_batch_without_global_tokens_follows_one_with_them(process_group):
    """Global tokens by the caller's marks: what one step uses and the next does not has a gradient of zero there."""
    model = build(LONGFORMER, {"attention_window": 6}, "TokenClassification")
    parallel, ids = DistributedDataParallel(model), inputs_of(build(LONGFORMER, {}), 2, 12)
    for marks in (torch.arange(12) < 2, torch.zeros(12)):
        model.zero_grad()
        parallel(ids, labels=ids % 2, global_attention_mask=marks.expand(2, -1).long()).loss.backward()
        used = [bool(p.grad.any()) for name, p in model.named_parameters() if "global_v_proj" in name]
        assert used == [bool(marks.any())] * 4
