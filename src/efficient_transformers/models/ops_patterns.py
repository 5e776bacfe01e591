"""Fixed attention patterns: the keys that each query attends to, described once.

The same description is evaluated by the engine, written out as the dense mask that the engine must equal, handed to
FlexAttention as a predicate, and drawn.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .ops_checks import check_at_least


@dataclass(frozen=True)
class AttentionPattern:
    r"""The set of keys of each query: a (dilated) window ∪ global tokens ∪ random blocks.

    .. math:: S(i) = \{j : |i-j| \le w \cdot s,\; s \mid i-j\} \;\cup\; G \;\cup\; R(i),
              \qquad S(i) = \{0, \dots, n-1\} \text{ for } i \in G

    or, counted in blocks of b tokens, :math:`\{j : |\lfloor i/b \rfloor - \lfloor j/b \rfloor| \le w\}`.
    Beltagy et al. 2020 (arXiv:2004.05150, section 3.1) for window, dilation and global tokens; Child et al. 2019
    (arXiv:1904.10509, section 4) for the strided head, a dilated window without limit; Zaheer et al. 2020
    (arXiv:2007.14062, section 2) for random blocks, windows of blocks and global blocks. Positions count real tokens
    from 0, padding is never in S.

    Args:
        window: w, how many steps of `dilation`, or blocks, to look to each side; 0 is the token itself or its
            block, None has no limit.
        dilation: s, distance between the keys of a window, in tokens.
        in_blocks: does the window count blocks?
        global_tokens: G, positions that attend to everything and that everything attends to, ascending.
        global_ends: the first and the last block of the sequence are in G, too.
        num_random_blocks: how many blocks of keys each block of queries draws, per head.
        block_size: b, tokens in a block.
        seed: of the draw. It is a hash of (seed, head, query block, number), so nothing has to be stored.
        causal: drop all keys with j > i.
    """

    window: int | None = 0
    dilation: int = 1
    in_blocks: bool = False
    global_tokens: tuple[int, ...] = ()
    global_ends: bool = False
    num_random_blocks: int = 0
    block_size: int = 64
    seed: int = 0
    causal: bool = False

    def __post_init__(self):
        if self.window is not None:
            check_at_least("window", self.window, 0, "0 reads the token itself, None the whole sequence")
        check_at_least("dilation", self.dilation, 1, "1 is a window without gaps")
        check_at_least("num_random_blocks", self.num_random_blocks, 0, "0 draws none")
        check_at_least("block_size", self.block_size, 1, "a block holds tokens")
        if self.dilation > 1 and (self.num_random_blocks or self.in_blocks):
            raise ValueError(f"blocks need dilation 1, got {self.dilation}: put the dilated window on another head.")
        if self.in_blocks and self.window is None:
            raise ValueError("a window of blocks needs a number of blocks, got None: leave in_blocks out to read all.")
        if self.causal and self.global_ends:
            raise ValueError("global_ends cannot be causal: where the last block begins is known at the end only.")
        if list(self.global_tokens) != sorted(set(self.global_tokens)) or any(g < 0 for g in self.global_tokens):
            raise ValueError(f"global_tokens must be ascending positions from 0, got {self.global_tokens}.")

    @property
    def is_full(self) -> bool:
        """Does every query attend to every key, or to every earlier one if causal?"""
        return self.window is None and self.dilation == 1

    @property
    def is_own(self) -> bool:
        """Is the window of a query the token itself?"""
        return self.window == 0 and not self.in_blocks

    @property
    def reach(self) -> int | None:
        """How far the window goes beyond a token, or beyond its block, in steps of `dilation`; None knows no limit."""
        if self.window is None or not self.in_blocks:
            return self.window
        return self.window * self.block_size

    @property
    def depends_on_length(self) -> bool:
        """Does it take the length of the sequence to know the keys of a query?"""
        return self.global_ends or bool(self.num_random_blocks)

    @property
    def name(self) -> str:
        """The pattern in words, e.g. `local:128 | global:2`; the input of `parse_pattern`."""
        if self.is_full:
            return "full"
        parts = []
        if self.dilation > 1:
            parts.append(f"stride:{self.dilation}" + ("" if self.window is None else f":{self.window}"))
        elif self.in_blocks:
            parts.append(f"blocks:{self.window}:{self.block_size}")
        elif self.window:
            parts.append(f"local:{self.window}")
        if self.global_tokens:
            parts.append(f"global:{len(self.global_tokens)}")
        if self.global_ends:
            parts.append(f"ends:{self.block_size}")
        if self.num_random_blocks:
            parts.append(f"random:{self.num_random_blocks}:{self.block_size}")
        return " | ".join(parts) or "local:0"

    def with_global(self, positions: tuple[int, ...]) -> "AttentionPattern":
        """The same pattern with `positions` made global too."""
        return replace(self, global_tokens=tuple(sorted({*self.global_tokens, *positions})))

    def global_spans(self, length: int) -> tuple[tuple[int, int], ...]:
        """G in a sequence of `length` tokens as spans (start, stop), ascending, with gaps between them."""
        return _global_spans(self, length)

    def in_window(self, i: Tensor, j: Tensor) -> Tensor:
        """Is key j inside the (dilated) window of query i? Broadcasts; causality is not looked at."""
        near = torch.ones_like(i - j, dtype=torch.bool)
        if self.window is not None:
            size = self.block_size
            distance = (i // size - j // size if self.in_blocks else i - j).abs()
            near = distance <= self.window * self.dilation
        return near if self.dilation == 1 else near & ((i - j) % self.dilation == 0)

    def is_global(self, i: Tensor, length: int | Tensor) -> Tensor:
        """Is position i of a sequence of `length` tokens in G? Broadcasts."""
        tokens, found = self.global_tokens, torch.zeros_like(i, dtype=torch.bool)
        if tokens and tokens[-1] - tokens[0] == len(tokens) - 1:  # no gap
            found = (i >= tokens[0]) & (i <= tokens[-1])
        elif tokens:
            found = torch.isin(i, torch.tensor(tokens, device=i.device))
        if self.global_ends:
            block = i // self.block_size
            found = found | (block == 0) | (block == (length - 1) // self.block_size)
        return found

    def allows(self, head: Tensor, i: Tensor, j: Tensor, length: int | Tensor, blocks: Tensor | None = None) -> Tensor:
        """Does query i of `head` attend to key j in a sequence of `length` real tokens? Broadcasts, bool.

        `blocks` (h, blocks, r) are the random ones of each `head`; None draws those of one length.
        """
        allowed = self.in_window(i, j)
        if self.global_tokens or self.global_ends:
            allowed = allowed | self.is_global(i, length) | self.is_global(j, length)
        if self.num_random_blocks:
            if blocks is None:
                assert isinstance(length, int)
                blocks = self.random_blocks(int(head.max()) + 1, -(-length // self.block_size)).to(i.device)
            allowed = allowed | (times_drawn(blocks, head, i, j, self.block_size) > 0)
        return allowed & (j <= i) if self.causal else allowed

    def dense(self, length: int, num_heads: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """The (num_heads, length, length) boolean mask: the oracle of the engine, and what is drawn."""
        position = torch.arange(length, device=device)
        head = torch.arange(num_heads, device=device)[:, None, None]
        allowed = self.allows(head, position[:, None], position[None, :], length)
        return allowed.expand(num_heads, length, length)

    def random_blocks(self, num_heads: int, num_blocks: int, real_blocks: Tensor | None = None) -> Tensor:
        """(num_heads, num_blocks, num_random_blocks) key blocks, -1 where there are too few to draw from.

        Without repetition, and never a block that the window of these queries touches or that is global as an end.
        Causal patterns draw from the past; a row of their table does not depend on `num_blocks`, so a sequence may
        grow. With `real_blocks` (b,) the draw of each row of a batch, one axis more, and nothing is kept.
        """
        reach = num_blocks if self.reach is None else -(-self.reach // self.block_size)
        settings = num_heads, num_blocks, self.num_random_blocks, reach, int(self.global_ends), self.seed, self.causal
        return drawn_blocks(*settings) if real_blocks is None else draw_blocks(*settings, real_blocks)


FULL = AttentionPattern(window=None)


@lru_cache(maxsize=256)
def _global_spans(pattern: AttentionPattern, length: int) -> tuple[tuple[int, int], ...]:
    tokens = {token for token in pattern.global_tokens if token < length}
    if pattern.global_ends and length:
        size = pattern.block_size
        tokens.update(range(min(size, length)), range((length - 1) // size * size, length))
    spans: list[tuple[int, int]] = []
    for token in sorted(tokens):
        start = spans.pop()[0] if spans and spans[-1][1] == token else token
        spans.append((start, token + 1))
    return tuple(spans)


def rounded_length(length: int, least: int = 1) -> int:
    """The next of four lengths for each power of two, at least `least` apart: what is made for one serves many."""
    step = max(least, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def times_drawn(table: Tensor, head: Tensor, i: Tensor, j: Tensor, block_size: int) -> Tensor:
    """Number of blocks in `table` (h, blocks, r) that contain key j for query i of `head`. Broadcasts, int64."""
    blocks = (i // block_size).clamp(0, table.shape[1] - 1)
    return (table[head, blocks] == (j // block_size)[..., None]).sum(-1)


def draw_blocks(
    num_heads: int,
    num_blocks: int,
    count: int,
    reach: int,
    ends: int,
    seed: int,
    causal: bool,
    real_blocks: Tensor | None = None,
) -> Tensor:
    """`AttentionPattern.random_blocks` by arithmetic alone: O(h·n·r²) for r draws, and it can be traced.

    The k-th draw is a number below the count of blocks that are left, made a block by stepping over those taken.
    `real_blocks` (b,) draws for rows that have fewer than `num_blocks`: then (b, h, num_blocks, count).
    """
    device = "cpu" if real_blocks is None else real_blocks.device  # on the CPU even while a model is built without data
    there: int | Tensor = num_blocks if real_blocks is None else real_blocks[:, None, None]
    head = torch.arange(num_heads, device=device)[:, None, None]
    i, number = torch.arange(num_blocks, device=device), torch.arange(count, device=device)
    # a counter-based hash (two rounds of xor-shift and multiply, 32 bits) rather than a generator: an entry must not
    # depend on how many blocks there are
    bits = seed * 0x27D4EB2F % 2**32 + head * 0x165667B1 + i[:, None] * 0x9E3779B1 + number * 0x85EBCA77
    bits = bits & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    # those to draw from: the blocks from `ends` on, up to the last or to the window, less those in the window
    first = (i - reach).clamp(min=ends)
    if causal:
        width, left = torch.zeros_like(i), i - reach - ends
    else:
        width = ((i + reach + 1).clamp(max=there - ends) - first).clamp(min=0)
        left = there - 2 * ends - width
    drawn: list[Tensor] = []
    for k in range(count):
        rank = bits[..., k] % (left - k).clamp(min=1)
        for taken in torch.stack(drawn).sort(0).values if drawn else ():
            rank = rank + (rank >= taken)
        drawn.append(rank)
    ranks = torch.stack(drawn, -1)
    blocks = ranks + ends
    blocks = blocks + width[..., None] * (blocks >= first[:, None])
    blocks = blocks.masked_fill(number >= left[..., None], -1)
    return blocks if real_blocks is None else blocks.expand(real_blocks.shape[0], -1, -1, -1)


# 8 bytes for each block, head and draw: 64 tables of 4,096 tokens in blocks of 64 take a MB
drawn_blocks = lru_cache(maxsize=64)(draw_blocks)


def parse_pattern(text: str, seed: int = 0, causal: bool = False) -> AttentionPattern:
    """Read `local:<window>`, `stride:<stride>[:<hops>]`, `global:<tokens>`, `random:<blocks>[:<block size>]` or `full`.

    Also `blocks:<to each side>[:<block size>]`, a window of blocks, and `ends[:<block size>]`, the first and the last
    block as global tokens. Parts joined by `|` are united: `"local:128 | global:2"`.
    Raises ValueError that quotes the part it cannot parse.
    """
    fields: dict[str, int | bool | tuple[int, ...] | None] = {}
    for part in text.split("|"):
        kind, *arguments = part.strip().split(":")
        match kind, [int(a) if a.isdigit() else None for a in arguments]:
            case "full", []:
                update = {"window": None}
            case "local", [int(window)]:
                update = {"window": window}
            case "stride", [int(stride)]:
                update = {"window": None, "dilation": stride}
            case "stride", [int(stride), int(hops)]:
                update = {"window": hops, "dilation": stride}
            case "global", [int(tokens)]:
                update = {"global_tokens": tuple(range(tokens))}
            case "random", [int(blocks)]:
                update = {"num_random_blocks": blocks}
            case "random", [int(blocks), int(size)]:
                update = {"num_random_blocks": blocks, "block_size": size}
            case "blocks", [int(window)]:
                update = {"window": window, "in_blocks": True}
            case "blocks", [int(window), int(size)]:
                update = {"window": window, "in_blocks": True, "block_size": size}
            case "ends", []:
                update = {"global_ends": True}
            case "ends", [int(size)]:
                update = {"global_ends": True, "block_size": size}
            case _:
                raise ValueError(
                    f"{part.strip()!r} in {text!r} is no attention pattern: write full, local:<window>, "
                    "stride:<stride>[:<hops>], global:<tokens>, random:<blocks>[:<block size>], "
                    "blocks:<blocks>[:<block size>] or ends[:<block size>], joined by '|'."
                )
        if any(fields[key] != update[key] or key != "block_size" for key in fields.keys() & update.keys()):
            raise ValueError(
                f"{text!r} has two windows, two parts of one kind or two block sizes: a head unites at most one of "
                "each; give the second to another head."
            )
        fields |= update
    return AttentionPattern(**fields, seed=seed, causal=causal)  # type: ignore[arg-type]
