"""ListOps (Nangia & Bowman 2018, arXiv:1804.06028): nested lists of digits, and the digit they evaluate to.

Drawn by the recipe of the Long Range Arena (Tay et al. 2020, arXiv:2011.04006, and its `data/listops.py`).
"""

import random
from dataclasses import dataclass

import numpy as np

from ..settings import InputError
from .generated import Seed, with_special

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
DIGITS = tuple("0123456789")
OPERATOR_SHARE = 0.25  # of the nodes that may be an operator or a digit
FIRST_DIGIT = len(OPERATORS) + 1


class TooLong(Exception):
    """The tree being drawn exceeds the maximum length."""


@dataclass(frozen=True)
class ListOps:
    """Trees of more than `min_tokens` and fewer than `max_tokens` operators, digits and brackets.

    A node above depth `max_depth` is an operator with 2 to `max_args` arguments with probability 1/4, and otherwise a
    digit; all are drawn uniformly. Trees outside the limits are drawn again. The paper also removes duplicate trees,
    which do not occur at its lengths.
    """

    min_tokens: int = 500
    max_tokens: int = 2000
    max_depth: int = 10
    max_args: int = 10

    words = (*OPERATORS, END, *DIGITS)
    answers = DIGITS

    def __post_init__(self):
        longest = 1  # tokens of the largest tree that can be drawn
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if self.max_args < 2:
            raise InputError(f"max_args ({self.max_args}) must be at least 2: an operator has two or more arguments.")
        if not 0 <= self.min_tokens < self.max_tokens - 1 or self.min_tokens >= longest:
            raise InputError(
                f"min_tokens ({self.min_tokens}) must be less than max_tokens ({self.max_tokens}) - 1 and than "
                f"{longest:,}, the tokens of the largest tree of depth {self.max_depth} with {self.max_args} arguments."
            )

    def __call__(self, seed: Seed) -> tuple[np.ndarray, int]:
        draw = random.Random(f"listops {seed}")
        while True:
            tokens: list[int] = []
            try:
                value = self._grow(draw, 1, tokens)
            except TooLong:
                continue
            if self.min_tokens < len(tokens) < self.max_tokens:
                return with_special(np.array(tokens), has_cls=True), value

    def _grow(self, draw: random.Random, depth: int, tokens: list[int]) -> int:
        """Append a subtree to `tokens` and return its value."""
        if len(tokens) >= self.max_tokens:
            raise TooLong  # a rejected tree need not be completed
        if depth == self.max_depth or draw.random() > OPERATOR_SHARE:
            value = draw.randrange(10)
            tokens.append(FIRST_DIGIT + value)
            return value
        operator = draw.randrange(len(OPERATORS))
        tokens.append(operator)
        arguments = [self._grow(draw, depth + 1, tokens) for _ in range(draw.randint(2, self.max_args))]
        tokens.append(len(OPERATORS))
        return apply(OPERATORS[operator], arguments)


def apply(operator: str, arguments: list[int]) -> int:
    """Value of an operator: the median of an even number of arguments is the mean of the middle two, rounded down; sums
    are modulo 10.
    """
    if operator == "[MIN":
        return min(arguments)
    if operator == "[MAX":
        return max(arguments)
    if operator == "[SM":
        return sum(arguments) % 10
    assert operator == "[MED"
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(arguments) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
