r"""Reformer: a token reads the tokens whose vectors point where its own does (Kitaev et al. 2020, arXiv:2001.04451).

.. math:: o_i = \sum_{j \in P_i} \exp(q_i^\top k_j - z(i, P_i))\, v_j, \qquad P_i = \{j : h(q_i) = h(k_j)\}, \qquad
          k_j = q_j / \|q_j\|, \qquad h(x) = \mathrm{argmax}\,[xR;\, -xR]

Sorted by bucket, tokens read their own chunk and the one before it, within their bucket, and themselves only where
there is nothing else (section 2). Several rounds of hashing are added up by their normalisers (appendix A). The
layers are reversible, so that training keeps no activations of them (section 3). O(r·n·c·d) for r rounds of chunks of
c tokens, and O(r·n log n) for the sorting.

*Paper*: a pair that meets in several rounds is divided by their number there; here it counts each time, as it does in
transformers. *Paper*, causal: a token reads what its chunk and the one before it hold of the past there, and where
chunks begin depends on tokens to come. Here it reads the last c tokens of its bucket, which lie in the same two chunks.
"""

from math import isqrt

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .attn_bucketed import bucketed_attention
from .attn_dense import softmax_attention
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
from .ops_buckets import BucketLayout, chained_chunks, recent_counts, sorted_chunks
from .ops_checks import check_at_least
from .ops_lsh import assign_buckets, bucket_factors, narrowed, random_rotations
from .ops_tracing import is_traced


