"""The cache of memory-compressed attention: keys and values of complete segments, and the tokens of incomplete ones."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .attn_dense import softmax_attention
from .base_cache import SegmentCacheLayer, is_closed


class CompressedCacheLayer(SegmentCacheLayer):
    """Compressed keys and values of complete segments, and the tokens from which the next ones will be computed.

    stored: (2, b, h, room, d), keys and values; each row holds `tokens // factor` segments.
    pending: (2, b, h, reach·f, d), the segments that the kernel of the next one touches; zero without a token.
    tokens: number of real tokens of each row, (b,).
    """

    is_compileable = False
    kept = "one key and one value of each segment of tokens"

    def __init__(self, factor: int, kernel: int):
        super().__init__()
        self.factor, self.reach = factor, -(-kernel // factor)
        self.reset()

    def reset(self) -> None:
        self.stored: Tensor | None = None
        self.pending: Tensor | None = None
        self.tokens: Tensor | None = None
        self.waiting: tuple[Tensor, Tensor, Tensor] | None = None
        self.cumulative_length = self.count = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated by the first tokens."""

    def update(self, keys: Tensor, values: Tensor, positions: Tensor, *args, **kwargs) -> None:  # type: ignore[override]
        """Add keys and values (b, h, n, d) of tokens at `positions` (b, n), -1 at padding."""
        self.waiting = keys, values, positions  # compressed on the next access, which training never makes
        self.cumulative_length += positions.shape[1]

    def write(self, rule: Callable[[Tensor], Tensor]) -> None:
        """Compress the waiting tokens by `rule`, (2, b, h, n, d) -> (2, b, h, s, d), as far as they complete segments.

        An example for one row: f = 4, κ = 8, so a kernel touches `reach` = 2 segments; 6 tokens are cached and 3 new
        ones, 6 to 8, are waiting. `start` = 6 // 4 = 1 is the first incomplete segment.

            segment      |      0      |      1      |      2      |
            laid_out     |  0  1  2  3 |  4  5  6  7 |  8  .  .  . |   `pending` holds segments 0 and 1, up to token 5
            done = 1                   [ rule, of 8 tokens ]           segment 1 is complete: stored[1] = rule(0 … 7)
            pending after              |  4  5  6  7 |  8  .  .  . |   the segments that the next kernel touches
        """
        if self.waiting is None:
            return
        (keys, values, positions), self.waiting = self.waiting, None
        pair, size = torch.stack([keys, values]), self.factor
        if self.pending is None or self.tokens is None:
            self.pending = pair.new_zeros(*pair.shape[:3], self.reach * size, pair.shape[4])
            self.tokens = positions.new_zeros(len(positions))
        start, tokens = self.tokens // size, torch.maximum(self.tokens, positions.amax(1) + 1)
        blocks = int((tokens - start * size).max()) // size + 1
        laid_out = F.pad(self.pending, (0, 0, 0, blocks * size))  # each row from segment `start - reach + 1` on
        row, column = (positions >= 0).nonzero(as_tuple=True)
        place = positions[row, column] - (start[row] - self.reach + 1) * size
        laid_out[:, row, :, place] = pair[:, row, :, column]
        done = tokens // size - start  # segments that are complete now, in each row
        self.count = max(self.count, int((tokens // size).max()))
        if bool(done.any()):
            row, number = (torch.arange(blocks, device=done.device) < done[:, None]).nonzero(as_tuple=True)
            stored = self.make_room(pair)
            stored[:, row, :, start[row] + number] = rule(laid_out)[:, row, :, number + self.reach - 1]
        kept = done[:, None] * size + torch.arange(self.reach * size, device=done.device)
        index = kept[None, :, None, :, None].expand(*pair.shape[:3], -1, pair.shape[4])
        self.pending, self.tokens = laid_out.gather(3, index), tokens

    def make_room(self, like: Tensor) -> Tensor:
        """`stored`, writable and with room for `count` segments."""
        old = self.stored
        if old is None or old.shape[3] < self.count or torch.is_grad_enabled() or is_closed(old):
            self.stored = like.new_zeros(*like.shape[:3], self.count + self.count // 4 + 16, like.shape[4])
            if old is not None:
                self.stored[:, :, :, : old.shape[3]] = old[:, :, :, : self.stored.shape[3]]
        assert self.stored is not None
        return self.stored

    @property
    def num_rows(self) -> int:
        some = self.tokens if self.waiting is None else self.waiting[2]
        return 0 if some is None else len(some)

    def select(self, rows: Tensor) -> None:
        if self.waiting is not None:
            self.waiting = tuple(x.index_select(0, rows.to(x.device)) for x in self.waiting)  # type: ignore[assignment]
        if self.tokens is not None:
            rows = rows.to(self.tokens.device)
            self.tokens = self.tokens[rows]
            self.stored, self.pending = (x if x is None else x[:, rows] for x in (self.stored, self.pending))


def attend_to_cache(q: Tensor, positions: Tensor, memory: CompressedCacheLayer, dropout: float) -> Tensor:
    """Output (b, h, n, d) of queries at `positions` (b, n) over the whole segments in `memory` that they follow."""
    if memory.stored is None:  # no segment is complete
        return torch.zeros_like(q)
    keys, values = memory.stored[:, :, :, : memory.count]
    number = torch.arange(memory.count, device=q.device)
    allowed = number < (positions[:, None, :, None] + 1) // memory.factor
    return softmax_attention(q, keys, values, allowed, dropout)[0]
