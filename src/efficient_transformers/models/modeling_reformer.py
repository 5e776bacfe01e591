r"""Reformer: each token attends to the tokens in its hash bucket (Kitaev et al. 2020, arXiv:2001.04451).

.. math:: o_i = \sum_{j \in P_i} \exp(q_i^\top k_j - z(i, P_i))\, v_j, \qquad P_i = \{j : h(q_i) = h(k_j)\}, \qquad
          k_j = q_j / \|q_j\|, \qquad h(x) = \mathrm{argmax}\,[xR;\, -xR]

Tokens are sorted by bucket and cut into chunks; a token attends to its bucket, within its own chunk and the previous
one, and to itself only if it has no other key (section 2). Rounds of hashing are combined by their normalizers
(appendix A). The layers are reversible, so that training stores none of their activations (section 3).
O(r·n·c·d) for r rounds with chunks of c tokens, plus O(r·n log n) for sorting.

*Paper*: the weight of a pair that meets in several rounds is divided by their number; here it counts in each round, as
in transformers. *Paper*, causal: a token attends to the earlier tokens of its chunk and the previous one, where chunk
boundaries depend on later tokens. Here it attends to the last c tokens of its bucket, which lie in the same two chunks.
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
from .ops_lsh import assign_buckets, assign_buckets_by_length, random_rotations, widest_factors


@strict
class EtReformerConfig(EtConfig):
    """
    Args:
        num_hashes: r, rounds of hashing.
        num_buckets: buckets of a round, an even number; a list of even numbers is their product, with one hash for
            each; 1 is exact attention, without buckets. None takes two buckets for each chunk: of the real tokens of a
            row, or in a decoder, where no choice may depend on later tokens, of max_position_embeddings.
        lsh_chunk_length: c, tokens of a chunk.
        hash_seed: seed of the rotations R.
        attend_across_buckets: an encoder attends to both chunks whatever the bucket, and the first chunk of a round to
            the last one of the previous round, as transformers' `reformer` does.
        reversible: two residual streams, whose activations are recomputed in the backward pass.
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
        """c; with one bucket, the whole sequence."""
        return self.max_position_embeddings if self.is_exact else self.lsh_chunk_length

    @property
    def bucket_limit(self) -> int:
        """Most buckets of one hash; a larger number is the product of two."""
        return 2 * max(isqrt(self.max_position_embeddings // self.lsh_chunk_length), self.lsh_chunk_length)

    @property
    def widest_factors(self) -> tuple[int, ...]:
        """Largest number of buckets, over all lengths, of each hash of a round."""
        if self.num_buckets is not None:
            return tuple(self.num_buckets) if isinstance(self.num_buckets, list) else (self.num_buckets,)
        longest = self.max_position_embeddings
        return widest_factors(longest, self.lsh_chunk_length, self.bucket_limit, any_length=not self.is_decoder)

    def validate_hashes(self):
        check_at_least("num_hashes", self.num_hashes, 1, "each round hashes once")
        check_at_least("lsh_chunk_length", self.lsh_chunk_length, 1, "it counts the tokens of a chunk")
        if self.num_buckets is not None and not self.is_exact:
            for factor in self.widest_factors:
                if factor < 2 or factor % 2:
                    raise ValueError(
                        f"num_buckets ({self.num_buckets}) must have even factors: a hash and its negative have a "
                        "bucket each. Set 1 for exact attention, or None for a number that suits the length."
                    )
        if self.attend_across_buckets and self.is_decoder:
            raise ValueError(
                "attend_across_buckets=True cannot be causal: the tokens of a chunk depend on later ones. "
                "Set is_decoder=False or attend_across_buckets=False."
            )


class EtReformerAttention(MultiHeadAttention):
    """LSH attention. The keys are the normalized queries; rotations: R, (h, d, r, columns)."""

    cache_class = BucketCacheLayer
    rotations: Tensor

    def __init__(self, config: EtReformerConfig, layer: int):
        super().__init__(config, layer)
        self.k_proj = None
        self.dropout = config.attention_probs_dropout_prob
        self.widest = config.widest_factors
        self.num_hashes = 1 if config.is_exact else config.num_hashes  # with one bucket all rounds are equal
        self.register_drawn("rotations", self.draw())

    def draw(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.config.hash_seed + 0x10001 * self.layer)
        return random_rotations(self.num_heads, self.head_dim, self.num_hashes, self.widest, generator)

    def reset_parameters(self) -> None:
        init.copy_(self.rotations, self.draw())

    def resized(self) -> None:
        self.widest = self.config.widest_factors
        self.rotations = self.draw().to(self.rotations)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are written out."""
        q, v = self.split_heads(self.q_proj(hidden), sequence.rotary), self.split_heads(self.v_proj(hidden))
        k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()  # of norm √d, by which scores are divided
        dropout, padding_mask = self.dropout if self.training else 0.0, sequence.padding_mask
        buckets = sequence.cached_choice(self.layer, lambda: self.buckets(q, padding_mask))
        if sequence.cache is not None:
            seen = sequence.cache.get_seq_length(self.layer)
            memory: BucketCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            keys, values, positions, key_buckets = memory.update(k, v, sequence.positions, buckets)
            if seen:  # a few new tokens over the cached ones
                reach = self.config.chunk_length
                counts = recent_counts(buckets, key_buckets, sequence.positions, positions, reach)
                return softmax_attention(q, keys, values, counts, dropout)
        layout = self.layout(buckets, padding_mask)
        if self.engine(hidden, sequence) == "dense":
            return softmax_attention(q, k, v, layout.counts(q.shape[2]), dropout)
        return bucketed_attention(q, k, v, layout, dropout), None

    def buckets(self, q: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The bucket of each token in each round, (b, h, r, n) int64."""
        config = self.config
        if config.num_buckets is not None or config.is_decoder:
            return assign_buckets(q, self.rotations, self.widest)
        batch, _, length, _ = q.shape
        lengths = torch.full((batch,), length, device=q.device) if padding_mask is None else padding_mask.sum(1)
        limits = config.lsh_chunk_length, config.bucket_limit
        return assign_buckets_by_length(q, self.rotations, self.widest, lengths, *limits)

    def layout(self, buckets: Tensor, padding_mask: Tensor | None) -> BucketLayout:
        if self.config.attend_across_buckets:
            return chained_chunks(buckets, padding_mask, self.config.chunk_length, causal=False)
        return sorted_chunks(buckets, padding_mask, self.config.chunk_length, self.config.is_decoder)


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
