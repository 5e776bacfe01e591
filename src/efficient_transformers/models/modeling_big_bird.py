r"""BigBird: a window, global tokens and random keys, all in blocks of b tokens (Zaheer et al. 2020, arXiv:2007.14062).

.. math:: S(i) = \{j : |\lfloor i/b \rfloor - \lfloor j/b \rfloor| \le 1\} \cup G \cup R_h(\lfloor i/b \rfloor),
          \qquad S(i) = \{0, \dots, n-1\} \text{ for } i \in G

Section 2 and appendix D. Internal global tokens (ITC) are the first and the last block of a sequence, external ones
(ETC) learned embeddings before it; each head draws random blocks R of its own. `head_layout="per_head"` gives
random, local, strided and global heads a head each instead of uniting them. O(n·b·d).

Any length is supported: the last block may be short, and sequences with few blocks have fewer random blocks.
"""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import initialization as init

from .base_attention import PatternAttention
from .base_backbone import Backbone
from .base_configuration import ENCODER_HEADS, EtConfig, PatternConfig
from .base_heads import (
    ForImageClassification,
    ForMaskedLM,
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .base_pretrained import EtPreTrainedModel
from .ops_checks import check_at_least
from .ops_patterns import AttentionPattern


@strict
class EtBigBirdConfig(PatternConfig, EtConfig):
    """
    Args:
        block_size: b, tokens in a block.
        num_window_blocks: blocks of the window, the own one in the middle, odd.
        num_random_blocks: random blocks that each block of queries attends to, per head.
        random_blocks: `drawn` draws them for the length of each sequence, from `pattern_seed` alone, so that a reloaded
            model draws the same ones; `stored` keeps a table in the checkpoint, drawn for `max_position_embeddings`
            or imported, in which entries after the end of a shorter sequence have no effect.
        pattern_seed: of the draw, which differs from layer to layer and head to head.
        global_token_type: `internal`, the first and the last block; or `external`, learned embeddings at the start.
        num_global_tokens: how many external ones.
        head_layout: `union` attends to everything in one softmax, as in the paper; `per_head` has random, local,
            strided and global heads in turn.
        stride, hops: of the strided heads.
    """

    model_type = "et_big_bird"
    # attending to the last block leaks the future
    heads: ClassVar[tuple[str, ...]] = ENCODER_HEADS

    block_size: int = 64
    num_window_blocks: int = 3
    num_random_blocks: int = 3
    random_blocks: Literal["drawn", "stored"] = "drawn"
    pattern_seed: int = 0
    global_token_type: Literal["internal", "external"] = "internal"
    num_global_tokens: int = 64
    head_layout: Literal["union", "per_head"] = "union"
    stride: int = 64
    hops: int | None = 2

    def validate_big_bird(self):
        check_at_least("block_size", self.block_size, 1, "a block holds tokens")
        check_at_least("num_random_blocks", self.num_random_blocks, 0, "0 draws none")
        check_at_least("num_window_blocks", self.num_window_blocks, 1, "1 is a window of the own block alone")
        self.check_stride()
        if self.num_window_blocks % 2 == 0:
            raise ValueError(
                f"num_window_blocks ({self.num_window_blocks}) must be odd: as many blocks stand on either side."
            )
        if self.global_token_type == "external":
            check_at_least("num_global_tokens", self.num_global_tokens, 1, "external tokens are all there are")
        if self.head_layout == "per_head":
            check_at_least("num_attention_heads", self.num_attention_heads, 4, "per_head has four kinds of heads")
        if self.is_decoder:
            raise ValueError("BigBird cannot be causal: its last block reads and is read by everything; use et_mixed.")

    @property
    def num_external_tokens(self) -> int:
        return self.num_global_tokens if self.global_token_type == "external" else 0

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        window, size = self.num_window_blocks // 2, self.block_size
        tokens, ends = tuple(range(self.num_external_tokens)), self.global_token_type == "internal"
        random, seed = self.num_random_blocks, self.layer_seed(layer)
        if self.head_layout == "union":
            return [AttentionPattern(window, 1, True, tokens, ends, random, size, seed)]
        return [
            AttentionPattern(num_random_blocks=random, block_size=size, seed=seed),
            AttentionPattern(window, in_blocks=True, block_size=size),
            AttentionPattern(self.hops, self.stride),
            AttentionPattern(global_tokens=tokens, global_ends=ends, block_size=size),
        ]


class BigBirdAttention(PatternAttention):
    """Attention in blocks, which may store the random ones."""

    position_axes: ClassVar = {"random_blocks": (1,)}

    def __init__(self, config: EtBigBirdConfig, layer: int):
        super().__init__(config, layer)
        if config.random_blocks == "stored":
            self.register_drawn("random_blocks", self.draw())

    def reset_parameters(self) -> None:
        if self.random_blocks is not None:
            init.copy_(self.random_blocks, self.draw())

    def draw(self) -> Tensor:
        """(h, blocks, r) for the longest sequence; heads without random blocks hold an unused draw."""
        config, pattern = self.config, self.groups[0][0]
        longest = config.row_length(config.max_position_embeddings)
        return pattern.random_blocks(self.num_heads, -(-longest // config.block_size)).clone()


class EtBigBirdPreTrainedModel(EtPreTrainedModel):
    config: EtBigBirdConfig
    mixer_class = BigBirdAttention


class EtBigBirdModel(Backbone, EtBigBirdPreTrainedModel):
    """Bare encoder."""


EtBigBirdPreTrainedModel.model_class = EtBigBirdModel


class EtBigBirdForMaskedLM(ForMaskedLM, EtBigBirdPreTrainedModel): ...


class EtBigBirdForSequenceClassification(ForSequenceClassification, EtBigBirdPreTrainedModel): ...


class EtBigBirdForTokenClassification(ForTokenClassification, EtBigBirdPreTrainedModel): ...


class EtBigBirdForQuestionAnswering(ForQuestionAnswering, EtBigBirdPreTrainedModel): ...


class EtBigBirdForMultipleChoice(ForMultipleChoice, EtBigBirdPreTrainedModel): ...


class EtBigBirdForImageClassification(ForImageClassification, EtBigBirdPreTrainedModel): ...
