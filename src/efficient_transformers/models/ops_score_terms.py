"""Attention scores as a sum of terms, each a formula over a few tensors that can be evaluated tile by tile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_tracing import first_positions

Places = tuple[Tensor, Tensor]  # positions of the queries (b, n) and of the keys (b, m)


@dataclass(frozen=True)
class Term:
    """One term: `rule(*tensors, keys)` returns scores (…, q, ≥ keys) from tensors (b or 1, h or 1, …) cut to a tile.

    cuts: for each tensor, how a tile cuts its axes 2 and 3: "q" by its queries, "k" by its keys, "-" not at all.
    """

    rule: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    cuts: tuple[str, ...]


def product(q: Tensor, k: Tensor) -> Term:
    """The term q·k of `q` (b or 1, h, n, f) and `k` (b or 1, h, m, f)."""
    return Term(lambda q, k, keys: q @ k.transpose(-1, -2), (q, k.to(q.dtype)), ("q-", "k-"))


def matrix(scores: Tensor, share: Tensor | None = None) -> Term:
    """The term `scores` (b or 1, h, n, m), times `share` (1, 1, 1, 1) if there is one."""
    if share is None:
        return Term(lambda scores, keys: scores, (scores,), ("qk",))
    return Term(lambda scores, share, keys: scores * share, (scores, share), ("qk", "--"))


def outer(a: Tensor, b: Tensor, key_positions: Tensor | None = None) -> Term:
    """The term a[j // c]·b[j mod c] for key position j, with `a` (b or 1, h, n, ⌈N/c⌉) and `b` (b or 1, h, n, c).

    The keys are at `key_positions` (b, m); None means 0, 1, 2, ….
    """
    period = b.shape[-1]
    if key_positions is not None:
        quotient, remainder = (
            x[:, None, None].expand(*a.shape[:3], -1) for x in (key_positions // period, key_positions % period)
        )
        return matrix(a.gather(3, quotient) * b.gather(3, remainder))

    def rule(a: Tensor, b: Tensor, keys: int) -> Tensor:
        quotients = -(-keys // period)
        return (a[..., :quotients, None] * b[..., None, :]).flatten(-2)

    return Term(rule, (a, b), ("q-", "q-"))


def table_rows(table: Tensor, length: int, positions: Tensor | None) -> Tensor:
    """Rows of `table` (h, N, f): the first `length`, (1, h, n, f), or those at `positions` (b, m), (b, h, m, f)."""
    if positions is None:
        return first_positions(table, length, 1)[None]
    return table[:, positions].transpose(0, 1)


def table_entries(table: Tensor, length: int, places: Places | None) -> Tensor:
    """Entries of `table` (h, N, N): the first `length` rows and columns, (1, h, n, n), or those at `places`."""
    if places is None:
        return first_positions(table, length, 1, 2)[None]
    i, j = places
    return table[:, i[..., None], j[:, None]].transpose(0, 1)


def as_one_product(terms: list[Term], v: Tensor) -> list[Tensor]:
    """Queries, keys and values of one width whose scaled dot products are the sum of `terms`, all of them products.

    Returns three tensors (b, h, n, max(d, Σ f)), padded with zeros on the right.
    """
    pairs = zip(*(term.tensors for term in terms), strict=True)
    q, k = (torch.cat([x.expand(v.shape[0], -1, -1, -1) for x in some], -1) for some in pairs)
    width = max(q.shape[-1], v.shape[-1])
    return [F.pad(x.to(v.dtype), (0, width - x.shape[-1])) for x in (q * width**0.5, k, v)]  # engines divide by √width
