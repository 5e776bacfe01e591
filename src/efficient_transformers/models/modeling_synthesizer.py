r"""Synthesizer: attention weights without comparing tokens (Tay et al. 2021, arXiv:2005.00743).

.. math:: Y = \mathrm{softmax}(B)\, X W_v, \qquad B_i = W_2\,\mathrm{relu}(W_1 x_i) \;\text{(dense)}, \quad
          B = R \;\text{(random)}, \quad B = R_1 R_2^\top \;\text{(factorized random)}, \quad
          B_{ij} = a_i[j \div c]\, b_i[j \bmod c] \;\text{(factorized dense)}

Sections 3.1 and 3.2; a mixture adds several such scores, and those of queries and keys ("vanilla"), in learnt shares
that sum to one (section 3.2, "Mixture of Synthesizers"). R, W₂, R₁ and R₂ know positions up to the longest input, a
shorter one takes the first of them. O(n²·d) in memory that does not grow so: scores are made tile by tile.

The paper adds a bias to W₂ and W₁; W₂ has none here, for a score of the position alone is what `random` adds.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .attn_dense import masked_softmax
from .attn_pattern import pattern_attention
from .attn_synthesizer import Term, matrix, outer, product, synthetic_attention
from .base_attention import MultiHeadAttention
from .base_backbone import Backbone
from .base_cache import PatternCacheLayer
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
from .ops_checks import check_at_least
from .ops_patterns import AttentionPattern
from .ops_tracing import first_positions

PRODUCTS = ("vanilla", "dense", "factorized_random")  # whose scores are products of features
KINDS = (*PRODUCTS, "random", "fixed", "factorized_dense")


@strict
class EtSynthesizerConfig(EtConfig):
    """
    Args:
        synthesizer_type: `random` has a trained n×n matrix for each head, `fixed` one that stays as it was drawn,
            `factorized_random` one of low rank, `dense` makes a row of it from the token, `factorized_dense` two short
            ones, `vanilla` compares queries and keys; or some of them, mixed: `random+vanilla`.
        factor_rank: k, columns of R₁ and R₂ (the paper's 8).
        dense_period: c of `factorized_dense`: a token scores so many remainders of positions, and ⌈n/c⌉ stretches.
        synthesizer_seed: of the `fixed` matrix.
    """

    model_type = "et_synthesizer"

    synthesizer_type: str = "factorized_random"
    factor_rank: int = 8
    dense_period: int = 64
    synthesizer_seed: int = 0

    def validate_synthesizer(self):
        kinds = self.kinds
        if len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
            raise ValueError(
                f"synthesizer_type ({self.synthesizer_type!r}) must be one of {', '.join(KINDS)}, or different ones of "
                "them joined by '+'."
            )
        check_at_least("factor_rank", self.factor_rank, 1, "it is the rank of the random scores")
        check_at_least("dense_period", self.dense_period, 1, "1 scores each position")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.synthesizer_type.split("+"))


class EtSynthesizerAttention(MultiHeadAttention):
    """Softmax of synthetic scores. What a kind of scores does not need does not exist."""

    cache_class = PatternCacheLayer
    position_axes: ClassVar = {
        "random_scores": (1, 2),
        "fixed_scores": (1, 2),
        "row_factors": (1,),
        "column_factors": (1,),
        "dense_weight": (1,),
        "stretch_weight": (1,),
    }
    fixed_scores: Tensor
    random_scores: nn.Parameter

    def __init__(self, config: EtSynthesizerConfig, layer: int):
        super().__init__(config, layer)
        self.kinds, heads, dim = config.kinds, self.num_heads, self.head_dim
        size, longest = config.hidden_size, config.max_position_embeddings
        if "vanilla" not in self.kinds:
            del self.q_proj, self.k_proj
        if "random" in self.kinds:
            self.random_scores = nn.Parameter(torch.empty(heads, longest, longest))
        if "fixed" in self.kinds:
            self.register_drawn("fixed_scores", self.draw())
        if "factorized_random" in self.kinds:
            self.row_factors, self.column_factors = (
                nn.Parameter(torch.empty(heads, longest, config.factor_rank)) for _ in range(2)
            )
        if "dense" in self.kinds:
            self.dense_proj = nn.Linear(size, size)
            self.dense_weight = nn.Parameter(torch.empty(heads, longest, dim))
        if "factorized_dense" in self.kinds:
            period = config.dense_period
            self.stretch_proj, self.period_proj = nn.Linear(size, size), nn.Linear(size, size)
            self.stretch_weight = nn.Parameter(torch.empty(heads, -(-longest // period), dim))
            self.period_weight = nn.Parameter(torch.empty(heads, period, dim))
        if len(self.kinds) > 1:
            self.mixture = nn.Parameter(torch.empty(len(self.kinds)))

    def draw(self) -> Tensor:
        """The fixed scores, (h, n, n), on the CPU."""
        length, seed = self.config.max_position_embeddings, self.config.synthesizer_seed + 0x10001 * self.layer
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(self.num_heads, length, length, generator=generator, device="cpu")

    def reset_parameters(self) -> None:
        # the paper does not say how scores begin: here their spread is about 1, but for those of a layer's features
        for name, parameter in self.named_parameters(recurse=False):
            match name:
                case "mixture":
                    init.zeros_(parameter)
                case "random_scores":
                    init.normal_(parameter)
                case "row_factors" | "column_factors":
                    init.normal_(parameter, std=parameter.shape[2] ** -0.25)
                case _:
                    init.normal_(parameter, std=self.head_dim**-0.5)
        if "fixed" in self.kinds:
            init.copy_(self.fixed_scores, self.draw())

    def new_cache_layer(self) -> PatternCacheLayer:
        return PatternCacheLayer(0, None)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if they are written out."""
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        v, positions = self.split_heads(self.v_proj(hidden)), sequence.positions
        q = k = v[..., :0]
        if "vanilla" in self.kinds:
            q, k = (self.split_heads(proj(hidden), sequence.rotary) for proj in (self.q_proj, self.k_proj))
        if sequence.cache is not None:
            seen = sequence.cache.get_seq_length(self.layer)
            memory: PatternCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            keys, values, key_positions = memory.update(k, v, positions)
            if seen:
                return self.attend_densely(hidden, q, keys, values, positions, key_positions, dropout)[0], None
        engine = self.engine(hidden, sequence)
        if engine == "dense":
            return self.attend_densely(hidden, q, k, v, positions, positions, dropout)
        if set(self.kinds) <= set(PRODUCTS):
            return self.attend_by_products(hidden, q, k, v, sequence, dropout), None
        if engine == "tiled":
            terms = self.terms(hidden, q, k)
            return synthetic_attention(terms, v, self.config.is_decoder, sequence.lengths, dropout), None
        return self.attend_densely(hidden, q, k, v, positions, positions, dropout)[0], None

    def attend_densely(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Output and weights, written out, of queries at positions `i` (b, n) over keys and values at `j` (b, m)."""
        allowed = ((j[:, None] >= 0) & (i[..., None] >= 0))[:, None]
        allowed = allowed & (j[:, None] <= i[..., None])[:, None] if self.config.is_decoder else allowed
        terms = self.terms(hidden, q, k, (i.clamp(min=0), j.clamp(min=0)))
        scores = [term.rule(*term.tensors, j.shape[1]) for term in terms]
        weights = masked_softmax(sum(scores[1:], scores[0]), allowed).to(v.dtype)
        return F.dropout(weights, dropout) @ v, weights

    def attend_by_products(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, sequence: SequenceInfo, dropout: float
    ) -> Tensor:
        """Scores that are all products of features, as ordinary full attention over these features."""
        pattern = AttentionPattern(window=None, causal=self.config.is_decoder)
        q, k, v = as_one_product(self.terms(hidden, q, k), v)
        return pattern_attention(q, k, v, pattern, sequence, dropout)[..., : self.head_dim]

    def terms(self, hidden: Tensor, q: Tensor, k: Tensor, at: tuple[Tensor, Tensor] | None = None) -> list[Term]:
        """The scores of `hidden` (b, n, e) as terms; of queries and keys `at` positions (b, n) and (b, m), or all n."""
        i, j = (None, None) if at is None else at
        length, terms = hidden.shape[1], []
        shares = self.mixture.softmax(0).to(hidden.dtype) if len(self.kinds) > 1 else [None]
        for kind, share in zip(self.kinds, shares, strict=True):
            part = 1.0 if share is None else share
            match kind:
                case "vanilla":
                    term = product(q * (part * self.head_dim**-0.5), k)
                case "dense":
                    features = self.split_heads(self.dense_proj(hidden)).relu()
                    term = product(features * part, of_positions(self.dense_weight, length, j))
                case "factorized_random":
                    rows = of_positions(self.row_factors, length, i)
                    term = product(rows * part, of_positions(self.column_factors, length, j))
                case "factorized_dense":
                    stretch, period = self.short_scores(hidden)
                    if j is None:
                        term = outer(stretch * part, period)
                    else:
                        number, left = (
                            x[:, None, None].expand(*stretch.shape[:3], -1)
                            for x in (j // period.shape[-1], j % period.shape[-1])
                        )
                        term = matrix(stretch.gather(3, number) * period.gather(3, left) * part)
                case _:
                    scores = self.random_scores if kind == "random" else self.fixed_scores
                    if i is None or j is None:
                        scores = first_positions(scores, length, 1, 2)[None]
                    else:
                        scores = scores[:, i[..., None], j[:, None]].transpose(0, 1)
                    term = matrix(scores, None if share is None else share.view(1, 1, 1, 1))
            terms.append(term)
        return terms

    def short_scores(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """a (b, h, n, ⌈N/c⌉) and b (b, h, n, c) of `factorized_dense`.

        The paper repeats both alike to the length; here one goes by stretches of c positions and one inside of them,
        so that no two positions share a pair.
        """
        projections = (self.stretch_proj, self.stretch_weight), (self.period_proj, self.period_weight)
        stretch, period = (self.split_heads(p(hidden)).relu() @ weight.transpose(1, 2) for p, weight in projections)
        return stretch, period


def of_positions(table: Tensor, length: int, positions: Tensor | None) -> Tensor:
    """Rows of `table` (h, N, f): the first `length`, (1, h, n, f), or those at `positions` (b, m), (b, h, m, f)."""
    if positions is None:
        return first_positions(table, length, 1)[None]
    return table[:, positions].transpose(0, 1)


def as_one_product(terms: list[Term], v: Tensor) -> list[Tensor]:
    """Terms that are products as queries, keys and values of one width, (b, h, n, ≥ d) each, behind it zeros."""
    pairs = zip(*(term.tensors for term in terms), strict=True)
    q, k = (torch.cat([x.expand(v.shape[0], -1, -1, -1) for x in some], -1) for some in pairs)
    width = max(q.shape[-1], v.shape[-1])
    return [F.pad(x.to(v.dtype), (0, width - x.shape[-1])) for x in (q * width**0.5, k, v)]  # engines divide by √width


class EtSynthesizerPreTrainedModel(EtPreTrainedModel):
    config: EtSynthesizerConfig
    mixer_class = EtSynthesizerAttention
    _supports_flex_attn = False


class EtSynthesizerModel(Backbone, EtSynthesizerPreTrainedModel):
    """Bare encoder (or decoder, by `config.is_decoder`)."""


EtSynthesizerPreTrainedModel.model_class = EtSynthesizerModel


class EtSynthesizerForMaskedLM(ForMaskedLM, EtSynthesizerPreTrainedModel): ...


class EtSynthesizerForCausalLM(ForCausalLM, EtSynthesizerPreTrainedModel, GenerationMixin): ...


class EtSynthesizerForSequenceClassification(ForSequenceClassification, EtSynthesizerPreTrainedModel): ...


class EtSynthesizerForTokenClassification(ForTokenClassification, EtSynthesizerPreTrainedModel): ...


class EtSynthesizerForQuestionAnswering(ForQuestionAnswering, EtSynthesizerPreTrainedModel): ...


class EtSynthesizerForMultipleChoice(ForMultipleChoice, EtSynthesizerPreTrainedModel): ...


class EtSynthesizerForImageClassification(ForImageClassification, EtSynthesizerPreTrainedModel): ...
