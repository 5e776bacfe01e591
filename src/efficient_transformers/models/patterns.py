"""Attention patterns drawn by hand: which keys a query may read, described once.

The same description is evaluated by the engine, written out as the dense mask that the engine must equal, handed to
FlexAttention as a predicate, and drawn.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .checks import check_at_least


@dataclass(frozen=True)
class AttentionPattern:
    r"""The set of keys each query reads: a (dilated) window ∪ global tokens ∪ random blocks.

    .. math:: S(i) = \{j : |i-j| \le w \cdot s,\; s \mid i-j\} \;\cup\; G \;\cup\; R(i),
              \qquad S(i) = \{0, \dots, n-1\} \text{ for } i \in G

    Beltagy et al. 2020 (arXiv:2004.05150, section 3.1) for window, dilation and global tokens; Child et al. 2019
    (arXiv:1904.10509, section 4) for the strided head, a dilated window without limit; Zaheer et al. 2020
    (arXiv:2007.14062, section 2) for random blocks. Positions count real tokens from 0, padding is never in S.

    Args:
        window: w, how many steps of `dilation` to look to each side; 0 reads the token itself, None knows no limit.
        dilation: s, distance between the keys of a window, in tokens.
        global_tokens: G, positions that read everything and that everything reads, ascending.
        num_random_blocks: how many blocks of keys each block of queries draws, per head.
        random_block_size: tokens in a block of R.
        seed: of the draw. It is a hash of (seed, head, query block, key block), so nothing has to be stored.
        causal: drop all keys with j > i.
    """

    window: int | None = 0
    dilation: int = 1
    global_tokens: tuple[int, ...] = ()
    num_random_blocks: int = 0
    random_block_size: int = 64
    seed: int = 0
    causal: bool = False

    def __post_init__(self):
        if self.window is not None:
            check_at_least("window", self.window, 0, "0 reads the token itself, None the whole sequence")
        check_at_least("dilation", self.dilation, 1, "1 is a window without gaps")
        check_at_least("num_random_blocks", self.num_random_blocks, 0, "0 draws none")
        check_at_least("random_block_size", self.random_block_size, 1, "a block holds tokens")
        if self.num_random_blocks and self.dilation > 1:
            raise ValueError(
                f"random blocks need dilation 1, got {self.dilation}: put the dilated window on another head."
            )
        if list(self.global_tokens) != sorted(set(self.global_tokens)) or any(g < 0 for g in self.global_tokens):
            raise ValueError(f"global_tokens must be ascending positions from 0, got {self.global_tokens}.")

    @property
    def is_full(self) -> bool:
        """Does every query read every key (that causality leaves it)?"""
        return self.window is None and self.dilation == 1

    @property
    def name(self) -> str:
        """The pattern in words, e.g. `local:128 | global:2`; what `parse_pattern` reads."""
        if self.is_full:
            return "full"
        parts = []
        if self.dilation > 1:
            parts.append(f"stride:{self.dilation}" + ("" if self.window is None else f":{self.window}"))
        elif self.window:
            parts.append(f"local:{self.window}")
        if self.global_tokens:
            parts.append(f"global:{len(self.global_tokens)}")
        if self.num_random_blocks:
            parts.append(f"random:{self.num_random_blocks}:{self.random_block_size}")
        return " | ".join(parts) or "local:0"

    def with_global(self, positions: tuple[int, ...]) -> "AttentionPattern":
        """The same pattern with `positions` made global too."""
        return replace(self, global_tokens=tuple(sorted({*self.global_tokens, *positions})))

    def in_window(self, i: Tensor, j: Tensor) -> Tensor:
        """Is key j inside the (dilated) window of query i? Broadcasts; causality is not looked at."""
        near = torch.ones_like(i - j, dtype=torch.bool)
        if self.window is not None:
            near = (i - j).abs() <= self.window * self.dilation
        return near if self.dilation == 1 else near & ((i - j) % self.dilation == 0)

    def is_global(self, i: Tensor) -> Tensor:
        """Is position i a global token? Elementwise."""
        tokens = self.global_tokens
        if not tokens:
            return torch.zeros_like(i, dtype=torch.bool)
        if tokens[-1] - tokens[0] == len(tokens) - 1:  # no gap
            return (i >= tokens[0]) & (i <= tokens[-1])
        return torch.isin(i, torch.tensor(tokens, device=i.device))

    def allows(self, head: Tensor, i: Tensor, j: Tensor, length: int) -> Tensor:
        """May query i of `head` read key j in a sequence of `length` real tokens? Broadcasts, bool."""
        allowed = self.in_window(i, j)
        if self.global_tokens:
            allowed = allowed | self.is_global(i) | self.is_global(j)
        if self.num_random_blocks:
            size = self.random_block_size
            drawn = self.random_blocks(int(head.max()) + 1, -(-length // size)).to(i.device)
            blocks = (i // size).clamp(0, drawn.shape[1] - 1)
            allowed = allowed | (drawn[head, blocks] == (j // size)[..., None]).any(-1)
        return allowed & (j <= i) if self.causal else allowed

    def dense(self, length: int, num_heads: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """The (num_heads, length, length) boolean mask: the oracle of the engine, and what is drawn."""
        position = torch.arange(length, device=device)
        head = torch.arange(num_heads, device=device)[:, None, None]
        allowed = self.allows(head, position[:, None], position[None, :], length)
        return allowed.expand(num_heads, length, length)

    def random_blocks(self, num_heads: int, num_blocks: int) -> Tensor:
        """(num_heads, num_blocks, num_random_blocks) key blocks, -1 where there are too few to draw from.

        Without repetition, and never a block that the window of these queries touches. Causal patterns draw from the
        past; a row of their table does not depend on `num_blocks`, so a sequence may grow.
        """
        reach = num_blocks if self.window is None else -(-self.window // self.random_block_size)
        return _draw_blocks(num_heads, num_blocks, self.num_random_blocks, reach, self.seed, self.causal)


FULL = AttentionPattern(window=None)


@lru_cache(maxsize=64)
def _draw_blocks(num_heads: int, num_blocks: int, count: int, reach: int, seed: int, causal: bool) -> Tensor:
    head = torch.arange(num_heads)[:, None, None]
    i, j = torch.arange(num_blocks)[:, None], torch.arange(num_blocks)
    # a counter-based hash (two rounds of xor-shift and multiply, 32 bits) rather than a generator: entry (i, j) must
    # not depend on how many blocks there are
    bits = (seed * 0x27D4EB2F + head * 0x165667B1 + i * 0x9E3779B1 + j * 0x85EBCA77) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        bits = ((bits ^ (bits >> 16)) * multiplier) & 0xFFFFFFFF
    bits = bits ^ (bits >> 16)
    forbidden = (j - i).abs() <= reach
    forbidden = forbidden | (j > i) if causal else forbidden
    bits = bits.masked_fill(forbidden, 1 << 32)
    rank, blocks = bits.sort(stable=True, dim=-1)
    blocks = blocks.masked_fill(rank == 1 << 32, -1)[..., :count]
    return torch.nn.functional.pad(blocks, (0, count - blocks.shape[-1]), value=-1)


def parse_pattern(text: str, seed: int = 0, causal: bool = False) -> AttentionPattern:
    """Read `local:<window>`, `stride:<stride>[:<hops>]`, `global:<tokens>`, `random:<blocks>[:<block size>]` or `full`.

    Parts joined by `|` are united: `"local:128 | global:2"`. Raises ValueError that quotes the part it cannot read.
    """
    fields: dict[str, int | tuple[int, ...] | None] = {}
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
                update = {"num_random_blocks": blocks, "random_block_size": size}
            case _:
                raise ValueError(
                    f"{part.strip()!r} in {text!r} is no attention pattern: write full, local:<window>, "
                    "stride:<stride>[:<hops>], global:<tokens> or random:<blocks>[:<block size>], joined by '|'."
                )
        if fields.keys() & update.keys():
            raise ValueError(
                f"{text!r} has two windows or two parts of one kind: a head unites at most one of each; "
                "give the second to another head."
            )
        fields |= update
    return AttentionPattern(**fields, seed=seed, causal=causal)  # type: ignore[arg-type]
