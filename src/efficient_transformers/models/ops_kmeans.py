"""Online spherical k-means: which directions are near which centroids, and how the centroids follow the data.

Axes beside the usual ones: k clusters, w tokens of a cluster. Everything is computed in float32 or wider, and is a
function of its arguments alone, so that processes with the same data hold the same centroids.
"""

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from .ops_engine import choose_engine

GRID = 2**16  # steps of a cosine by which tokens are ranked: coarser than rounding, so that equal tokens are equal
DISPENSABLE = 0.05  # a centroid that saves its members less than this share of the average starts again elsewhere
PATIENCE = 0.9  # decay of that average: early in training a centroid may soon point where no token does any more
# Cosines at once on a CPU, by measurement: turns of a loop that are worth their price, and stay in the cache.
AT_ONCE = 2**14


class ClusterStatistics(NamedTuple):
    """What a pass over the data says about the clusters of each head; members are the nearest to a centroid.

    sums: of the members, (h, k, d).
    farthest: the member with the lowest cosine to the centroid, (h, k, d).
    lowest: that cosine, 2 where there is no member, (h, k).
    distortion: Σ of 1 - cosine, (h, k).
    savings: Σ of the cosine less that to the second nearest centroid: what the centroid is there for, (h, k).
    """

    sums: Tensor
    farthest: Tensor
    lowest: Tensor
    distortion: Tensor
    savings: Tensor

    def packed(self) -> Tensor:
        """All of it in one tensor, (h, k, 2d + 3)."""
        return torch.cat([self.sums, self.farthest, *(x[..., None] for x in self[2:])], -1)

    @classmethod
    def unpacked(cls, x: Tensor) -> "ClusterStatistics":
        dim = (x.shape[-1] - 3) // 2
        sums, farthest, rest = x.split([dim, dim, 3], -1)
        return cls(sums, farthest, *rest.unbind(-1))


def random_directions(num_heads: int, num_clusters: int, dim: int, generator: torch.Generator) -> Tensor:
    """Uniform on the sphere, (h, k, d), float32, on the CPU."""
    return F.normalize(torch.randn(num_heads, num_clusters, dim, generator=generator, device="cpu"), dim=-1)


def nearest_centroid(x: Tensor, centroids: Tensor) -> Tensor:
    """The cluster of each token, argmax over the centroids of the cosine: (b, h, n) int64. O(n·k·d).

    `x` (b, h, n, d) of any lengths, `centroids` (h, k, d) of length 1.
    """

    def rule(x: Tensor, centroids: Tensor) -> Tensor:
        return (x @ centroids.transpose(1, 2)).argmax(-1)

    return by_head(rule, x, centroids)


def nearest_tokens(
    x: Tensor, centroids: Tensor, size: int, sizes: Tensor | None, padding_mask: Tensor | None
) -> Tensor:
    """The tokens nearest to each centroid, nearest first: (b, h, k, w) int64, -1 in empty slots.

    Roy et al. 2020 (arXiv:2003.05997), section 4.1: all clusters have the same size, and a token may be in several or
    in none. w = `size` slots, of which `sizes` (b,) are filled in each row; None fills all. `x` (b, h, n, d) and
    `centroids` (h, k, d) are unit vectors; `padding_mask` (b, n) is True at real tokens, and padding is never taken.
    Among equally near tokens the first ones are taken. O(n·k·d + n·k·log w).
    """

    def rule(x: Tensor, centroids: Tensor, padding_mask: Tensor | None, sizes: Tensor | None) -> Tensor:
        length = x.shape[1]
        key = (centroids @ x.transpose(1, 2)).double().mul_(GRID).round_()  # (p, k, n)
        key = key.mul_(length).sub_(torch.arange(length, device=x.device))  # ties by position; exact integers
        if padding_mask is not None:
            key = key.masked_fill_(~padding_mask[:, None], float("-inf"))
        if not isinstance(length, int) or size > length:
            key = F.pad(key, (0, size), value=float("-inf"))
        value, token = key.topk(size, -1)
        taken = value > float("-inf")
        if sizes is not None:
            taken = taken & (torch.arange(size, device=x.device) < sizes[:, None, None])
        return torch.where(taken, token, -1)

    heads = x.shape[1]
    sizes = None if sizes is None else sizes[:, None].expand(-1, heads)
    return by_head(rule, x, centroids, of_heads(padding_mask, heads), sizes)


