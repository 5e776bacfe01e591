r"""Synthesizer: attention weights without comparing tokens (Tay et al. 2021, arXiv:2005.00743).

.. math:: Y = \mathrm{softmax}(B)\, X W_v, \qquad B_i = W_2\,\mathrm{relu}(W_1 x_i) \;\text{(dense)}, \quad
          B = R \;\text{(random)}, \quad B = R_1 R_2^\top \;\text{(factorized random)}, \quad
          B_{ij} = a_i[j \div c]\, b_i[j \bmod c] \;\text{(factorized dense)}

Sections 3.1 and 3.2. A mixture is a sum of several such scores and those of queries and keys ("vanilla"), with learnt
shares that sum to one (section 3.2, "Mixture of Synthesizers"). R, W₂, R₁ and R₂ have a row for each position up to the
longest input; shorter inputs use the first rows. O(n²·d) time; scores are computed tile by tile, so memory does not
grow with n².

*Paper*: W₁ and W₂ both have a bias. Here W₂ has none, because a score that depends on the position alone is what
`random` adds. *Paper*: the factors of the factorized dense scores are both repeated to the full length. Here a is
indexed by j ÷ c and b by j mod c, so that no two positions share a pair of factors.
"""

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin

from .base_backbone import Backbone
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
from .base_pretrained import EtPreTrainedModel
from .base_synthetic_attention import SyntheticScoresAttention
from .ops_checks import check_at_least
from .ops_score_terms import Places, Term, matrix, outer, product, table_entries, table_rows

PRODUCTS = ("vanilla", "dense", "factorized_random")  # kinds whose scores are products of features
KINDS = (*PRODUCTS, "random", "fixed", "factorized_dense")


@strict
class EtSynthesizerConfig(EtConfig):
    """
    Args:
        synthesizer_type: `random` is a trained n×n matrix for each head, `fixed` an untrained one,
            `factorized_random` a trained one of low rank; `dense` computes a row of scores from each token,
            `factorized_dense` two short factors of it; `vanilla` compares queries and keys. Several kinds joined by
            `+` are mixed: `random+vanilla`.
        factor_rank: k, columns of R₁ and R₂ (8 in the paper).
        dense_period: c of `factorized_dense`: b has c entries and a has ⌈n/c⌉.
        synthesizer_seed: seed of the `fixed` matrix.
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
                f"synthesizer_type ({self.synthesizer_type!r}) must be one of {', '.join(KINDS)}, or several "
                "different ones joined by '+'."
            )
        check_at_least("factor_rank", self.factor_rank, 1, "it is the rank of the random scores")
        check_at_least("dense_period", self.dense_period, 1, "1 scores each position")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.synthesizer_type.split("+"))


class EtSynthesizerAttention(SyntheticScoresAttention):
    """Softmax of synthetic scores. Only the parameters of the chosen kinds exist."""

    position_axes: ClassVar = {
        **dict.fromkeys(("random_scores", "fixed_scores"), (1, 2)),
        **dict.fromkeys(("row_factors", "column_factors", "dense_weight", "stretch_weight"), (1,)),
    }
    fixed_scores: Tensor
    random_scores: nn.Parameter

    def __init__(self, config: EtSynthesizerConfig, layer: int):
        super().__init__(config, layer)
        self.kinds, heads, dim = config.kinds, self.num_heads, self.head_dim
        self.compares_tokens, self.all_products = "vanilla" in self.kinds, set(self.kinds) <= set(PRODUCTS)
        size, longest = config.hidden_size, config.max_position_embeddings
        if not self.compares_tokens:
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
        length = self.config.max_position_embeddings
        generator = torch.Generator("cpu").manual_seed(self.config.synthesizer_seed + 0x10001 * self.layer)
        return torch.randn(self.num_heads, length, length, generator=generator, device="cpu")

    def reset_parameters(self) -> None:
        # the paper does not state an initialisation: here scores of parameters alone have a standard deviation near 1
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

    def terms(self, hidden: Tensor, q: Tensor, k: Tensor, places: Places | None = None) -> list[Term]:
        shares = self.mixture.softmax(0).to(hidden.dtype) if len(self.kinds) > 1 else [None]
        pairs = zip(self.kinds, shares, strict=True)
        return [self.term(kind, share, hidden, q, k, places) for kind, share in pairs]

    def term(
        self, kind: str, share: Tensor | None, hidden: Tensor, q: Tensor, k: Tensor, places: Places | None
    ) -> Term:
        """The scores of one kind, times its share of a mixture."""
        part, length = 1.0 if share is None else share, hidden.shape[1]
        i, j = (None, None) if places is None else places
        match kind:
            case "vanilla":  # q_i · k_j / √d
                return product(q * (part * self.head_dim**-0.5), k)
            case "dense":  # relu(W₁ x_i) · W₂[j]
                return product(self.features(self.dense_proj, hidden) * part, table_rows(self.dense_weight, length, j))
            case "factorized_random":  # R₁[i] · R₂[j]
                rows, columns = table_rows(self.row_factors, length, i), table_rows(self.column_factors, length, j)
                return product(rows * part, columns)
            case "factorized_dense":  # a_i[j ÷ c] · b_i[j mod c]
                a = self.features(self.stretch_proj, hidden) @ self.stretch_weight.transpose(1, 2)
                b = self.features(self.period_proj, hidden) @ self.period_weight.transpose(1, 2)
                return outer(a * part, b, j)
            case _:  # R[i, j]
                table = self.random_scores if kind == "random" else self.fixed_scores
                return matrix(table_entries(table, length, places), None if share is None else share.view(1, 1, 1, 1))

    def features(self, proj: nn.Module, hidden: Tensor) -> Tensor:
        """relu(W₁ x + b₁) of each head, (b, h, n, d)."""
        return self.split_heads(proj(hidden)).relu()


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
