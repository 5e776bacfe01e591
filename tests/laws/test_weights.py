"""Weights: saving and loading, the meta device, initialisation, gradients of every parameter, one batch is learned."""

import io
from copy import deepcopy

import pytest
import torch
import transformers
from zoo import SETTINGS, build, can_be_causal, config, every_case, every_head, for_head, inputs, inputs_of, loss_of

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_kernel_attention import KernelConfig

pytestmark = pytest.mark.usefixtures("never_short")


@pytest.mark.sampled(40)
@every_head
def test_saving_and_loading_changes_nothing(variant, head, tmp_path):
    model = build(variant, SETTINGS[variant.slug][0], head, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"AutoModelFor{head}")
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is variant.model_class(head)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = inputs_of(model, 2, 9)
    for a, b in zip(model(ids).to_tuple(), loaded.eval()(ids).to_tuple(), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.equal(b)
    for name, value in model.config.to_dict().items():
        assert loaded.config.to_dict()[name] == value or name in ("_name_or_path", "dtype"), name
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@every_case
def test_every_tensor_is_made_where_the_caller_wants_it(variant, settings):
    """As in `with torch.device("cuda"):`, also those that are drawn on the CPU."""
    with torch.device("meta"):
        model = variant.model_class()(config(variant, settings))
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


@every_head
def test_initialisation_after_the_meta_device_leaves_nothing_out(variant, head):
    """`init_weights` sets every weight, whatever it held; constants equal those of a model built directly."""

    def initialise(model):
        for holder in (*model.modules(), *model.parameters()):
            holder._is_hf_initialized = False
        transformers.set_seed(3)
        model.init_weights()
        return model.state_dict()

    cfg = config(variant, SETTINGS[variant.slug][-1], **for_head(head))
    direct = variant.model_class(head)(cfg)
    built = {name: weight.clone() for name, weight in direct.state_dict().items()}
    with torch.device("meta"):
        empty = variant.model_class(head)(cfg)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu")
    empty.tie_weights()
    for parameter in empty.parameters():  # whatever is left uninitialised must show
        torch.nn.init.constant_(parameter, float("nan"))
    again = initialise(direct)
    for name, weight in initialise(empty).items():
        assert weight.equal(again[name]), name
        if weight.numel() < 2:
            continue
        if built[name].unique().numel() == 1:
            assert weight.equal(built[name]), name
        else:  # another draw from the same distribution: within five standard errors of the ratio
            ratio = weight.double().std() / built[name].double().std()
            assert abs(ratio - 1) < 5 / weight.numel() ** 0.5, name


@every_head
def test_every_parameter_gets_a_gradient(variant, head):
    for settings in SETTINGS[variant.slug]:
        if head == "CausalLM" and not can_be_causal(variant, settings):
            continue  # refused by the config
        model = build(variant, settings, head).train()
        loss_of(model, head).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        # a softmax over keys, or over choices, does not see what is added to all of them
        unseen = {"classifier.bias"} if head == "MultipleChoice" else set()
        assert {name for name in without if not name.endswith("k_proj.bias")} <= unseen


@every_case
def test_eval_is_deterministic_and_dropout_is_not(variant, settings):
    rates = {"hidden_dropout_prob": 0.2}
    if variant.attention and not issubclass(variant.config_class, KernelConfig):
        rates["attention_probs_dropout_prob"] = 0.2
    model = build(variant, settings, **rates)
    ids = inputs(2, 30)
    assert model(ids).last_hidden_state.equal(model(ids).last_hidden_state)
    model.train()
    assert not model(ids).last_hidden_state.equal(model(ids).last_hidden_state)
    start = deepcopy(model.state_dict())  # buffers may move with each pass
    torch.manual_seed(5)
    first = model(ids).last_hidden_state
    model.load_state_dict(start)
    torch.manual_seed(5)
    assert model(ids).last_hidden_state.equal(first)


@pytest.mark.sampled(6)
@every_case
def test_one_batch_is_learned(variant, settings):
    model = build(variant, settings, "SequenceClassification", dtype=torch.float32, initializer_range=0.05).train()
    ids, labels = inputs(8, 60), torch.arange(8) % 2
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05


def test_pickling_a_model_keeps_it():
    model = build(VARIANTS["mixed"], SETTINGS["mixed"][0])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    ids = inputs(1, 20)
    assert torch.load(buffer, weights_only=False)(ids).last_hidden_state.equal(model(ids).last_hidden_state)
