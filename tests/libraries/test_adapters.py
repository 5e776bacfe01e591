"""An adapter that is trained, saved and loaded on a fresh base gives the same logits: nothing is learnt beside it."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from zoo import SETTINGS, build, for_head, inputs_of, labels_for

from efficient_transformers import VARIANTS

HEADS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "CAUSAL_LM": "CausalLM",
    "QUESTION_ANS": "QuestionAnswering",
}
# training moves buffers of these (k-means, features that are drawn again), if their settings say so
MOVING_BUFFERS = {"routing": {}, "performer": {"feature_redraw_interval": 2}, "rfa": {"feature_redraw_interval": 2}}
CONFIGS = {
    "lora": lambda targets: LoraConfig(r=2, target_modules=targets),
    # PEFT leaves out the classifier of sequence classification alone
    "all-linear": lambda targets: LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=["classifier", "qa_outputs"]
    ),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
}


def targets_of(model) -> list[str]:
    """Values and what enters the MLP, of whatever the variant has."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names & {"v_proj", "up_proj"})


def base_on_disk(slug, folder, task, source):
    """A checkpoint whose head is not the one it is adapted for: a masked language model, a body, or else a decoder."""
    variant, settings = VARIANTS[slug], {**SETTINGS[slug][0], **MOVING_BUFFERS.get(slug, {})}
    changes = {"dtype": torch.float32, "is_decoder": task == "CAUSAL_LM", "standardize_pooled": True}
    build(variant, settings, None if task == "CAUSAL_LM" else source, **changes).save_pretrained(folder)
    return variant.model_class(HEADS[task])


def train(model, ids, base, count=4, rate=0.05):
    """A few steps in train mode, on which the base would move its buffers."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, **labels_for(base, ids)).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    model.eval()


def outputs(model, ids):
    with torch.no_grad():
        return torch.cat([x.flatten() for x in model(input_ids=ids).to_tuple() if isinstance(x, torch.Tensor)])


def is_fast(slug, task, kind, source) -> bool:
    """The new pooler in every variant once, and the moving buffers of a body."""
    if task == "SEQ_CLS":
        return source is not None and kind == ("ia3" if slug in ("full", "linformer") else "all-linear")
    return slug in MOVING_BUFFERS and (task, kind, source) == ("TOKEN_CLS", "lora", "MaskedLM")


ALL = [
    (slug, task, kind, source)
    for slug, variant in VARIANTS.items()
    for task in HEADS
    for kind in CONFIGS
    for source in ("MaskedLM", None)
    if task != "CAUSAL_LM" or (variant.causal and source is None)
]
TABLE = [pytest.param(*row, id="-".join(map(str, row)), marks=[] if is_fast(*row) else pytest.mark.slow) for row in ALL]


@pytest.mark.parametrize(("slug", "task", "kind", "source"), TABLE)
def test_a_saved_adapter_gives_the_same_logits(slug, task, kind, source, tmp_path):
    model_class = base_on_disk(slug, tmp_path / "base", task, source)
    base = model_class.from_pretrained(tmp_path / "base")
    ids = inputs_of(base, 4, 24)
    config = CONFIGS[kind](targets_of(base))
    config.task_type = task
    wrapped = get_peft_model(base, config)
    untrained = outputs(wrapped.eval(), ids)
    train(wrapped, ids, base)
    trained = outputs(wrapped, ids)
    assert (trained - untrained).abs().max() > 1e-3
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)  # what is new in the base is drawn otherwise
    fresh = PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(fresh, ids), trained, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(fresh.merge_and_unload(), ids), trained, rtol=1e-4, atol=1e-5)


def buffers(model) -> dict:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("slug", MOVING_BUFFERS)
def test_buffers_move_with_their_own_parameters_alone(slug):
    """In a model that is trained as a whole they follow the data; frozen, they stay; a copy for an adapter is saved."""
    settings = {**SETTINGS[slug][0], **MOVING_BUFFERS[slug]}
    model = build(VARIANTS[slug], settings, "SequenceClassification", dtype=torch.float32, standardize_pooled=True)
    ids = inputs_of(model, 4, 24)
    start = buffers(model)
    model.model.layers.requires_grad_(False)
    train(model, ids, model, count=2)
    moved = {name for name, buffer in buffers(model).items() if not buffer.equal(start[name])}
    assert moved == {"model.pooler.norm.mean", "model.pooler.norm.variance", "model.pooler.norm.seen"}
    model.requires_grad_(True)
    train(model, ids, model, count=2)
    moved = {name for name, buffer in buffers(model).items() if not buffer.equal(start[name])}
    assert len([name for name in moved if ".layers." in name]) >= 2 * 2


def test_the_pooler_has_a_second_name_for_adapters_alone(tmp_path):
    """Two adapters on one base each have a pooler of their own; parameters and checkpoints have the first name only."""
    model_class = base_on_disk("full", tmp_path, "SEQ_CLS", "MaskedLM")
    model = model_class.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert not any("pooler_classifier" in name for name in (*names, *model.state_dict(), *dict(model.named_modules())))
    assert {
        "model.pooler.dense.weight",
        "model.pooler.dense.bias",
        "model.pooler.norm.mean",
    } <= model.state_dict().keys()
    ids, config = inputs_of(model, 4, 12), LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    wrapped = get_peft_model(model, config, adapter_name="one")
    train(wrapped, ids, model)
    one = outputs(wrapped, ids)
    wrapped.add_adapter("two", LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    wrapped.set_adapter("two")
    train(wrapped, ids, model, count=2)
    two = outputs(wrapped, ids)
    wrapped.save_pretrained(tmp_path / "adapters")
    fresh = PeftModel.from_pretrained(model_class.from_pretrained(tmp_path), tmp_path / "adapters" / "one", "one")
    fresh.load_adapter(tmp_path / "adapters" / "two", "two")
    for name, expected in (("one", one), ("two", two)):
        fresh.set_adapter(name)
        torch.testing.assert_close(outputs(fresh.eval(), ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["MultipleChoice", "ImageClassification"])
def test_naming_the_classifier_saves_the_pooler(head, tmp_path):
    """PEFT has no task for these heads: `modules_to_save=["classifier"]`, as its documentation has it for images."""
    variant = VARIANTS["local"]
    changes = for_head(head) | {"dtype": torch.float32}
    build(variant, SETTINGS["local"][0], **changes).save_pretrained(tmp_path / "base")
    model = variant.model_class(head).from_pretrained(tmp_path / "base")
    images = inputs_of(model, 2, 12)
    given = {model.main_input_name: images, "labels": torch.tensor([0, 1])}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    wrapped(**given).loss.backward()
    optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    fresh = PeftModel.from_pretrained(
        variant.model_class(head).from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(**given).logits, wrapped.eval()(**given).logits)
