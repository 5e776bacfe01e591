"""Pattern attention whose global tokens have queries, keys and values of their own."""

from torch import Tensor, nn
from torch.nn import functional as F

from .attn_dense import folded_attention, softmax_attention
from .base_attention import PatternAttention
from .base_mixer import SequenceInfo, no_rows
from .ops_global_tokens import global_positions, put_rows


class GlobalRowsAttention(PatternAttention):
    """Pattern attention in which three more projections compute the rows of the global tokens.

    All other rows attend to the global tokens through the ordinary projections. `global_rows` is False where the extra
    projections exist. The config says when the rows are cheaper without keys and values: `folds_global_rows(count)`.
    """

    def add_global_projections(self) -> None:
        """Create the extra projections; they take over the rows of the global tokens."""
        self.global_rows = False
        size = self.config.hidden_size
        self.global_q_proj, self.global_k_proj, self.global_v_proj = (nn.Linear(size, size) for _ in range(3))

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        mixed, weights = super().attend(hidden, sequence)
        if self.global_rows:
            return mixed, weights
        tokens, present = global_positions(self.groups[0][0], sequence.positions >= 0, sequence.global_mask)
        if tokens is None:
            return mixed + no_rows(hidden, self.global_q_proj, self.global_k_proj, self.global_v_proj), weights
        q = self.global_queries(hidden, tokens, sequence)
        if weights is None and self.folds(tokens.shape[1]):
            return put_rows(mixed, self.folded_rows(q, hidden, sequence), tokens, present), None
        k = self.split_heads(self.global_k_proj(hidden), sequence.rotary)
        v = self.split_heads(self.global_v_proj(hidden))
        dropout = self.dropout if self.training else 0.0
        rows, row_weights = softmax_attention(q, k, v, (sequence.positions >= 0)[:, None, None], dropout)
        if weights is not None and sequence.output_attentions:
            # multiply again by the returned weights, so that gradients with respect to them exist
            weights = put_rows(weights, row_weights, tokens, present)
            used = F.dropout(weights, dropout)
            mixed = used @ self.split_heads(self.v_proj(hidden))
            rows = used.gather(2, tokens[:, None, :, None].expand(-1, self.num_heads, -1, used.shape[3])) @ v
        return put_rows(mixed, rows, tokens, present), weights

    def global_queries(self, hidden: Tensor, tokens: Tensor, sequence: SequenceInfo) -> Tensor:
        """Queries of the tokens at positions `tokens` (b, g), (b, h, g, d)."""
        index, rotary = tokens[..., None], sequence.rotary
        if rotary is not None:
            cos, sin = (angle.gather(1, index[..., None].expand(-1, -1, *angle.shape[2:])) for angle in rotary)
            rotary = cos, sin
        return self.split_heads(self.global_q_proj(hidden.gather(1, index.expand(-1, -1, hidden.shape[2]))), rotary)

    def folds(self, count: int) -> bool:
        """Are the rows of `count` global tokens computed without keys and values of the whole sequence?"""
        return is_plain(self.global_k_proj) and is_plain(self.global_v_proj) and self.config.folds_global_rows(count)

    def folded_rows(self, q: Tensor, hidden: Tensor, sequence: SequenceInfo) -> Tensor:
        """Output of the global tokens, (b, h, g, d), from the weights of the projections instead of their outputs."""
        k_proj, v_proj = self.global_k_proj, self.global_v_proj
        projections = k_proj.weight, k_proj.bias, v_proj.weight, v_proj.bias
        return folded_attention(q, hidden, *projections, sequence.padding_mask, self.dropout if self.training else 0.0)


def is_plain(layer: nn.Module) -> bool:
    """Is the output of `layer` its weight times the input plus its bias, with both of them in memory?

    Adapters and quantizers replace the layer or its weight; offloading replaces its `forward`, which loads the weight.
    """
    wrapped = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not wrapped and type(layer.weight) in (Tensor, nn.Parameter)