@strict
class EtReformerConfig(EtConfig):
    """
    Args:
        num_hashes: rounds of hashing, r.
        num_buckets: buckets of a round, an even number; a list is a product of even numbers, with a hash for each; 1
            is exact attention, where every token reads every other one. None takes two for each chunk, of the real
            tokens of a row, or of max_position_embeddings as a decoder, where the past may not depend on the length.
        lsh_chunk_length: tokens in a chunk, c.
        hash_seed: of the rotations.
        attend_across_buckets: an encoder reads its two chunks whatever the bucket, and the first chunk of a round the
            last one of the round before: what transformers' `reformer` computes.
        reversible: two residual streams, whose activations are computed again in the backward pass.
    """

    model_type = "et_reformer"

    num_hashes: int = 4
    num_buckets: int | list[int] | None = None
    lsh_chunk_length: int = 64
    hash_seed: int = 0
    attend_across_buckets: bool = False
    reversible: bool = True

    @property
    def is_exact(self) -> bool:
        return self.num_buckets == 1

    @property
    def chunk_length(self) -> int:
        """c; one bucket is one chunk."""
        return self.max_position_embeddings if self.is_exact else self.lsh_chunk_length

    @property
    def bucket_limit(self) -> int:
        """Most buckets of one hash; more are the product of two."""
        return 2 * max(isqrt(self.max_position_embeddings // self.lsh_chunk_length), self.lsh_chunk_length)

    @property
    def widest_factors(self) -> tuple[int, ...]:
        """The most buckets that each hash of a round has at any length."""
        if self.num_buckets is not None:
            return tuple(self.num_buckets) if isinstance(self.num_buckets, list) else (self.num_buckets,)
        longest = torch.tensor([self.max_position_embeddings], device="cpu")
        first, second = bucket_factors(longest, self.lsh_chunk_length, self.bucket_limit)[0].tolist()
        # a shorter row may stay below the limit, with one hash alone
        return first, second if first == 1 or self.is_decoder else max(second, self.bucket_limit)

    def validate_hashes(self):
        check_at_least("num_hashes", self.num_hashes, 1, "each round is one chance to meet")
        check_at_least("lsh_chunk_length", self.lsh_chunk_length, 1, "a chunk holds tokens")
        if self.num_buckets is not None and not self.is_exact:
            for factor in self.widest_factors:
                if factor < 2 or factor % 2:
                    raise ValueError(
                        f"num_buckets ({self.num_buckets}) must be even, each factor of it: a hash and its negative "
                        "have a bucket each. 1 is exact attention, None takes what suits the length."
                    )
        if self.attend_across_buckets and self.is_decoder:
            raise ValueError(
                "attend_across_buckets=True cannot be causal: who stands in a chunk depends on later tokens. "
                "Set is_decoder=False or attend_across_buckets=False."
            )


class EtReformerAttention(MultiHeadAttention):
    """Keys are the queries, at length 1. rotations: R, (h, d, r, columns)."""

    cache_class = BucketCacheLayer
    rotations: Tensor

    def __init__(self, config: EtReformerConfig, layer: int):
        super().__init__(config, layer)
        self.k_proj = None
        self.dropout = config.attention_probs_dropout_prob
        self.widest = config.widest_factors
        self.num_hashes = 1 if config.is_exact else config.num_hashes  # rounds of one bucket are all the same
        self.register_drawn("rotations", self.draw())

    def draw(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.config.hash_seed + 0x10001 * self.layer)
        return random_rotations(self.num_heads, self.head_dim, self.num_hashes, self.widest, generator)

    def reset_parameters(self) -> None:
        init.copy_(self.rotations, self.draw())

    def resized(self) -> None:
        self.widest = self.config.widest_factors
        self.rotations = self.draw().to(self.rotations)

    def new_cache_layer(self) -> BucketCacheLayer:
        return BucketCacheLayer()

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are computed."""
        q, v = self.split_heads(self.q_proj(hidden), sequence.rotary), self.split_heads(self.v_proj(hidden))
        k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()  # of length √d: scores are divided by it again
        dropout, keep = self.dropout if self.training else 0.0, sequence.keep
        buckets = sequence.cached_choice(self.layer, lambda: self.buckets(q, keep))
        if sequence.cache is not None:
            seen = sequence.cache.get_seq_length(self.layer)
            memory: BucketCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            keys, values, positions, key_buckets = memory.update(k, v, sequence.positions, buckets)
            if seen:  # a few new tokens against the past
                places = sequence.positions, positions
                counts = recent_counts(buckets, key_buckets, *places, self.config.chunk_length)
                return softmax_attention(q, keys, values, counts, dropout)
        layout = self.layout(buckets, keep)
        if self.engine(hidden, sequence) == "dense":
            return softmax_attention(q, k, v, layout.counts(q.shape[2]), dropout)
        return bucketed_attention(q, k, v, layout, dropout), None

    def buckets(self, q: Tensor, keep: Tensor | None) -> Tensor:
        """(b, h, r, n) int64."""
        config, rotations, widest, factors = self.config, self.rotations, self.widest, None
        if config.num_buckets is None and not config.is_decoder:
            batch, _, length, _ = q.shape
            lengths = keep.sum(1) if keep is not None else torch.full((batch,), length, device=q.device)
            factors = bucket_factors(lengths, config.lsh_chunk_length, config.bucket_limit)
            if not is_traced():  # the rows of a batch rarely need all columns
                needed = factors.amax(0)
                factors = None if bool((factors == needed).all()) else factors
                rotations, widest = narrowed(rotations, widest, needed.tolist()), needed.tolist()
        return assign_buckets(q, rotations, widest, factors)

    def layout(self, buckets: Tensor, keep: Tensor | None) -> BucketLayout:
        if self.config.attend_across_buckets:
            return chained_chunks(buckets, keep, self.config.chunk_length, causal=False)
        return sorted_chunks(buckets, keep, self.config.chunk_length, self.config.is_decoder)


class EtReformerPreTrainedModel(EtPreTrainedModel):
    config: EtReformerConfig
    mixer_class = EtReformerAttention
    _supports_flex_attn = False


class EtReformerModel(Backbone, EtReformerPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtReformerPreTrainedModel.model_class = EtReformerModel


class EtReformerForMaskedLM(ForMaskedLM, EtReformerPreTrainedModel): ...


class EtReformerForCausalLM(ForCausalLM, EtReformerPreTrainedModel, GenerationMixin): ...


class EtReformerForSequenceClassification(ForSequenceClassification, EtReformerPreTrainedModel): ...


class EtReformerForTokenClassification(ForTokenClassification, EtReformerPreTrainedModel): ...


class EtReformerForQuestionAnswering(ForQuestionAnswering, EtReformerPreTrainedModel): ...


class EtReformerForMultipleChoice(ForMultipleChoice, EtReformerPreTrainedModel): ...


class EtReformerForImageClassification(ForImageClassification, EtReformerPreTrainedModel): ...
