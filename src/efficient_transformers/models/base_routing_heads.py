"""Attention heads that route tokens to clusters, and the centroids of these clusters, which follow the data."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import initialization as init

from .base_attention import MultiHeadAttention
from .base_cache import BucketCacheLayer
from .base_mixer import SequenceInfo
from .ops_buckets import BucketLayout, recent_counts, sorted_chunks
from .ops_kmeans import (
    ClusterStatistics,
    cluster_statistics,
    merge_statistics,
    moved_centroids,
    nearest_centroid,
    nearest_tokens,
    of_all_processes,
    random_directions,
)
from .ops_tracing import count_blocks


class Routes(NamedTuple):
    """The clusters of the tokens of a pass: groups in an encoder, or one cluster per token, (b, h, 1, n), in a decoder.

    statistics: sums with which the centroids are updated after the pass; None outside training.
    """

    layout: BucketLayout | None
    clusters: Tensor | None
    statistics: ClusterStatistics | None


class RoutingHeads(MultiHeadAttention):
    """Multi-head attention with `num_routing_heads` heads that attend within clusters.

    centroids: (h, k, d) directions, one for each cluster of each routing head.
    sums, savings: moving averages that the centroids follow, (h, k, d) and (h, k).
    """

    cache_class = BucketCacheLayer
    centroids: Tensor
    sums: Tensor
    savings: Tensor

    def add_centroids(self, num_routing_heads: int) -> None:
        """Register the buffers of the routing heads; none without such heads."""
        self.num_routing_heads = num_routing_heads
        if num_routing_heads:
            self.register_drawn("centroids", self.draw())
            self.register_buffer("sums", torch.zeros_like(self.centroids))
            self.register_buffer("savings", torch.zeros_like(self.centroids[..., 0]))

    def draw(self) -> Tensor:
        """The initial centroids, (h, k, d), float32, on the CPU."""
        config = self.config
        generator = torch.Generator("cpu").manual_seed(config.cluster_seed + 0x10001 * self.layer)
        return random_directions(self.num_routing_heads, config.clusters_per_head, self.head_dim, generator)

    def reset_parameters(self) -> None:
        if self.num_routing_heads:
            init.copy_(self.centroids, self.draw())
            init.zeros_(self.sums)
            init.zeros_(self.savings)

    def route(self, q: Tensor, k: Tensor, padding_mask: Tensor | None) -> Routes:
        """Clusters for the queries and keys (b, n, h, d) of the routing heads, before positions are added to them."""
        causal, (batch, length, heads, _) = self.config.is_decoder, q.shape
        if not heads:
            return Routes(None, torch.zeros(batch, 0, 1, length, dtype=torch.long, device=q.device), None)
        q, k = (x.transpose(1, 2) * self.head_dim**-0.5 for x in (q, k))
        statistics = None
        if self.training and self.learns:
            sides = (q,) if causal else (q, k)
            statistics = merge_statistics([cluster_statistics(x, self.centroids, padding_mask) for x in sides])
        if causal:
            return Routes(None, nearest_centroid(q, self.centroids)[:, :, None], statistics)
        return Routes(self.nearest_groups(q, k, padding_mask), None, statistics)

    def nearest_groups(self, q: Tensor, k: Tensor, padding_mask: Tensor | None) -> BucketLayout:
        """One group per cluster: the w queries and the w keys (b, h, n, d) nearest to its centroid."""
        batch, _, length, _ = q.shape
        size, count = self.config.cluster_size, self.config.clusters_per_head
        real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if padding_mask is None else padding_mask
        sizes = None if size else -(-real.sum(1) // count)
        if size is None:
            size = count_blocks(length, count)
        elif isinstance(length, int):
            size = min(size, length)
        layout = BucketLayout(*(nearest_tokens(x, self.centroids, size, sizes, padding_mask) for x in (q, k)))  # type: ignore[reportArgumentType]
        return replace(layout, missed=real[:, None] & ~layout.standing(length))

    def layout(self, routes: Routes, padding_mask: Tensor | None) -> BucketLayout:
        """Groups of the routing heads, in a decoder chunks of the tokens sorted by cluster."""
        if routes.layout is not None:
            return routes.layout
        assert routes.clusters is not None
        return sorted_chunks(routes.clusters, padding_mask, self.config.reach, causal=True)

    def counts(
        self, routes: Routes, positions: Tensor, key_positions: Tensor, key_clusters: Tensor | None = None
    ) -> Tensor:
        """Number of times each query attends to each key, (b, h, n, m) int64; `key_clusters` are those of `routes`."""
        if routes.layout is not None:
            return routes.layout.counts(positions.shape[1])
        assert routes.clusters is not None
        key_clusters = routes.clusters if key_clusters is None else key_clusters
        return recent_counts(routes.clusters, key_clusters, positions, key_positions, self.config.reach)

    def finish_pass(self, sequence: SequenceInfo) -> None:
        """Move the centroids by the statistics of the pass, of all processes together."""
        routes: list[Routes] = [part.decisions[self.layer] for part in sequence.parts if self.layer in part.decisions]
        statistics = [route.statistics for route in routes if route.statistics is not None]
        if statistics:
            averages = self.centroids, self.sums, self.savings
            seen = of_all_processes(merge_statistics(statistics))
            # new tensors, possibly in a wider dtype: in bfloat16 the moving averages would not change
            self.centroids, self.sums, self.savings = moved_centroids(*averages, seen, self.config.ema_decay)
