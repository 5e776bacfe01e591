"""Locality-sensitive hashing of directions: vectors that point the same way fall into the same bucket."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops_tracing import is_traced


def random_rotations(
    num_heads: int, dim: int, num_hashes: int, factors: Sequence[int], generator: torch.Generator
) -> Tensor:
    """R of Kitaev et al. 2020 (arXiv:2001.04451), section 2: i.i.d. normal, (h, d, r, Σ factors / 2).

    float32, on the CPU. `factors`: as in `assign_buckets`; a factor 1 needs none.
    """
    columns = sum(factor // 2 for factor in factors)
    return torch.randn(num_heads, dim, num_hashes, columns, generator=generator, device="cpu")


def assign_buckets(x: Tensor, rotations: Tensor, widest: Sequence[int], factors: Tensor | None = None) -> Tensor:
    r"""The bucket of each vector in each round, (b, h, r, n) int64.

    .. math:: h(x) = \mathrm{argmax}\,[xR;\, -xR]

    Andoni et al. 2015 (arXiv:1509.02897), as in Kitaev et al. 2020, section 2. A large number of buckets is a product
    of `widest` factors, each with columns of R of its own; the buckets of a factor are the digits of a number whose
    first digit counts least. `factors` (b, number of factors) int64 are the factors of each row, even or 1 and at most
    the widest; None: the widest. `x` (b, h, n, d), `rotations` (h, d, r, columns). O(r·n·d·columns), in `x.dtype` but
    at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        rotated = x[:, :, None] @ rotations.to(x.dtype).transpose(1, 2)  # (b, h, r, n, columns)
    buckets, value = rotated.new_zeros(rotated.shape[:-1], dtype=torch.long), 1
    for number, part in enumerate(rotated.split([factor // 2 for factor in widest], -1)):
        if not part.shape[-1]:
            continue
        count, size = widest[number], part.abs()
        if factors is not None:
            count = factors[:, number].view(-1, 1, 1, 1)
            beyond = torch.arange(part.shape[-1], device=x.device) >= (count // 2)[..., None]
            size = size.masked_fill(beyond, -1.0)
        column = size.argmax(-1)
        negative = part.gather(-1, column[..., None]).squeeze(-1) < 0
        # of a factor 1 all columns are beyond, so the first one is taken, and half of 1 is 0
        digit = column + negative * (count // 2)
        buckets, value = buckets + digit * value, value * count
    return buckets


def assign_buckets_by_length(
    x: Tensor, rotations: Tensor, widest: Sequence[int], lengths: Tensor, chunk_length: int, limit: int
) -> Tensor:
    """`assign_buckets` with the `bucket_factors` of each row's number of real tokens, `lengths` (b,)."""
    factors: Tensor | None = bucket_factors(lengths, chunk_length, limit)
    if not is_traced():  # the rows of a batch rarely need all columns
        needed = factors.amax(0)
        factors = None if bool((factors == needed).all()) else factors
        rotations, widest = narrowed(rotations, widest, needed.tolist()), needed.tolist()
    return assign_buckets(x, rotations, widest, factors)


def bucket_factors(length: Tensor, chunk_length: int, limit: int) -> Tensor:
    """Buckets for `length` (b,) tokens, as two factors (b, 2) int64: 1 and their number, or past `limit` two of a size.

    Twice the number of chunks (Kitaev et al. 2020, section 2), rounded down to a power of two; 1 for less than a chunk.
    """
    power = torch.arange(1, 63, device=length.device)
    power = (2 * (length // chunk_length)[:, None] >= 2**power).sum(1)
    first = torch.where(2**power > limit, power // 2, 0)
    return 2 ** torch.stack([first, power - first], 1)


def widest_factors(longest: int, chunk_length: int, limit: int, any_length: bool) -> tuple[int, int]:
    """The largest of `bucket_factors` for `longest` tokens, or for any number up to that."""
    first, second = bucket_factors(torch.tensor([longest], device="cpu"), chunk_length, limit)[0].tolist()
    # a shorter input may stay below the limit, with one hash alone
    return first, second if first == 1 or not any_length else max(second, limit)


def narrowed(rotations: Tensor, widest: Sequence[int], needed: Sequence[int]) -> Tensor:
    """The columns of R for `needed` factors, of those for the `widest`."""
    parts = rotations.split([factor // 2 for factor in widest], -1)
    return torch.cat([part[..., : factor // 2] for part, factor in zip(parts, needed, strict=True)], -1)
