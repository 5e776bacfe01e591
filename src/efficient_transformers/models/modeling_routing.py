r"""Routing Transformer: attention within clusters found by online k-means (Roy et al. 2020, arXiv:2003.05997).

.. math:: o_i = \sum_{j:\, \mu(k_j) = \mu(q_i)} \mathrm{softmax}_j(q_i^\top k_j / \sqrt d)\, v_j

Queries and keys are directions, and each of the k centroids takes the w = n/k nearest of both (section 4.1); some heads
use a window instead. A query in several clusters attends to them in one softmax. The centroids follow the data in
training only (`ops_kmeans.moved_centroids`). O(n·k·d + n·w·d), which is O(n^1.5·d) for k = √n.

*Paper*: outputs of the clusters are scattered back to the tokens; the authors' code averages several outputs of one
query, and the output of a query in no cluster is zero. Here such a query attends to itself. *Paper*: directions are
computed by layer normalization without scale and bias, which subtracts the mean of the features. Here it is not
subtracted. Both result in a norm of √d.

*Paper*, causal: centroids take their tokens from the whole sequence, so membership depends on later tokens. Here each
token joins the nearest centroid and attends to the last w earlier tokens of that cluster, and to itself only if there
are none: with shared queries and keys (section 4.1), it would attend to little else.
"""

from math import log2

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation import GenerationMixin

from .attn_bucketed import bucketed_attention
from .attn_dense import softmax_attention
from .attn_pattern import pattern_attention
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
from .base_routing_heads import Routes, RoutingHeads
from .ops_checks import check_at_least
from .ops_patterns import AttentionPattern
from .ops_rotary import rotate


@strict
class EtRoutingConfig(EtConfig):
    """
    Args:
        num_clusters: k, centroids of each routing head; None takes a power of two near the square root of
            max_position_embeddings.
        cluster_size: w, tokens of a cluster, or in a decoder the keys of a token. None takes 1/k of the real tokens of
            a row, or in a decoder of max_position_embeddings.
        local_heads: number of heads, the first ones, that use a window instead; None takes half of them.
        window_size: tokens on each side that local heads attend to.
        ema_decay: λ of the moving averages that the centroids follow in training.
        cluster_seed: seed of the initial random centroids.
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
        """Pattern of the local heads."""
        return AttentionPattern(window=self.window_size, causal=self.is_decoder)

    @property
    def clusters_per_head(self) -> int:
        """k, with the default filled in."""
        return self.num_clusters or 2 ** round(log2(self.max_position_embeddings) / 2)

    @property
    def reach(self) -> int:
        """w in a decoder."""
        return self.cluster_size or -(-self.max_position_embeddings // self.clusters_per_head)

    def validate_clusters(self):
        check_at_least("window_size", self.window_size, 1, "local heads attend to their neighbours")
        for name in ("num_clusters", "cluster_size"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1, "None takes a number that suits the length")
        if not 0 <= self.num_local_heads <= self.num_attention_heads:
            raise ValueError(
                f"local_heads ({self.local_heads}) must lie between 0 and num_attention_heads "
                f"({self.num_attention_heads}): the others route."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must lie in [0, 1): it is the weight of earlier passes.")


class EtRoutingAttention(RoutingHeads):
    """The first heads attend to a window, the others route."""

    def __init__(self, config: EtRoutingConfig, layer: int):
        super().__init__(config, layer)
        self.dropout, self.window = config.attention_probs_dropout_prob, config.window
        local, routing = self.head_counts = config.num_local_heads, config.num_routing_heads
        self.key_counts = (local,) if config.is_decoder else self.head_counts
        if config.is_decoder:  # queries are the keys of routing heads
            self.k_proj = nn.Linear(config.hidden_size, local * self.head_dim) if local else None
        self.add_centroids(routing)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are written out."""
        (local_q, local_k, routing_q, routing_k), routes = self.queries_and_keys(hidden, sequence)
        v, dropout = self.split_heads(self.v_proj(hidden)), self.dropout if self.training else 0.0
        if sequence.cache is not None:
            q, k = torch.cat([local_q, routing_q], 1), torch.cat([local_k, routing_k], 1)
            seen = sequence.cache.get_seq_length(self.layer)
            memory: BucketCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            assert routes.clusters is not None
            keys, values, *cached = memory.update(k, v, sequence.positions, routes.clusters)
            if seen:  # a few new tokens over the cached ones
                return softmax_attention(q, keys, values, self.allowed(routes, sequence.positions, *cached), dropout)
        if self.engine(hidden, sequence) == "dense":
            q, k = torch.cat([local_q, routing_q], 1), torch.cat([local_k, routing_k], 1)
            return softmax_attention(q, k, v, self.allowed(routes, sequence.positions, sequence.positions), dropout)
        local_v, routing_v = v.split(self.head_counts, 1)
        mixed = []
        if local_v.shape[1]:
            mixed.append(pattern_attention(local_q, local_k, local_v, self.window, sequence, dropout))
        if routing_v.shape[1]:
            layout = self.layout(routes, sequence.padding_mask)
            mixed.append(bucketed_attention(routing_q, routing_k, routing_v, layout, dropout))
        # joined along the features, the layout that the output projection needs
        return torch.cat([x.transpose(1, 2) for x in mixed], 2).transpose(1, 2), None

    def queries_and_keys(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[list[Tensor], Routes]:
        """Queries and keys of local heads, then of routing heads, (b, h, n, d) each, and the routes of the latter."""
        local_q, routing_q = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(self.head_counts, 2)
        local_k, routing_q = local_q, F.rms_norm(routing_q, routing_q.shape[-1:])  # (b, n, h, d), of norm √d
        routing_k = routing_q
        if self.k_proj is not None:
            local_k, *own = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim)).split(self.key_counts, 2)
            routing_k = F.rms_norm(own[0], routing_q.shape[-1:]) if own else routing_q
        routes = sequence.cached_choice(self.layer, lambda: self.route(routing_q, routing_k, sequence.padding_mask))
        parts = [local_q, local_k, routing_q, routing_k]
        if sequence.rotary is not None:  # after routing, because clusters are about content
            parts = [rotate(x, sequence.rotary) for x in parts]
        return [x.transpose(1, 2) for x in parts], routes

    def allowed(self, routes: Routes, i: Tensor, j: Tensor, key_clusters: Tensor | None = None) -> Tensor:
        """Number of times queries at `i` (b, n) attend to keys at `j` (b, m), of the same pass or in `key_clusters`."""
        routed = self.counts(routes, i, j, key_clusters)
        i, j = i[:, None, :, None], j[:, None, None, :]
        local = self.window.allows(torch.zeros_like(i), i, j, 0) & (i >= 0) & (j >= 0)
        return torch.cat([local.expand(-1, self.head_counts[0], -1, -1).long(), routed], 1)


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