def cluster_statistics(x: Tensor, centroids: Tensor, padding_mask: Tensor | None) -> ClusterStatistics:
    """Of all rows together; `x` (b, h, n, d) and `centroids` (h, k, d) of length 1, `padding_mask` (b, n). O(n·k·d)."""

    def rule(x: Tensor, centroids: Tensor, padding_mask: Tensor | None) -> Tensor:
        cosine = x @ centroids.transpose(1, 2)  # (p, n, k)
        best, cluster = cosine.max(-1)
        place = cluster[..., None]
        saving = best - cosine.scatter_(-1, place, -1.0).amax(-1)
        values = torch.cat([x, torch.stack([1 - best, saving], -1)], -1)  # (p, n, d + 2)
        if padding_mask is not None:
            best = best.masked_fill(~padding_mask, 2.0)
        members = cosine.zero_().scatter_(-1, place, (best < 2).to(x.dtype)[..., None])
        # as a product, because a scattered sum adds in another order each time on a GPU
        sums, distortion, savings = (members.transpose(1, 2) @ values).split([x.shape[-1], 1, 1], -1)
        count, length = centroids.shape[1], x.shape[1]
        lowest = best.new_full((x.shape[0], count), 2.0).scatter_reduce(1, cluster, best, "amin")
        position = torch.arange(length, device=x.device)
        found = torch.where(best == lowest.gather(1, cluster), position, length - 1)
        first = cluster.new_full((x.shape[0], count), length - 1).scatter_reduce(1, cluster, found, "amin")
        farthest = x.gather(1, first[..., None].expand(-1, -1, x.shape[-1]))
        return ClusterStatistics(sums, farthest, lowest, distortion[..., 0], savings[..., 0]).packed()

    rows = by_head(rule, x, centroids, of_heads(padding_mask, x.shape[1]))
    return merge_statistics([ClusterStatistics.unpacked(row) for row in rows])


def merge_statistics(parts: Sequence[ClusterStatistics]) -> ClusterStatistics:
    """Of several batches as if they were one; (h, k, …) each."""
    sums, farthest, lowest, distortion, savings = (torch.stack(x) for x in zip(*parts, strict=True))
    which = lowest.argmin(0, keepdim=True)  # (1, h, k)
    farthest = farthest.gather(0, which[..., None].expand(-1, -1, -1, farthest.shape[-1]))[0]
    return ClusterStatistics(sums.sum(0), farthest, lowest.gather(0, which)[0], distortion.sum(0), savings.sum(0))


def of_all_processes(mine: ClusterStatistics) -> ClusterStatistics:
    """Together with those of the other processes, if training is distributed: the same in each, to the last bit."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return mine
    packed = mine.packed()
    parts = [torch.empty_like(packed) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, packed)
    return merge_statistics([ClusterStatistics.unpacked(part) for part in parts])


def moved_centroids(
    centroids: Tensor, sums: Tensor, savings: Tensor, seen: ClusterStatistics, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Centroids after a pass, and the moving averages of sums and savings that they follow.

    .. math:: m \leftarrow \lambda m + (1-\lambda) \sum_{i:\, \mu(x_i) = \mu} x_i, \qquad \mu = m / \|m\|

    `centroids` and `sums` m (h, k, d), `savings` (h, k), whose average decays by PATIENCE; averages begin at zero.
    Returns the three, new ones.

    *Paper* (section 4.1, algorithm 1): there μ itself is averaged with the sum, so its length grows with the number of
    members, and random centroids of the start are forgotten after 1/(1-λ) passes. Here only directions count, and the
    first pass already puts the centroids where the data is; later ones smooth.

    *Paper*: nothing is said of centroids that no token is near, or that share what one could hold. Here one whose
    average savings are below DISPENSABLE of the mean over its head starts again: the most dispensable at the farthest
    member of the cluster with the largest distortion in this pass, the next at that of the next.
    """
    sums = decay * sums + (1 - decay) * seen.sums
    savings = PATIENCE * savings + (1 - PATIENCE) * seen.savings
    norm = sums.norm(dim=-1, keepdim=True)
    centroids = torch.where(norm > 0, sums / norm.clamp(min=torch.finfo(norm.dtype).tiny), centroids)

    mean = savings.mean(-1, keepdim=True)
    rank = savings.argsort(stable=True).argsort()
    split = seen.distortion.argsort(descending=True, stable=True).gather(-1, rank)  # (h, k): whose member
    again = (savings < DISPENSABLE * mean) & (seen.lowest.gather(-1, split) < 2)
    start = seen.farthest.gather(1, split[..., None].expand_as(sums))
    centroids = torch.where(again[..., None], start, centroids)
    sums = torch.where(again[..., None], (1 - decay) * start, sums)  # as after a first pass
    return centroids, sums, torch.where(again, mean, savings)  # time to prove itself


def by_head(rule: Callable[..., Tensor], x: Tensor, centroids: Tensor, *rest: Tensor | None) -> Tensor:
    """`rule` over tensors whose rows and heads are one axis, (p, …), in float32 or wider; -> (b, h, …).

    On a CPU as many heads at once as have AT_ONCE cosines, at least one.
    """
    batch, heads, length = x.shape[:3]
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        tensors: list[Any] = [x.to(wide), centroids.to(wide).expand(batch, -1, -1, -1), *rest]
        tensors = [None if tensor is None else tensor.flatten(0, 1) for tensor in tensors]
        if choose_engine(x.device) != "tiled":
            return rule(*tensors).unflatten(0, (batch, heads))
        size = max(1, AT_ONCE // (centroids.shape[1] * length))
        parts = [None if tensor is None else tensor.split(size) for tensor in tensors]
        turns = zip(*(repeat(None) if part is None else part for part in parts), strict=False)
        return torch.cat([rule(*turn) for turn in turns]).unflatten(0, (batch, heads))


def of_heads(padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """(b, n) -> (b, h, n)."""
    return None if padding_mask is None else padding_mask[:, None].expand(-1, heads, -1)
