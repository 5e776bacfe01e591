r"""Linformer: keys and values projected along the length, N of them to k (Wang et al. 2020, arXiv:2006.04768).

.. math:: o_i = \mathrm{softmax}\big(q_i (E K)^\top/\sqrt d\big)\, F V, \qquad E, F \in \mathbb R^{k \times N}

Eq. 7. Queries are not projected: there are n outputs. Shorter sequences use the first n columns of E and F, and padding
counts as zero. O(n·k·d). It cannot be causal, because every projected key is a sum over all positions.
"""

from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .attn_dense import softmax_attention
from .base_attention import MultiHeadAttention
from .base_backbone import Backbone
from .base_configuration import ENCODER_HEADS, EtConfig
from .base_heads import (
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_mixer import OwnValues, SequenceInfo
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least
from .ops_tracing import first_positions


@strict
class EtLinformerConfig(EtConfig):
    """
    Args:
        projected_length: k, keys and values that are left.
        projection_sharing: `none` has an E and an F for each head, `headwise` one pair for all heads of a layer,
            `key_value` one matrix for both, `layerwise` the same one in all layers (section 4).
    """

    model_type = "et_linformer"
    heads: ClassVar[tuple[str, ...]] = ENCODER_HEADS

    projected_length: int = 256
    projection_sharing: Literal["none", "headwise", "key_value", "layerwise"] = "key_value"

    def validate_projection(self):
        check_at_least("projected_length", self.projected_length, 1, "it counts the keys that are left to read")
        if self.is_decoder:
            raise ValueError("Linformer cannot be causal: each projected key holds all positions; use et_compressed.")


class LengthProjection(OwnValues):
    """E, one matrix for all heads or one for each of h."""

    position_axes: ClassVar = {"weight": (2,)}
    summed_axes: ClassVar = {"weight": (2,)}

    def __init__(self, config: EtLinformerConfig, num_heads: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, config.projected_length, config.max_position_embeddings))

    def reset_parameters(self) -> None:
        # the paper's proof draws with variance 1/k, which lets keys grow with the length; so they stay as they were
        init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)

    def forward(self, length: int) -> Tensor:
        """The columns of the first `length` positions, (1 or h, k, n)."""
        columns = first_positions(self.weight, length, 2)
        # without gradients a view of a parameter still claims to need one, on which torch's FLOP counter fails
        return columns if torch.is_grad_enabled() else columns.detach()


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """Sums over positions by a `LengthProjection`, (b, 1 or h, n, e) -> (b, 1 or h, k, e)."""
    return torch.einsum("hkn,bhne->bhke", projection(x.shape[2]).to(x.device), x)


class EtLinformerAttention(MultiHeadAttention):
    """Softmax attention of all queries to projected keys and values."""

    def __init__(self, config: EtLinformerConfig, layer: int):
        super().__init__(config, layer)
        config.validate_projection()  # is_decoder may have been set since the config was made
        own = {"none": [self.num_heads] * 2, "headwise": [1, 1], "key_value": [1], "layerwise": []}
        self.projections = nn.ModuleList(LengthProjection(config, h) for h in own[config.projection_sharing])

    @classmethod
    def new_shared(cls, config: EtLinformerConfig) -> LengthProjection | None:
        return LengthProjection(config) if config.projection_sharing == "layerwise" else None

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d).

        The weights, if requested, are softmax(…)·F: the n×n matrix that multiplies the values, zero at padding.
        Its rows need not sum to one.
        """
        projections: list[Any] = [*self.projections] or [sequence.shared]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        q = self.split_heads(self.q_proj(hidden), sequence.rotary)
        if self.engine(hidden, sequence) == "dense":
            return self.attend_eagerly(q, hidden, sequence, projections, dropout)
        if sequence.rotary is not None or self.config.projection_sharing == "none":
            k, v = self.keys_and_values(hidden, sequence)
            k, v = project(projections[0], k), project(projections[-1], v)
        else:
            k, v = self.projected(hidden, sequence.padding_mask, projections)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), None

    def keys_and_values(self, hidden: Tensor, sequence: SequenceInfo) -> list[Tensor]:
        """Of all tokens, zero at padding, (b, h, n, d) each."""
        k, v = self.split_heads(self.k_proj(hidden), sequence.rotary), self.split_heads(self.v_proj(hidden))
        return (
            [k, v] if sequence.padding_mask is None else [x * sequence.padding_mask[:, None, :, None] for x in (k, v)]
        )

    def projected(self, hidden: Tensor, padding_mask: Tensor | None, projections: list) -> list[Tensor]:
        r"""Projected keys and values, (b, h, k, d) each, of k rows instead of n where all heads share E.

        .. math:: E (X W + \mathbf 1 b^\top) = (E X) W + (E \mathbf 1) b^\top

        b is the layer's output for a row of zeros, so the layer may be any affine map: an adapter or a quantised layer.
        """
        real = hidden.new_ones(hidden.shape[:2]) if padding_mask is None else padding_mask.to(hidden.dtype)
        with_count = [real[..., None] * hidden, real[..., None]]
        short = [[project(projection, x[:, None])[:, 0] for x in with_count] for projection in projections]
        result = []
        for linear, (x, count) in zip((self.k_proj, self.v_proj), (short[0], short[-1]), strict=True):
            rows = linear(F.pad(x, (0, 0, 0, 1)))
            result.append(self.split_heads(rows[:, :-1] + (count - 1).to(rows.dtype) * rows[:, -1:]))
        return result

    def attend_eagerly(
        self, q: Tensor, hidden: Tensor, sequence: SequenceInfo, projections: list, dropout: float
    ) -> tuple[Tensor, Tensor]:
        k, v = self.keys_and_values(hidden, sequence)
        everything = torch.ones(1, dtype=torch.bool, device=q.device)
        _, reads = softmax_attention(q, project(projections[0], k), project(projections[-1], v), everything)
        matrix = projections[-1](v.shape[2]).to(v)
        weights = reads @ matrix
        if sequence.padding_mask is not None:
            weights = weights * (sequence.padding_mask[:, None, :, None] & sequence.padding_mask[:, None, None])
        return (F.dropout(reads, dropout) @ matrix if dropout else weights) @ v, weights


class EtLinformerPreTrainedModel(EtPreTrainedModel):
    config: EtLinformerConfig
    mixer_class = EtLinformerAttention
    _supports_flex_attn = False


class EtLinformerModel(Backbone, EtLinformerPreTrainedModel):
    """Bare encoder."""


EtLinformerPreTrainedModel.model_class = EtLinformerModel


class EtLinformerForMaskedLM(ForMaskedLM, EtLinformerPreTrainedModel): ...


class EtLinformerForSequenceClassification(ForSequenceClassification, EtLinformerPreTrainedModel): ...


class EtLinformerForTokenClassification(ForTokenClassification, EtLinformerPreTrainedModel): ...


class EtLinformerForQuestionAnswering(ForQuestionAnswering, EtLinformerPreTrainedModel): ...


class EtLinformerForMultipleChoice(ForMultipleChoice, EtLinformerPreTrainedModel): ...


class EtLinformerForImageClassification(ForImageClassification, EtLinformerPreTrainedModel): ...
