"""Softmax attention over a drawn pattern as a few batched products, without data-dependent control flow.

For graphs (torch.compile, torch.export) and for devices on which each launch is expensive; linear in n. The sequence
is cut into tiles of queries, each with its window of keys:

    residue class 0    | tile 0 | tile 1 | …        queries of a tile:  size
    residue class 1    | tile 0 | tile 1 | …        keys of a tile:     reach + size + reach
    …                                               (one class per remainder of the dilation)

The scores of global tokens and of random blocks are appended to those of the window; one softmax runs over all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_engine import BatchRows
from .ops_global_tokens import global_mask_of, global_positions, put_rows, rows_at
from .ops_patterns import AttentionPattern
from .ops_tracing import count_blocks, is_exported

TILE = 64  # queries of a tile where blocks do not say otherwise


class TileGrid(NamedTuple):
    """Positions of the tiles of a sequence: s residue classes modulo the dilation, c tiles in each.

    queries: (s, c, size). keys: those of the windows, (s, c, m). Both may lie outside of the sequence.
    """

    queries: Tensor
    keys: Tensor

    @property
    def count(self) -> int:
        """Tiles of a residue class."""
        return self.queries.shape[1]

    @property
    def size(self) -> int:
        return self.queries.shape[2]


class KeyRead(NamedTuple):
    """Keys that tiles of queries attend to: `keys` and `values` (b, h, s or 1, c or 1, m, d), and where `allowed`,
    broadcastable to (b, h, s, c, size, m)."""

    keys: Tensor
    values: Tensor
    allowed: Tensor


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    rows: BatchRows,
    dropout: float = 0.0,
    random_blocks: Tensor | None = None,
    global_rows: bool = True,
) -> Tensor:
    """`pattern_attention` as a few batched products over tiles, linear in n, differentiated by autograd."""
    if pattern.is_full:
        return masked_attention(q, k, v, pattern, rows.padding_mask, dropout)
    length, padding_mask = q.shape[2], rows.padding_mask
    grid = tile_grid(pattern, length, q.device)
    real = torch.ones(1, length, dtype=torch.bool, device=q.device) if padding_mask is None else padding_mask
    queries = at_tiles(q * q.shape[-1] ** -0.5, grid.queries)  # (b, h, s, c, size, d)

    reads = [window_read(k, v, pattern, grid, real)]
    tokens, present = global_positions(pattern, real, rows.global_mask)  # (b, g)
    if tokens is not None:
        reads.append(global_read(k, v, pattern, grid, tokens, present))
    if pattern.num_random_blocks and random_blocks is not None:  # each counts, even if other parts contain it
        reads.append(random_read(k, v, grid, stored_blocks(random_blocks, grid.count, q.device), real))
    elif pattern.num_random_blocks:
        blocks = pattern.random_blocks(q.shape[1], grid.count, (real.sum(1) + grid.size - 1) // grid.size)
        free = real if tokens is None else real & ~global_mask_of(tokens, present, real)
        reads.append(random_read(k, v, grid, blocks, free))  # (b, h, c, r)

    out = untiled(joint_attention(queries, reads, dropout), pattern, grid, length)
    if tokens is not None and global_rows:
        out = put_rows(out, rows_of_global(q, k, v, pattern, real, tokens, present, dropout), tokens, present)
    return out if padding_mask is None else out.masked_fill(~padding_mask[:, None, :, None], 0)


def tile_grid(pattern: AttentionPattern, length: int, device: torch.device) -> TileGrid:
    step, reach, size = pattern.dilation, pattern.reach, pattern.block_size
    per_class = (length + step - 1) // step  # tokens of a residue class modulo the dilation
    if reach is None:  # a class is one tile
        size, reach, count = count_blocks(length, step), 0, 1
    else:
        size = size if pattern.in_blocks or pattern.num_random_blocks else TILE
        count = count_blocks(per_class, size)
    within = torch.arange(count, device=device)[:, None] * size  # (c, 1), start of each tile in its class
    residue = torch.arange(step, device=device)[:, None, None]
    around = torch.arange(-reach, size + (0 if pattern.causal else reach), device=device)
    return TileGrid(residue + step * (within + torch.arange(size, device=device)), residue + step * (within + around))


def at_tiles(x: Tensor, index: Tensor) -> Tensor:
    """(b, …, n, d) -> (b, …, s, c, m, d) at `index` (s, c, m), clamped to the ends; those have to be masked."""
    # selected by index, where folding a padded sequence would make a traced length a multiple of the tile
    return x.index_select(-2, index.clamp(0, x.shape[-2] - 1).flatten()).unflatten(-2, index.shape)


def window_read(k: Tensor, v: Tensor, pattern: AttentionPattern, grid: TileGrid, real: Tensor) -> KeyRead:
    """The windows of the tiles, `real` (b or 1, n)."""
    i, j = grid.queries[..., None], grid.keys[..., None, :]
    there = at_tiles(real[..., None], grid.keys)[..., 0] & (grid.keys >= 0) & (grid.keys < k.shape[2])
    near = there[..., None, :] & pattern.in_window(i, j)  # (b, s, c, size, m)
    near = near & (j <= i) if pattern.causal else near
    return KeyRead(at_tiles(k, grid.keys), at_tiles(v, grid.keys), near[:, None])


def global_read(
    k: Tensor, v: Tensor, pattern: AttentionPattern, grid: TileGrid, tokens: Tensor, present: Tensor
) -> KeyRead:
    """Global `tokens` (b, g) that are `present`, except where they lie in the window."""
    i, j = grid.queries[..., None], tokens[:, None, None, None]  # (b, 1, 1, 1, g)
    outside = present[:, None, None, None] & ~pattern.in_window(i, j)
    outside = outside & (j <= i) if pattern.causal else outside
    keys, values = (rows_at(x, tokens)[:, :, None, None] for x in (k, v))
    return KeyRead(keys, values, outside[:, None])


def random_read(k: Tensor, v: Tensor, grid: TileGrid, blocks: Tensor, free: Tensor) -> KeyRead:
    """Random `blocks` (b or 1, h, c, r), negative for none, of which `free` (b or 1, n) tokens count."""
    batch, num_heads, length, _ = k.shape
    drawn_at = (blocks[..., None] * grid.size + torch.arange(grid.size, device=k.device)).flatten(-2)  # (b, h, c, m)
    at = drawn_at.clamp(0, length - 1).expand(batch, -1, -1, -1)
    row, head = (torch.arange(number, device=k.device) for number in (batch, num_heads))

    def drawn(x: Tensor) -> Tensor:
        """(b, h, n, d) -> (b, h, 1, c, m, d)."""
        x = x.expand(batch, num_heads, -1, -1)
        if is_exported():  # not folded, as in `untiled`
            return x[row[:, None, None, None], head[:, None, None], at][:, :, None]
        x = x.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1]))
        return x.unflatten(2, (-1, drawn_at.shape[-1]))[:, :, None]

    allowed = drawn(free[:, None, :, None])[..., 0] & ((drawn_at >= 0) & (drawn_at < length))[:, :, None]
    return KeyRead(drawn(k), drawn(v), allowed[..., None, :])


def stored_blocks(table: Tensor, count: int, device: torch.device) -> Tensor:
    """The first `count` rows of a stored table (h, blocks, r), with a batch axis; nothing is drawn after its end."""
    row, stored = torch.arange(count, device=device), table.shape[1]
    blocks = table.to(device).index_select(1, row.clamp(max=stored - 1))
    return blocks.masked_fill(row[:, None] >= stored, -1)[None]


def joint_attention(queries: Tensor, reads: list[KeyRead], dropout: float) -> Tensor:
    """Softmax over the keys of all reads, (b, h, s, c, size, d). `queries` are already scaled."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    lowest = torch.finfo(wide).min
    scores = [(queries @ keys.transpose(-1, -2)).to(wide).masked_fill(~may, lowest) for keys, _, may in reads]
    weights = F.dropout(torch.cat(scores, -1).softmax(-1).to(reads[0].values.dtype), dropout)
    parts = weights.split([score.shape[-1] for score in scores], -1)
    mixed = [part @ read.values for part, read in zip(parts, reads, strict=True)]
    return sum(mixed[1:], mixed[0])


