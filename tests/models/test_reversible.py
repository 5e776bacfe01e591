"""The reversible stack: the gradients of ordinary autograd, without its memory."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ConfigRefused, build, config, inputs

from efficient_transformers import VARIANTS
from efficient_transformers.models.base_backbone import Backbone

STACKS = {
    "full": ("full", {"attention_probs_dropout_prob": 0.1}, False),
    "local": ("local", {"window_size": 3, "attention_probs_dropout_prob": 0.1}, False),
    "local-causal": ("local", {"window_size": 3, "position_embedding_type": "rotary"}, True),
    "external": ("global", {"num_global_tokens": 3, "global_token_type": "external"}, False),
    "longformer": ("longformer", {"attention_window": 6, "num_global_tokens": 1}, False),
    "big_bird": ("big_bird", {"block_size": 4, "attention_probs_dropout_prob": 0.1}, False),
    "reformer": ("reformer", {"lsh_chunk_length": 6, "attention_probs_dropout_prob": 0.1}, False),
    "reformer-causal": ("reformer", {"lsh_chunk_length": 6}, True),
    "routing": ("routing", {"num_clusters": 4, "window_size": 3}, False),
    "sinkhorn": ("sinkhorn", {"block_size": 7}, False),
    "linear": ("linear", {}, False),
    "linear-causal": ("linear", {}, True),
    "performer": ("performer", {"num_random_features": 20, "feature_redraw_interval": 1}, False),
    "rfa-causal": ("rfa", {"num_random_features": 16, "gated": True}, True),
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def reversible(stack=STACKS["local"], head=None, **changes) -> nn.Module:
    slug, settings, decoder = stack
    fields = {"num_hidden_layers": 3, "reversible": True, "is_decoder": decoder, **changes}
    return build(VARIANTS[slug], settings, head, **fields).train()


@contextmanager
def ordinary():
    """The same arithmetic by autograd, which keeps everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "recomputes", lambda *_: False)
        yield


