"""The parts of a tile: positions of rows, the keys that queries attend to, and masks on them.

A `Span` is a view of regularly spaced rows, an `Index` gathers arbitrary ones, `Joined` puts several of them side by
side. A `Read` is a set of keys with the `Patch`es that mask some of them, and a `Tile` is a set of queries with all its
reads. All positions are numbers, so that a tile is a view wherever possible. Nothing here involves autograd.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ops_scratch import SCRATCH


class Span(NamedTuple):
    """`size` positions from `start`, `step` apart. In a run of `count` tiles, those of tile t are shifted by t · `hop`.

    `of`, `put` and `add` take `x` (h, n, d) and `head`. None: all heads of a single tile, (h, size, d). A number: all
    tiles of a run in that head, (count, size, d).
    """

    start: int
    size: int
    step: int = 1
    count: int = 1
    hop: int = 0

    @property
    def stop(self) -> int:
        """One past the last position of the last tile."""
        return self.start + (self.size - 1) * self.step + (self.count - 1) * self.hop + 1

    @property
    def width(self) -> int:
        """Positions of one tile in one head."""
        return self.size

    def numbers(self, device: torch.device) -> Tensor:
        """The positions of the first tile, (size,)."""
        return torch.arange(self.start, self.start + self.size * self.step, self.step, device=device)

    def of(self, x: Tensor, head: int | None) -> Tensor:
        """The rows at these positions, as a view."""
        if head is None:
            return x[:, self.start : self.stop : self.step]
        x = x[head]
        row, column = x.stride()
        shape, strides = (self.count, self.size, x.shape[1]), (self.hop * row, self.step * row, column)
        return x.as_strided(shape, strides, x.storage_offset() + self.start * row)

    def put(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        self.of(x, head).copy_(rows)

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        """Add `rows` in place. Tiles of a run whose positions overlap are added in several turns."""
        view, turns = self.of(x, head), 1
        if self.count > 1 and not self.hop:  # all tiles have the same positions
            view[0].add_(rows.sum(0))
            return
        if self.count > 1 and self.hop % self.step == 0:
            turns = min(self.count, -(-self.size * self.step // self.hop))
        for turn in range(turns):
            view[turn::turns].add_(rows[turn::turns])


class Index(NamedTuple):
    """Arbitrary positions: (m,) for all heads and tiles, (h, m) for each head, (h, count, m) for each tile as well."""

    positions: Tensor
    count: int = 1

    @property
    def width(self) -> int:
        return self.positions.shape[-1]

    def numbers(self, device: torch.device) -> Tensor:
        return self.positions.to(device)

    def of(self, x: Tensor, head: int | None, name: str = "") -> Tensor:
        if head is None:
            return x.gather(1, self.spread(x))
        positions = self.positions if self.positions.dim() == 1 else self.positions[head]
        out = SCRATCH.take(f"gathered {name}", (positions.numel(), x.shape[-1]), x)
        rows = torch.index_select(x[head], 0, positions.flatten(), out=out)
        return rows.view(-1, positions.shape[-1], x.shape[-1]).expand(self.count, -1, -1)

    def put(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        assert head is None  # only the rows of global tokens are written by index
        x.scatter_(1, self.spread(x), rows)

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        if head is None:
            x.scatter_add_(1, self.spread(x), rows)
        else:
            positions = self.positions if self.positions.dim() == 1 else self.positions[head]
            x[head].index_add_(0, positions.expand(self.count, -1).flatten(), rows.flatten(0, 1))

    def spread(self, x: Tensor) -> Tensor:
        return self.positions.expand(x.shape[0], -1)[..., None].expand(-1, -1, x.shape[-1])


class Joined(NamedTuple):
    """Several positions, copied into one tensor: one large product is faster than several into parts of its rows."""

    parts: tuple[Span | Index, ...]
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)

    def of(self, x: Tensor, head: int | None, name: str = "") -> Tensor:
        rows = [part.of(x, head) for part in self.parts]
        return torch.cat(rows, 1, out=SCRATCH.take(name, (len(rows[0]), self.width, x.shape[-1]), x))

    def add(self, x: Tensor, head: int | None, rows: Tensor) -> None:
        for part, some in zip(self.parts, rows.split(self.widths, 1), strict=True):
            part.add(x, head, some)


class Patch(NamedTuple):
    """A bias of 0 or -inf on some columns of a read, broadcastable to (…, queries, columns).

    by_head: its first axis is the head, and in a run its second one is the tile.
    """

    columns: slice
    bias: Tensor
    by_head: bool = False

    def of(self, head: int | None) -> Tensor:
        return self.bias if head is None or not self.by_head else self.bias[head]


@dataclass(frozen=True)
class Read:
    """Keys that a tile of queries attends to, and the masks on them."""

    keys: Span | Index | Joined
    patches: tuple[Patch, ...] = ()

    def width(self, rows: Tensor) -> int:
        """Columns in the weight matrix."""
        return rows.shape[1]

    def dot(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        """Inner products of each query's `left` (…, queries, d) with `rows` (…, m, d) of the keys."""
        torch.bmm(left, rows.transpose(1, 2), out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Weighted sums of `rows` over the keys: (…, queries, d)."""
        return torch.bmm(weights, rows)

    def add(self, x: Tensor, head: int | None, weights: Tensor, left: Tensor) -> None:
        """The transpose of `mix`: x[keys] += weightsᵀ left, in place."""
        if head is None and isinstance(self.keys, Span):
            self.keys.of(x, None).baddbmm_(weights.transpose(1, 2), left)
        else:
            out = SCRATCH.take("sum", (len(weights), weights.shape[2], left.shape[2]), left)
            self.keys.add(x, head, torch.bmm(weights.transpose(1, 2), left, out=out))


@dataclass(frozen=True)
class OwnRead(Read):
    """The key at each query's own position: one column, computed elementwise instead of by a product."""

    def width(self, rows: Tensor) -> int:
        return 1

    def dot(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.sum(left * rows, -1, keepdim=True, out=out)

    def mix(self, weights: Tensor, rows: Tensor) -> Tensor:
        return weights * rows

    def add(self, x: Tensor, head: int | None, weights: Tensor, left: Tensor) -> None:
        self.keys.add(x, head, weights * left)


@dataclass(frozen=True)
class Tile:
    """Queries and the keys they attend to, or a run of such tiles of equal shape. No key is in two reads."""

    queries: Span | Index
    reads: tuple[Read, ...]
    is_global: bool = False

    def heads(self, num_heads: int) -> Iterable[int | None]:
        """Batches of its products: a single tile does all heads at once (None), a run all its tiles head by head."""
        return range(num_heads) if self.queries.count > 1 else (None,)

    def dot(self, left: Tensor, rows: list[Tensor], name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Products of the queries' `left` with the rows of all reads: one matrix, and views of its columns by read."""
        widths = [read.width(row) for read, row in zip(self.reads, rows, strict=True)]
        whole = SCRATCH.take(name, (*left.shape[:2], sum(widths)), left)
        columns = whole.split(widths, -1) if len(widths) > 1 else (whole,)
        for read, row, out in zip(self.reads, rows, columns, strict=True):
            read.dot(left, row, out)
        return whole, columns

    def weights(self, queries: Tensor, keys: list[Tensor], head: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """softmax(q·k) over the keys of all reads, in the form of `dot`. `queries` are already scaled."""
        whole, columns = self.dot(queries, keys, "weights")
        for read, scores in zip(self.reads, columns, strict=True):
            for patch in read.patches:
                scores[..., patch.columns].add_(patch.of(head))  # `+=` would write the columns twice
        return torch.softmax(whole, -1, out=whole), columns


def load(positions: Span | Index | Joined, x: Tensor, head: int | None, name: str = "") -> Tensor:
    """The rows at `positions`, read-only. Half precision is copied, because its products are faster on whole rows."""
    rows = positions.of(x, head) if isinstance(positions, Span) else positions.of(x, head, name)
    return rows.contiguous() if x.dtype in (torch.bfloat16, torch.float16) else rows
