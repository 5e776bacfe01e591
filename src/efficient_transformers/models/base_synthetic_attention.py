"""Attention whose scores are a sum of terms instead of products of queries and keys."""

from torch import Tensor
from torch.nn import functional as F

from .attn_dense import masked_softmax
from .attn_pattern import pattern_attention
from .attn_synthesizer import synthetic_attention
from .base_attention import MultiHeadAttention
from .base_cache import PatternCacheLayer
from .base_mixer import SequenceInfo
from .ops_patterns import AttentionPattern
from .ops_score_terms import Places, Term, as_one_product


class SyntheticScoresAttention(MultiHeadAttention):
    """Softmax over the sum of the terms that a subclass defines.

    compares_tokens: do the terms need queries and keys? If not, those passed to `terms` have no features.
    all_products: are all terms products of features? Then they are evaluated as ordinary attention.
    """

    cache_class = PatternCacheLayer
    compares_tokens: bool
    all_products: bool

    def terms(self, hidden: Tensor, q: Tensor, k: Tensor, places: Places | None = None) -> list[Term]:
        """Terms of the scores of `hidden` (b, n, e).

        places: positions of queries (b, n) and keys (b, m), none negative; None means 0 … n-1 for both.
        """
        raise NotImplementedError

    def new_cache_layer(self) -> PatternCacheLayer:
        return PatternCacheLayer(0, None)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are written out."""
        v, positions = self.split_heads(self.v_proj(hidden)), sequence.positions
        q = k = v[..., :0]
        if self.compares_tokens:
            q, k = (self.split_heads(proj(hidden), sequence.rotary) for proj in (self.q_proj, self.k_proj))
        if sequence.cache is not None:
            seen = sequence.cache.get_seq_length(self.layer)
            memory: PatternCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            keys, values, key_positions = memory.update(k, v, positions)
            if seen:
                return self.attend_densely(hidden, q, keys, values, positions, key_positions)[0], None
        engine = self.engine(hidden, sequence)
        if engine == "dense":
            return self.attend_densely(hidden, q, k, v, positions, positions)
        if self.all_products:
            return self.attend_by_products(hidden, q, k, v, sequence), None
        if engine == "tiled":
            terms = self.terms(hidden, q, k)
            return synthetic_attention(terms, v, self.config.is_decoder, sequence.lengths, self.dropout), None
        return self.attend_densely(hidden, q, k, v, positions, positions)[0], None

    @property
    def dropout(self) -> float:
        return self.config.attention_probs_dropout_prob if self.training else 0.0

    def attend_densely(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and weights of queries at positions `i` (b, n) over keys at `j` (b, m), written out."""
        allowed = ((j[:, None] >= 0) & (i[..., None] >= 0))[:, None]
        allowed = allowed & (j[:, None] <= i[..., None])[:, None] if self.config.is_decoder else allowed
        terms = self.terms(hidden, q, k, (i.clamp(min=0), j.clamp(min=0)))
        scores = [term.rule(*term.tensors, j.shape[1]) for term in terms]
        weights = masked_softmax(sum(scores[1:], scores[0]), allowed).to(v.dtype)
        return F.dropout(weights, self.dropout) @ v, weights

    def attend_by_products(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo) -> Tensor:
        """Output by full attention over the features whose products are the scores."""
        pattern = AttentionPattern(window=None, causal=self.config.is_decoder)
        q, k, v = as_one_product(self.terms(hidden, q, k), v)
        return pattern_attention(q, k, v, pattern, sequence, self.dropout)[..., : self.head_dim]