def untiled(mixed: Tensor, pattern: AttentionPattern, grid: TileGrid, length: int) -> Tensor:
    """(b, h, s, c, size, d) -> (b, h, n, d)."""
    position, step = torch.arange(length, device=mixed.device), pattern.dilation
    if not is_exported():
        return mixed.movedim(2, 4).flatten(2, 4).index_select(2, position)
    # to fold tiles of a symbolic number would take a proof about divisions
    place, size = position // step, grid.size
    tile, slot = (torch.zeros_like(place), place) if pattern.reach is None else (place // size, place % size)
    return mixed[:, :, position % step, tile, slot]


def rows_of_global(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    real: Tensor,
    tokens: Tensor,
    present: Tensor,
    dropout: float,
) -> Tensor:
    """Outputs of the global `tokens` (b, g), which attend to the whole sequence: (b, h, g, d)."""
    may = real[:, None, None] & present[:, None, :, None]
    if pattern.causal:
        may = may & (torch.arange(q.shape[2], device=q.device) <= tokens[..., None])[:, None]
    return F.scaled_dot_product_attention(rows_at(q, tokens), k, v, attn_mask=may, dropout_p=dropout)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, padding_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Full attention, causal or not, by torch's kernel; shapes as `blocked_attention`."""
    if padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=pattern.causal)
    allowed = padding_mask[:, None, None]
    if pattern.causal:
        allowed = allowed & pattern.dense(q.shape[2], device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
    return out.masked_fill(~padding_mask[:, None, :, None], 0)
