r"""Routing Transformer: a token reads its cluster, found by online k-means (Roy et al. 2020, arXiv:2003.05997).

.. math:: o_i = \sum_{j:\, \mu(k_j) = \mu(q_i)} \mathrm{softmax}_j(q_i^\top k_j / \sqrt d)\, v_j

Queries and keys are directions, and each of the k centroids takes the w = n/k nearest of both (section 4.1); some heads
use a window instead. A query in several clusters attends to them in one softmax. The centroids follow the data
in training, and only there (`ops_kmeans.moved_centroids`). O(n·k·d + n·w·d), which is O(n^1.5·d) for k = √n.

*Paper*: what a query reads in each of its clusters is scattered back, of which the authors' code takes the mean, and a
query of no cluster gives zero; here it reads itself. *Paper*: layer normalisation without scale and bias makes the
directions, which takes off the mean of the features, too; here they keep it. Either gives them length √d.

*Paper*, causal: centroids take their tokens from the whole sequence, so who is taken depends on tokens to come. Here a
token goes to the nearest centroid and reads the last w tokens of that cluster before itself, and itself only where
there are none: queries and keys are the same (section 4.1), and it would read little else.
"""

from dataclasses import replace
from math import log2
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .attn_bucketed import bucketed_attention
from .attn_dense import softmax_attention
from .attn_pattern import pattern_attention
from .base_attention import MultiHeadAttention
from .base_backbone import Backbone
from .base_cache import BucketCacheLayer
from .base_configuration import EtConfig
from .base_heads import (
    ForCausalLM,
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_mixer import SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_buckets import BucketLayout, recent_counts, sorted_chunks
from .ops_checks import check_at_least
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
from .ops_patterns import AttentionPattern
from .ops_rotary import rotate
from .ops_tracing import count_blocks


@strict
class EtRoutingConfig(EtConfig):
    """
    Args:
        num_clusters: k, centroids of each routing head; None takes a power of two near the root of
            max_position_embeddings.
        cluster_size: w, tokens that a centroid takes, or that a token reads as a decoder; None takes as many as there
            are over k: real tokens of the row, or max_position_embeddings as a decoder.
        local_heads: number of heads, the first ones, that use a window instead; None takes half of them.
        window_size: of the local heads, tokens to each side.
        ema_decay: λ of the moving averages that the centroids follow in training.
        cluster_seed: of the random centroids of the start.
    """

    model_type = "et_routing"

    num_clusters: int | None = None
    cluster_size: int | None = None
    local_heads: int | None = None
    window_size: int = 128
    ema_decay: float = 0.999
    cluster_seed: int = 0

    @property
    def num_local_heads(self) -> int:
        return self.num_attention_heads // 2 if self.local_heads is None else self.local_heads

    @property
    def num_routing_heads(self) -> int:
        return self.num_attention_heads - self.num_local_heads

    @property
    def window(self) -> AttentionPattern:
        """What the local heads read."""
        return AttentionPattern(window=self.window_size, causal=self.is_decoder)

    @property
    def clusters_per_head(self) -> int:
        """k, with the default filled in."""
        return self.num_clusters or 2 ** round(log2(self.max_position_embeddings) / 2)

    @property
    def reach(self) -> int:
        """w of a decoder."""
        return self.cluster_size or -(-self.max_position_embeddings // self.clusters_per_head)

    def validate_clusters(self):
        check_at_least("window_size", self.window_size, 1, "a local head reads at least its neighbours")
        for name in ("num_clusters", "cluster_size"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1, "None takes what suits the length")
        if not 0 <= self.num_local_heads <= self.num_attention_heads:
            raise ValueError(
                f"local_heads ({self.local_heads}) must lie between 0 and num_attention_heads "
                f"({self.num_attention_heads}): the others route."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must lie in [0, 1): it is the share of the past.")


Pair = tuple[Tensor, Tensor]


class Routes(NamedTuple):
    """Where the tokens of a pass go: groups of an encoder, or clusters (b, h, 1, n) of a decoder."""

    layout: BucketLayout | None
    clusters: Tensor | None
    statistics: ClusterStatistics | None  # in training


class EtRoutingAttention(MultiHeadAttention):
    """The first heads read a window, the others their cluster.

    centroids: (h, k, d) directions of the routing heads. sums, savings: the moving averages that they follow.
    """

    cache_class = BucketCacheLayer
    centroids: Tensor
    sums: Tensor
    savings: Tensor

    def __init__(self, config: EtRoutingConfig, layer: int):
        super().__init__(config, layer)
        self.dropout = config.attention_probs_dropout_prob
        local, routing = self.sides = config.num_local_heads, config.num_routing_heads
        self.window = config.window
        self.key_sides = self.sides
        if config.is_decoder:  # routing heads have no keys of their own
            self.key_sides = (local,)
            self.k_proj = nn.Linear(config.hidden_size, local * self.head_dim) if local else None
        if routing:
            self.register_drawn("centroids", self.draw())
            self.register_buffer("sums", torch.zeros_like(self.centroids))
            self.register_buffer("savings", torch.zeros_like(self.centroids[..., 0]))

    def draw(self) -> Tensor:
        """The centroids of the start, (h, k, d), float32, on the CPU."""
        config = self.config
        generator = torch.Generator("cpu").manual_seed(config.cluster_seed + 0x10001 * self.layer)
        return random_directions(self.sides[1], config.clusters_per_head, self.head_dim, generator)

    def reset_parameters(self) -> None:
        if self.sides[1]:
            init.copy_(self.centroids, self.draw())
            init.zeros_(self.sums)
            init.zeros_(self.savings)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are computed."""
        near, far, routes = self.queries_and_keys(hidden, sequence)
        v, dropout = self.split_heads(self.v_proj(hidden)), self.dropout if self.training else 0.0
        written_out = self.engine(hidden, sequence) == "dense"
        if sequence.cache is not None or written_out:
            q, k = (torch.cat(pair, 1) for pair in zip(near, far, strict=True))
            if sequence.cache is not None:
                seen = sequence.cache.get_seq_length(self.layer)
                memory: BucketCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
                assert routes.clusters is not None
                keys, values, *past = memory.update(k, v, sequence.positions, routes.clusters)
                if seen:  # a few new tokens against the past
                    allowed = self.allowed(routes, sequence.positions, *past)
                    return softmax_attention(q, keys, values, allowed, dropout)
            if written_out:
                return softmax_attention(q, k, v, self.allowed(routes, sequence.positions), dropout)

        near_v, far_v = v.split(self.sides, 1)
        mixed = []
        if near_v.shape[1]:
            mixed.append(pattern_attention(*near, near_v, self.window, sequence, dropout))
        if far_v.shape[1]:
            mixed.append(bucketed_attention(*far, far_v, self.layout(routes, sequence.keep), dropout))
        # side by side in memory, as the output projection reads them
        return torch.cat([x.transpose(1, 2) for x in mixed], 2).transpose(1, 2), None

    def queries_and_keys(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Pair, Pair, Routes]:
        """Of the local heads, of the routing heads, (b, h, n, d) each, and where the tokens go."""
        near_q, far_q = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(self.sides, 2)  # (b, n, h, d)
        near_k, far_q = near_q, F.rms_norm(far_q, far_q.shape[-1:])  # of length √d
        far_k = far_q
        if self.k_proj is not None:
            near_k, *own = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(self.key_sides, 2)
            far_k = F.rms_norm(own[0], far_q.shape[-1:]) if own else far_q
        routes = sequence.cached_choice(self.layer, lambda: self.route(far_q, far_k, sequence.keep))
        parts = [near_q, near_k, far_q, far_k]
        if sequence.rotary is not None:  # behind the choice: a cluster is one of content
            parts = [rotate(x, sequence.rotary) for x in parts]
        near_q, near_k, far_q, far_k = (x.transpose(1, 2) for x in parts)
        return (near_q, near_k), (far_q, far_k), routes

    def route(self, q: Tensor, k: Tensor, keep: Tensor | None) -> Routes:
        """Where queries and keys (b, n, h, d) of the routing heads go, and in training what the clusters learn."""
        causal, (batch, length, heads, _) = self.config.is_decoder, q.shape
        if not heads:
            return Routes(None, torch.zeros(batch, 0, 1, length, dtype=torch.long, device=q.device), None)
        q, k = (x.transpose(1, 2) * self.head_dim**-0.5 for x in (q, k))
        statistics = None
        if self.training and self.learns:
            statistics = merge_statistics(
                [cluster_statistics(x, self.centroids, keep) for x in ((q,) if causal else (q, k))]
            )
        if causal:
            return Routes(None, nearest_centroid(q, self.centroids)[:, :, None], statistics)
        size, count = self.config.cluster_size, self.config.clusters_per_head
        real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if keep is None else keep
        sizes = None if size else -(-real.sum(1) // count)
        if size is None:
            size = count_blocks(length, count)
        elif isinstance(length, int):
            size = min(size, length)
        layout = BucketLayout(*(nearest_tokens(x, self.centroids, size, sizes, keep) for x in (q, k)))  # type: ignore[reportArgumentType]
        return Routes(replace(layout, missed=real[:, None] & ~layout.standing(length)), None, statistics)

    def layout(self, routes: Routes, keep: Tensor | None) -> BucketLayout:
        """Groups of the routing heads."""
        if routes.layout is not None:
            return routes.layout
        assert routes.clusters is not None
        return sorted_chunks(routes.clusters, keep, self.config.reach, causal=True)

    def allowed(
        self,
        routes: Routes,
        positions: Tensor,
        key_positions: Tensor | None = None,
        key_clusters: Tensor | None = None,
    ) -> Tensor:
        """How often each query reads each key, itself and those before it if not told of others: (b, h, n, m) int64."""
        key_positions = positions if key_positions is None else key_positions
        i, j = positions[:, None, :, None], key_positions[:, None, None, :]
        near = self.window.allows(torch.zeros_like(i), i, j, 0) & (i >= 0) & (j >= 0)
        if routes.layout is not None:
            far = routes.layout.counts(positions.shape[1])
        else:
            assert routes.clusters is not None
            key_clusters = routes.clusters if key_clusters is None else key_clusters
            far = recent_counts(routes.clusters, key_clusters, positions, key_positions, self.config.reach)
        return torch.cat([near.expand(-1, self.sides[0], -1, -1).long(), far], 1)

    def finish_pass(self, sequence: SequenceInfo) -> None:
        routes: list[Routes] = [part.decisions[self.layer] for part in sequence.parts if self.layer in part.decisions]
        statistics = [route.statistics for route in routes if route.statistics is not None]
        if statistics:
            averages = self.centroids, self.sums, self.savings
            seen = of_all_processes(merge_statistics(statistics))
            # new tensors, which may be of a wider dtype: in bfloat16 a moving average stands still
            self.centroids, self.sums, self.savings = moved_centroids(*averages, seen, self.config.ema_decay)


class EtRoutingPreTrainedModel(EtPreTrainedModel):
    config: EtRoutingConfig
    mixer_class = EtRoutingAttention
    _supports_flex_attn = False


class EtRoutingModel(Backbone, EtRoutingPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtRoutingPreTrainedModel.model_class = EtRoutingModel


class EtRoutingForMaskedLM(ForMaskedLM, EtRoutingPreTrainedModel): ...


class EtRoutingForCausalLM(ForCausalLM, EtRoutingPreTrainedModel, GenerationMixin): ...


class EtRoutingForSequenceClassification(ForSequenceClassification, EtRoutingPreTrainedModel): ...


class EtRoutingForTokenClassification(ForTokenClassification, EtRoutingPreTrainedModel): ...


class EtRoutingForQuestionAnswering(ForQuestionAnswering, EtRoutingPreTrainedModel): ...


class EtRoutingForMultipleChoice(ForMultipleChoice, EtRoutingPreTrainedModel): ...


class EtRoutingForImageClassification(ForImageClassification, EtRoutingPreTrainedModel): ...
