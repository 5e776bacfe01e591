"""Detect a forward pass that is recorded as a graph, in which no branch may depend on the values of a tensor."""

import torch
from torch import Tensor


def is_traced() -> bool:
    """Return True while a graph is recorded: by `torch.compile`, `torch.export`, `torch.jit.trace` or an ONNX exporter.

    Ask this before looking at values (`bool(mask.all())`, `.tolist()`), and before a fast path that a graph cannot
    hold (a Python loop over rows, an `autograd.Function` with buffers of its own). `torch.jit.trace` in particular
    evaluates a branch on the values of its example and silently records only the branch taken.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Return True while a graph is recorded that will run without Python: all of `is_traced` but `torch.compile`."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def check_exporter(model: str) -> None:
    """Raise ValueError in the legacy ONNX exporter, which turns sizes of its example into constants without a word."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"{model} cannot be exported by torch.onnx.export(…, dynamo=False), whose graphs are wrong for other batch "
            "sizes, lengths and masks than those of the example: use dynamo=True, with dynamic_shapes."
        )


def count_blocks(length: int, size: int) -> int:
    """Return how many blocks of `size` hold `length` tokens; one more where `length` is symbolic.

    Tracing specialises a size that may be 1 to exactly 1, so a symbolic count has to be 2 at least. Blocks beyond the
    end have to be masked anyway. One division, because guards on sums of divisions are not proven.
    """
    return (length + (1 if isinstance(length, int) else 2) * size - 1) // size


def first_positions(x: Tensor, length: int, *axes: int) -> Tensor:
    """The first `length` entries of `x` along each of `axes`."""
    for axis in axes:
        if is_traced():  # a slice would ask how a traced length compares
            x = x.index_select(axis, torch.arange(length, device=x.device))
        elif length < x.shape[axis]:  # skip a no-op slice: its backward copies a full-size gradient
            x = x.narrow(axis, 0, length)
    return x
