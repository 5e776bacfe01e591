"""Rules, which replace the attention of a layer, and the strings in which they are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..models.ops_patterns import AttentionPattern, parse_pattern

# The unions in the papers, with the sizes of EtLongformerConfig and EtBigBirdConfig.
NAMED = {"longformer": "local:256 | global:1", "big_bird": "blocks:1:64 | ends:64 | random:3:64"}
KERNELS = {"linear": False, "efficient": False, "performer": True, "rfa": True}  # whether a number of features follows
Spec = str | Sequence[str]


@dataclass(frozen=True)
class HeadRule:
    """A pattern, and the number of tokens at the end of a row that are also global."""

    pattern: AttentionPattern
    last: int = 0

    def last_tokens(self, length: int) -> tuple[int, ...]:
        """Positions of the global tokens at the end of a row of `length` real tokens."""
        return tuple(range(max(0, length - self.last), length))


@dataclass(frozen=True)
class Rule:
    """The rule of one layer: patterns, tiled over its heads, or a kernel mixer.

    kernel: key of KERNELS, or None. num_features: number of random features. seed: of the random features; random
    blocks have their seed in the pattern.
    """

    heads: tuple[HeadRule, ...] = ()
    kernel: str | None = None
    num_features: int = 0
    seed: int = 0

    def groups(self, num_heads: int) -> list[tuple[HeadRule, tuple[int, ...]]]:
        """Heads grouped by rule, in order of first appearance. Raises ValueError if the rules cannot be tiled."""
        if num_heads % len(self.heads):
            raise ValueError(
                f"{len(self.heads)} patterns cannot be tiled over {num_heads} attention heads: pass one pattern, one "
                "per head, or a number of patterns that divides the number of heads."
            )
        found: dict[HeadRule, list[int]] = {}
        for head in range(num_heads):
            found.setdefault(self.heads[head % len(self.heads)], []).append(head)
        return [(rule, tuple(heads)) for rule, heads in found.items()]

    @property
    def reach(self) -> int | None:
        """Number of tokens back that a query attends to, except sinks; None if there is no limit."""
        if self.kernel or any(rule.pattern.window is None or rule.pattern.num_random_blocks for rule in self.heads):
            return None
        return max(
            (p.reach or 0) * p.dilation + (p.block_size - 1) * p.in_blocks for p in (r.pattern for r in self.heads)
        )

    @property
    def sinks(self) -> int:
        """Number of tokens at the start that are global in some head."""
        return max((rule.pattern.global_tokens[-1] + 1 for rule in self.heads if rule.pattern.global_tokens), default=0)


def parse_rule(spec: Spec, causal: bool = False, seed: int = 0) -> Rule:
    """Parse a rule: a pattern in the grammar of `parse_pattern`, a list of patterns for the heads, or a kernel mixer.

    In addition to that grammar, `global:a:b` makes the first a and the last b real tokens of each row global;
    `longformer` and `big_bird` denote the unions in their papers; `linear`, `efficient`, `performer:<features>` and
    `rfa:<features>` are the mixers of those variants without learned parameters. Raises ValueError, which quotes the
    part that cannot be parsed.
    """
    return _parse(spec if isinstance(spec, str) else tuple(spec), causal, seed)


@lru_cache(maxsize=1024)
def _parse(spec: str | tuple[str, ...], causal: bool, seed: int) -> Rule:
    if not spec:
        raise ValueError("a list of patterns must not be empty.")
    if isinstance(spec, str):
        name, *numbers = spec.strip().split(":")
        if name in KERNELS:
            if len(numbers) != KERNELS[name] or not all(number.isdigit() and int(number) for number in numbers):
                form = f"{name}:<number of features>, e.g. {name}:256" if KERNELS[name] else name
                raise ValueError(f"{spec!r} must have the form {form}.")
            return Rule(kernel=name, num_features=int(numbers[0]) if numbers else 0, seed=seed)
    return Rule(tuple(_parse_head(text, causal, seed) for text in ([spec] if isinstance(spec, str) else spec)))


def _parse_head(text: str, causal: bool, seed: int) -> HeadRule:
    if text.strip().partition(":")[0] in KERNELS:
        raise ValueError(f"{text!r} is a rule for all heads of a layer: pass it as a single string.")
    parts, last = [], 0
    for part in NAMED.get(text.strip(), text).split("|"):
        kind, *numbers = part.strip().split(":")
        if kind == "global" and len(numbers) == 2 and all(number.isdigit() for number in numbers):
            part, last = f"global:{numbers[0]}", int(numbers[1])
        parts.append(part)
    if causal and last:
        raise ValueError(
            f"{text!r} makes the last tokens global, which a causal model cannot have: write global:<first tokens>."
        )
    return HeadRule(parse_pattern("|".join(parts), seed=seed, causal=causal), last)


def check_spec(spec: Spec, causal: bool, num_heads: int) -> None:
    """Raise ValueError for a rule that this kind of model cannot compute."""
    rule = parse_rule(spec, causal)
    if rule.heads:
        rule.groups(num_heads)


def specs_of_layers(stored: dict, num_layers: int) -> Iterator[Spec | None]:
    """The entry of each layer in `config.efficient_attention`; None means the model's own attention."""
    for layer in range(num_layers):
        yield stored["pattern"] if "pattern" in stored else stored["layers"][layer]
