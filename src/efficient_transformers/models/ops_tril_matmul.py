"""The product of a lower triangular matrix over positions and their features, for half the work of a full one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops_tracing import is_traced

ROWS = 512  # of the matrix at a time: a product large enough for full speed, a copy small enough for the cache


def triangular_product(weight: Tensor, x: Tensor) -> Tensor:
    """The lower triangle of `weight` (n, n) times `x` (b, n, f), (b, n, f) in `x.dtype`; the rest of it is ignored.

    O(n²·f). Chunks of rows leave out the columns after them. There is no second derivative.
    """
    if is_traced():
        return (weight.tril() @ x).to(x.dtype)
    return TriangularProduct.apply(weight, x)  # type: ignore[return-value]


def row_chunks(length: int) -> Iterator[tuple[int, int]]:
    """Where each chunk of rows begins and ends; its columns end there, too."""
    return ((start, min(start + ROWS, length)) for start in range(0, length, ROWS))


class TriangularProduct(torch.autograd.Function):
    """The loop over chunks, and the same going back: autograd would fill an n×n gradient for each of them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        product = torch.empty_like(x, memory_format=torch.contiguous_format)
        for start, stop in row_chunks(x.shape[1]):
            product[:, start:stop] = weight[start:stop, :stop].tril(start) @ x[:, :stop]
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, x = ctx.saved_tensors
        of_weight, of_x = torch.zeros_like(weight), torch.zeros_like(x)
        for start, stop in row_chunks(x.shape[1]):
            rows = gradient[:, start:stop].to(weight.dtype)
            of_x[:, :stop] += weight[start:stop, :stop].tril(start).T @ rows
            product = sum(row @ other.T for row, other in zip(rows, x[:, :stop].to(weight.dtype), strict=True))
            of_weight[start:stop, :stop] = product.tril(start)  # type: ignore[union-attr]
        return of_weight, of_x