def gradients(model: nn.Module, step) -> dict[str, Tensor]:
    """What `step` leaves in the parameters, from one and the same state of random numbers and buffers."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    torch.manual_seed(1)
    step(model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, buffer in state.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    return found


def compare(model: nn.Module, step, tolerance: float, model_by_autograd: nn.Module | None = None) -> None:
    """Gradients with and without the activations: the largest difference as a share of the largest gradient."""
    found = gradients(model, step)
    with ordinary():
        expected = gradients(model_by_autograd or model, step)
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values())
    errors = {name: (found[name] - grad).abs().max().item() / largest for name, grad in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e} over {tolerance:.1e}"


def loss_of(output: Tensor) -> Tensor:
    """In which every number counts differently: that of squares alone would not see what stands before a norm."""
    return (output.square() * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()


def backward(model, embeds: Tensor, **arguments) -> None:
    loss_of(model(inputs_embeds=embeds, **arguments).last_hidden_state).backward()


def runs_reversibly(output: Tensor) -> bool:
    """Is there a reversible layer in the graph of `output`?"""
    nodes = [output.grad_fn]
    while nodes and nodes[-1] is not None:
        if "ReversibleLayer" in nodes[-1].name():
            return True
        nodes.extend(node for node, _ in nodes.pop().next_functions if node is not None)
    return False


# gradients are those of autograd -------------------------------------------------------------------------------------


@every_stack
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_those_of_autograd(stack, padded, dropout):
    model = reversible(stack, hidden_dropout_prob=dropout)
    embeds, mask = torch.randn(3, 40, 32, dtype=torch.float64), torch.ones(3, 40, dtype=torch.long)
    if padded:
        mask[0, :13] = mask[1, 30:] = 0
        mask[2, ::3] = 0
    leaves = []

    def step(model):
        leaves.append(embeds.clone().requires_grad_())
        backward(model, leaves[-1], attention_mask=mask)

    assert runs_reversibly(model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)
    compare(model, step, 1e-10)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-9 * leaves[1].grad.abs().max().item())


@every_stack
def test_eight_layers_in_float32(stack):
    model = reversible(stack, num_hidden_layers=8, dtype=torch.float32, initializer_range=0.1, hidden_dropout_prob=0.1)
    embeds = torch.randn(2, 40, 32)
    compare(model, lambda model: backward(model, embeds), 1e-5)


@pytest.mark.parametrize("name", ["full", "local", "linear", "reformer"])
@pytest.mark.parametrize("kind", ["autocast", "scaled", "weights"])
def test_half_precision_loses_nothing_in_24_layers(name, kind):
    """Layers round to 8 bits; were their inputs not the same to the last bit, little would be left of the gradient."""
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    model = reversible(STACKS[name], num_hidden_layers=24, dtype=dtype, initializer_range=0.1, hidden_dropout_prob=0.1)
    embeds = torch.randn(2, 40, 32, dtype=dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=kind == "scaled")

    def step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "weights"):
            loss = loss_of(model(inputs_embeds=embeds).last_hidden_state.float())
        scaler.scale(loss).backward()  # outside of autocast, as accelerate and the Trainer do

    compare(model, step, 1e-5)


def test_a_backward_pass_inside_autocast():
    """The cache of cast weights, filled without a graph, must not stand in for weights that want a gradient."""
    model = reversible(dtype=torch.float32)
    embeds = torch.randn(2, 20, 32)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs_embeds=embeds)
            model(inputs_embeds=embeds, output_hidden_states=True).last_hidden_state.sum()
            backward(model, embeds)

    compare(model, step, 1e-5)


@every_stack
def test_feed_forward_by_chunks(stack):
    """Chunks that do not divide the length, each with its own dropout."""
    model = reversible(stack, chunk_size_feed_forward=7, hidden_dropout_prob=0.1)
    embeds = torch.randn(2, 40, 32, dtype=torch.float64)
    compare(model, lambda model: backward(model, embeds), 1e-10)


def test_feed_forward_by_chunks_in_the_ordinary_stack():
    """Chunks change no gradient where every activation is kept, either."""
    model = build(VARIANTS["local"], {"window_size": 3}).train()
    chunked = build(VARIANTS["local"], {"window_size": 3}, chunk_size_feed_forward=7).train()
    chunked.load_state_dict(model.state_dict())
    embeds = torch.randn(2, 40, 32, dtype=torch.float64)
    compare(chunked, lambda model: backward(model, embeds), 1e-10, model)


@pytest.mark.parametrize("head", ["MaskedLM", "CausalLM", "SequenceClassification"])
def test_gradients_add_up_over_batches(head):
    model = reversible(head=head, hidden_dropout_prob=0.1)
    batches = [inputs(2, 20), inputs(3, 33)]

    def step(model):
        for ids in batches:
            labels = ids if head.endswith("LM") else torch.arange(len(ids)) % 2
            output = model(ids, labels=labels)
            assert getattr(output, "past_key_values", None) is None  # a cache would be written into twice
            output.loss.backward()

    compare(model, step, 1e-10)


@pytest.mark.parametrize("trained", ["v_proj", "layers.1.", "layers.2.mlp"])
def test_some_parameters_are_trained(trained):
    """As adapters are; nothing else needs a gradient, not even what enters the stack."""
    model = reversible(hidden_dropout_prob=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    embeds = torch.randn(2, 40, 32, dtype=torch.float64)
    compare(model, lambda model: backward(model, embeds), 1e-10)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if trained in name
    }


@pytest.mark.parametrize("passes", ["one by one", "both, then the gradients"])
def test_features_drawn_again_between_the_passes(passes):
    model = reversible(STACKS["performer"])
    pair = torch.randn(2, 2, 40, 32, dtype=torch.float64)

    def step(model):
        if passes == "one by one":
            for embeds in pair:
                backward(model, embeds)
        else:
            first, second = (model(inputs_embeds=embeds).last_hidden_state for embeds in pair)
            (first * second).sum().backward()

    compare(model, step, 1e-10)


def test_random_numbers_go_on_where_they_would_have():
    model = reversible(hidden_dropout_prob=0.1)
    drawn = []

    def step(model):
        output = model(inputs_embeds=torch.ones(1, 30, 32, dtype=torch.float64)).last_hidden_state
        drawn.append(torch.rand(3))
        loss_of(output).backward()
        drawn.append(torch.rand(3))

    compare(model, step, 1e-10)
    assert drawn[0].equal(drawn[2])
    assert drawn[1].equal(drawn[3])


def test_hidden_states_are_those_of_the_stack():
    """The ordinary loop that gives them out computes the same numbers, and so do its gradients."""
    model, embeds = reversible(STACKS["external"]), torch.randn(2, 30, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    probe = torch.randn(2, 30, 32, dtype=torch.float64)
    grads = []
    for wanted in (False, True):
        output = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=wanted)
        assert runs_reversibly(output.last_hidden_state) is not wanted
        grads.append((output.last_hidden_state, *torch.autograd.grad((output.last_hidden_state * probe).sum(), embeds)))
    assert grads[0][0].equal(grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-10)


def test_parameters_are_those_of_the_ordinary_stack():
    model, plain = reversible(), reversible(reversible=False)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    ids = inputs(1, 20)
    assert not plain(ids).last_hidden_state.allclose(model(ids).last_hidden_state)  # but another model


# what a training loop may do -----------------------------------------------------------------------------------------


def test_gradients_are_taken_twice():
    model = reversible(hidden_dropout_prob=0.1)
    loss = loss_of(model(inputs(2, 20)).last_hidden_state)
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.layers.named_parameters()}
    loss.backward()
    for name, parameter in model.layers.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", ["a weight", "the mode"])
def test_what_has_changed_since_is_refused(change):
    model = reversible(hidden_dropout_prob=0.1)
    loss = model(inputs(2, 20)).last_hidden_state.sum()
    if change == "a weight":
        with torch.no_grad():
            model.layers[1].mixer.q_proj.weight.mul_(2)
    else:
        model.eval()
    with pytest.raises(
        RuntimeError, match="inplace operation" if change == "a weight" else r"call backward\(\) before"
    ):
        loss.backward()


def test_post_norm_is_refused():
    with pytest.raises(
        ConfigRefused, match=r"reversible \(True\) needs norm_first, which is False.*Set norm_first=True"
    ):
        config(VARIANTS["local"], {}, reversible=True, norm_first=False)


def test_replicas_of_data_parallel(monkeypatch):
    """Parameters of a replica are not in its `parameters()`."""
    module = torch.nn.parallel.replicate
    shared = lambda tensors, devices, detach=False: [[t * 1.0 for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setitem(module.__globals__, "_broadcast_coalesced_reshape", shared)
    model, ids = reversible(hidden_dropout_prob=0.1), inputs(4, 20)

    def step(model):
        replicas = module(model, [0, 1])
        outputs = [replica(part).last_hidden_state for replica, part in zip(replicas, ids.chunk(2), strict=True)]
        assert all(not list(replica.parameters()) for replica in replicas)
        loss_of(torch.cat(outputs)).backward()

    compare(model, step, 1e-10)


def work_on_one_row(rank: int, folder: str) -> None:
    """One of two processes: a batch of its own, gradients averaged by DistributedDataParallel, saved by the first."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.load(f"{folder}/model.pt", weights_only=False)
    parallel = nn.parallel.DistributedDataParallel(model)
    ids = torch.load(f"{folder}/ids.pt")
    for _ in range(2):  # the second pass has the buckets of the first
        parallel(ids[rank : rank + 1]).logits.square().sum().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/grads.pt")
    del (
        parallel
    )  # first: as the last owner of the group, it would wait for a thread that waits for the interpreter's lock
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    model, ids = reversible(STACKS["linear"], "MaskedLM"), inputs(2, 20)
    torch.save(model, tmp_path / "model.pt")
    torch.save(ids, tmp_path / "ids.pt")
    torch.multiprocessing.spawn(work_on_one_row, (str(tmp_path),), nprocs=2)
    model(ids).logits.square().sum().backward()  # the mean of two rows, twice
    found = torch.load(tmp_path / "grads.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


# memory --------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes in tensors made since it was entered, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.known | given:
                self.known.add(key)
                self.now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.freed, key, x.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def peak_bytes(depth: int, **changes) -> int:
    """Of a step on 256 tokens, without parameters and their gradients."""
    sizes = {"hidden_size": 64, "intermediate_size": 512, "max_position_embeddings": 256, "dtype": torch.float32}
    model = reversible(STACKS["linear"], num_hidden_layers=depth, hidden_dropout_prob=0.1, **sizes, **changes)
    model(inputs(1, 256)).last_hidden_state.sum().backward()  # gradients and masks are there
    with LiveBytes() as live:
        model(inputs(1, 256)).last_hidden_state.sum().backward()
    return live.peak


@pytest.mark.parametrize("chunk", [0, 32])
def test_memory_is_flat_in_depth(chunk):
    peaks = [peak_bytes(depth, chunk_size_feed_forward=chunk) for depth in (2, 4, 8, 16)]
    assert max(peaks) < 1.1 * min(peaks), peaks


def test_memory_of_the_ordinary_stack_is_not():
    """What the accounting above would see."""
    peaks = [peak_bytes(depth, reversible=False) for depth in (2, 4, 8, 16)]
    steps = [(deep - flat) / depth for flat, deep, depth in zip(peaks, peaks[1:], (2, 4, 8), strict=False)]
    assert max(steps) < 1.1 * min(steps), peaks
    assert peaks[-1] > 6 * peaks[0]


@pytest.mark.parametrize("stacked", [True, False], ids=["reversible", "ordinary"])
def test_chunks_of_the_feed_forward_save_memory(stacked):
    whole, chunked = (peak_bytes(4, reversible=stacked, chunk_size_feed_forward=size) for size in (0, 32))
    assert chunked < 0.8 * whole
