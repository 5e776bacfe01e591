"""The cache of Sparse Sinkhorn Attention: keys and values in blocks, and summaries of the blocks to sort them by."""

from collections.abc import Callable

import torch
from torch import Tensor

from .attn_dense import softmax_attention
from .attn_sinkhorn import in_blocks, sinkhorn_attention, sort_blocks
from .base_cache import SegmentCacheLayer, is_closed

Sort = Callable[[Tensor, Tensor], Tensor]  # sums and first tokens of the blocks, (b, c, e) each -> order (b, h, c, c)


class SinkhornCacheLayer(SegmentCacheLayer):
    """Keys and values in blocks, by position in the row, and the inputs of the sorting network.

    stored: by name, with room to grow along axis 1, zero where no token is: `keys` and `values` (b, c, s, h, d), the
        sums of the hidden states of each block and the first one of each, `sums` and `firsts` (b, c, e).
    tokens: number of real tokens of each row, (b,).
    count: blocks of the longest row.
    sorted: keys and values of the sorted block for the newest token, (b, h, s, d); None if not computed yet.
    """

    kept = "sums over the tokens of each block"

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.reset()

    def reset(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self.tokens: Tensor | None = None
        self.waiting: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.sorted: tuple[Tensor, Tensor] | None = None
        self.cumulative_length = self.count = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated by the first tokens."""

    def update(self, hidden: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *args, **kwargs) -> None:  # type: ignore[override]
        """Add hidden states (b, n, e) and keys and values (b, h, n, d) of tokens at `positions` (b, n), -1 at none."""
        self.write()
        self.waiting = hidden, keys, values, positions  # written on the next access, which training never makes
        self.cumulative_length += positions.shape[1]

    def write(self) -> None:
        """Write the waiting tokens to their blocks."""
        if self.waiting is None:
            return
        hidden, keys, values, positions = self.waiting
        self.waiting = None
        row, column = (positions >= 0).nonzero(as_tuple=True)
        block, token = positions[row, column] // self.size, positions[row, column] % self.size
        sums = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        self.count = max(self.count, 1, int(positions.max()) // self.size + 1)  # a block even if all is padding
        for name, x in (("keys", keys), ("values", values), ("sums", sums), ("firsts", hidden)):
            self.make_room(name, x)
        self.stored["keys"][row, block, token] = keys[row, :, column]
        self.stored["values"][row, block, token] = values[row, :, column]
        self.stored["sums"].index_put_((row, block), sums[row, column], accumulate=True)
        start = token == 0
        self.stored["firsts"][row[start], block[start]] = hidden[row[start], column[start]]
        newest = positions.amax(1) + 1
        self.tokens = newest if self.tokens is None else torch.maximum(self.tokens, newest)
        self.sorted = None if bool(start.any()) or positions.shape[1] > 1 else self.sorted

    def make_room(self, name: str, like: Tensor) -> None:
        """Ensure that `stored[name]` has `count` writable blocks, and allocate more if necessary."""
        old = self.stored.get(name)
        if old is None or old.shape[1] < self.count or torch.is_grad_enabled() or is_closed(old):
            own = (self.size, like.shape[1], like.shape[3]) if like.dim() == 4 else like.shape[2:]
            new = like.new_zeros(len(like), self.count + self.count // 4 + 1, *own)
            if old is not None:
                new[:, : old.shape[1]] = old[:, : new.shape[1]]
            self.stored[name] = new

    def blocks(self, name: str) -> Tensor:
        """Keys or values of all stored blocks, (b, h, c, s, d); for the sorting network, (b, c, e)."""
        x = self.stored[name][:, : self.count]
        return x if x.dim() == 3 else x.permute(0, 3, 1, 2, 4)

    @property
    def num_rows(self) -> int:
        self.write()
        return 0 if self.tokens is None else len(self.tokens)

    def select(self, rows: Tensor) -> None:
        self.write()
        if self.tokens is not None:
            rows = rows.to(self.tokens.device)
            self.tokens = self.tokens[rows]
            self.stored = {name: x.index_select(0, rows) for name, x in self.stored.items()}
            self.sorted = self.sorted and tuple(x.index_select(0, rows) for x in self.sorted)  # type: ignore[assignment]


def attend_to_cache(q: Tensor, positions: Tensor, memory: SinkhornCacheLayer, sort: Sort, dropout: float) -> Tensor:
    """Output of queries (b, h, n, d) at `positions` (b, n) that follow cached tokens; `memory` holds theirs as well."""
    memory.write()
    if q.shape[2] == 1:
        return attend_newest(q, positions, memory, sort, dropout)
    size, (real_row, column) = memory.size, (positions >= 0).nonzero(as_tuple=True)
    position = positions[real_row, column]
    first = int(position.min()) // size if len(position) else 0  # the first block with a query
    # queries in blocks by position, as the keys are
    laid_out = q.new_zeros(len(q), (memory.count - first) * size, *q.shape[1::2])
    laid_out[real_row, position - first * size] = q[real_row, :, column]
    order = sort(memory.blocks("sums"), memory.blocks("firsts"))[:, :, first:]
    keys, values = (memory.blocks(name).contiguous() for name in ("keys", "values"))
    blocks = in_blocks(laid_out.transpose(1, 2), size)
    out = sinkhorn_attention(blocks, keys, values, order, None, True, False, dropout, first).flatten(2, 3)
    row = torch.arange(len(q), device=q.device)[:, None]
    return out[row, :, (positions - first * size).clamp(min=0)].transpose(1, 2)


def attend_newest(q: Tensor, positions: Tensor, memory: SinkhornCacheLayer, sort: Sort, dropout: float) -> Tensor:
    """`attend_to_cache` for one new token per row; the sorted block is kept until the next block begins."""
    assert memory.tokens is not None
    row, size = torch.arange(len(q), device=q.device), memory.size
    keys, values = memory.blocks("keys"), memory.blocks("values")
    block = (memory.tokens - 1).clamp(min=0) // size  # of the newest token
    if memory.sorted is None:
        order = sort(memory.blocks("sums"), memory.blocks("firsts"))
        order = order[row, :, block][:, :, None].to(q.dtype)  # (b, h, 1, c)
        memory.sorted = tuple(sort_blocks(x, order)[:, :, 0] for x in (keys, values))  # type: ignore[assignment]
    assert memory.sorted is not None
    own = (x[row, :, block] for x in (keys, values))  # (b, h, s, d) each
    k, v = (torch.cat(pair, 2) for pair in zip(own, memory.sorted, strict=True))
    before = torch.arange(size, device=q.device) <= positions.clamp(min=0) % size  # (b, s)
    allowed = torch.cat([before, (block > 0)[:, None].expand_as(before)], 1)
    return softmax_attention(q, k, v, allowed[:, None, None], dropout)[0]
