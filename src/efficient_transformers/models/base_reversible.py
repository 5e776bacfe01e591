r"""Reversible layers: a stack whose activations are computed again from its output instead of being kept.

.. math:: Y_1 = X_1 + F(X_2), \quad Y_2 = X_2 + G(Y_1) \qquad\Longrightarrow\qquad
          X_2 = Y_2 - G(Y_1), \quad X_1 = Y_1 - F(X_2)

Gomez et al. 2017 (arXiv:1707.04585), section 3.1; for a Transformer, with attention as F and the feed-forward as G,
Kitaev et al. 2020 (arXiv:2001.04451), section 3. The memory of a training step is then that of one layer, whatever the
depth, for one more forward pass. G works on each position alone, so a chunk of positions at a time will do.

A block has F as `mix(hidden, sequence)`, which also gives weights that are not needed here, G as `feed_forward(hidden)`
and for some of the positions as `feed_forward_chunk(hidden)`, and `chunk_size`, how many at a time, or 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from .base_mixer import SequenceInfo
from .ops_tracing import is_traced


def reversible_stack(blocks: Sequence[nn.Module], hidden: Tensor, sequence: SequenceInfo) -> Tensor:
    """The mean of both streams after the last block; both start as `hidden` (b, n, e).

    Gradients equal those of autograd, except for the rounding of the recomputed streams. There is no second derivative.
    Raises RuntimeError in a backward pass whose parameters or training mode are no longer those of the forward pass.
    """
    run = StackPass(list(blocks), sequence, autocast_as_now(hidden.device.type))
    x1 = x2 = wide(hidden)
    shared = [] if sequence.shared is None else trained_parameters(sequence.shared)
    for number, block in enumerate(blocks):
        x1, x2 = ReversibleLayer.apply(run, number, x1, x2, *trained_parameters(block), *shared)  # type: ignore[misc]
    return Mean.apply(run, x1, x2).to(hidden.dtype)  # type: ignore[union-attr]


def wide(hidden: Tensor) -> Tensor:
    """`hidden` in the dtype of a stream, in which no more is rounded off than the layers can bear.

    That is float32, and float64 where layers round to less: half precision, autocast, TF32. A sum of numbers of 8 or 11
    bits is exact in float64, so each layer meets its input bit for bit again. In float32 it does not, the rounding of
    the layers makes much of little, and in 16 of them nothing may be left of the gradient.
    """
    if is_traced():  # a traced pass keeps its activations
        return hidden
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    rough = hidden.dtype.itemsize < 4 or autocast or torch.get_float32_matmul_precision() != "highest"
    least = torch.float64 if rough and kind != "mps" else torch.float32  # there is no float64 on mps
    return hidden.to(torch.promote_types(hidden.dtype, least))


@dataclass
class StackPass:
    """State that the layers share between a forward pass and its backward pass."""

    blocks: list[Any]
    sequence: SequenceInfo  # with what the mixers have chosen by the data
    autocast: Callable[[], AbstractContextManager]  # as the forward pass found it
    streams: tuple[Tensor, Tensor] | None = None  # after the layer whose backward pass is next

    def differentiate(
        self, rule: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """y = rule(x) again, and from the `gradient` of y those of x and of the parameters, None where it has none."""
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self.autocast():
            y = rule(x)
        of_x, *found = torch.autograd.grad(y, (x, *parameters), gradient, allow_unused=True)
        return y.detach(), of_x, list(found)


class ReversibleLayer(torch.autograd.Function):
    """One block, of which autograd keeps nothing: going back it finds its output in `run`, and leaves its input there.

    A function for each layer and not one for the whole stack: gradients of parameters leave layer by layer, so that
    they can be summed over batches or processes, or used up, while the layers below are still at work.
    """

    @staticmethod
    def forward(
        ctx: Any, run: StackPass, number: int, x1: Tensor, x2: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        block = run.blocks[number]
        ctx.run, ctx.number, ctx.training, ctx.parameters = run, number, block.training, parameters
        ctx.save_for_backward(*parameters)  # no extra memory: autograd checks that they are not modified
        with run.autocast():
            ctx.before_mixing = RandomState(x2)
            y1 = x1 + block.mix(x2, run.sequence)[0]
            ctx.before_feeding = RandomState(x2)
            y2 = x2 + block.feed_forward(y1)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Any, ...]:
        run, number, parameters, _ = ctx.run, ctx.number, ctx.parameters, ctx.saved_tensors
        block = run.blocks[number]
        if block.training != ctx.training:
            raise RuntimeError(
                f"layer {number} ran forward with training={ctx.training} and is to run again with "
                f"training={block.training}: call backward() before train() or eval()."
            )
        (y1, y2), run.streams = run.streams, None
        found: list[Tensor | None] = [None] * len(parameters)
        x2, d1 = y2.clone(), d1.clone()
        with ctx.before_feeding.again():
            for rows in chunks(y1.shape[1], block.chunk_size):
                fed, d, more = run.differentiate(block.feed_forward_chunk, y1[:, rows], d2[:, rows], parameters)
                x2[:, rows] -= fed
                d1[:, rows] += d
                found = [plus(a, b) for a, b in zip(found, more, strict=True)]
        del y2
        with ctx.before_mixing.again():
            mixed, d, more = run.differentiate(lambda x: block.mix(x, run.sequence)[0], x2, d1, parameters)
        run.streams = (y1 - mixed, x2) if number else None
        return None, None, d1, d2 + d, *(plus(a, b) for a, b in zip(found, more, strict=True))


class Mean(torch.autograd.Function):
    """(Y1 + Y2) / 2, which keeps both streams and hands them to the last layer in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: StackPass, y1: Tensor, y2: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(y1, y2)
        return (y1 + y2) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[None, Tensor, Tensor]:
        y1, y2 = ctx.saved_tensors
        ctx.run.streams = y1.detach(), y2.detach()
        return None, d / 2, d / 2


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients."""
    return a if b is None else b if a is None else a + b


def chunks(length: int, size: int) -> list[slice]:
    """Neighbouring slices of `size` positions, or one of all of them where `size` is 0."""
    return [slice(start, start + (size or length)) for start in range(0, length, size or length)]


def trained_parameters(block: nn.Module) -> list[Tensor]:
    """The parameters of a block that want a gradient; also those of a replica that nn.DataParallel made."""
    tables = [[m._parameters, getattr(m, "_former_parameters", {})] for m in block.modules()]
    return [p for pair in tables for table in pair for p in table.values() if p is not None and p.requires_grad]


class RandomState:
    """States of the random number generators of the CPU and of the device of `x`."""

    def __init__(self, x: Tensor):
        self.kind, self.cpu = x.device.type, torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Restore these states inside the context, and the previous ones after it."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield


def autocast_as_now(kind: str) -> Callable[[], AbstractContextManager]:
    """A function that enters the present autocast of the CPU and of the device `kind`, but for its cache of weights.

    What that cache holds since a pass without a graph would have no gradient in one that has.
    """
    kinds = [each for each in {"cpu", kind} if torch.amp.is_autocast_available(each)]
    states = [(each, torch.get_autocast_dtype(each), torch.is_autocast_enabled(each)) for each in kinds]

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for each, dtype, enabled in states:
                stack.enter_context(torch.autocast(each, dtype, enabled, cache_enabled=False))
            yield

    return again
