"""The fields every variant has, their checks, and what makes a checkpoint open on its own."""

import json
import math
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .base_anchors import AnchorLayout
from .base_images import count_patches
from .ops_checks import check_at_least, check_divisible, check_entries
from .ops_patterns import AttentionPattern

TEXT_HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
ENCODER_HEADS = (*TEXT_HEADS, "ImageClassification")


@strict
class EtConfig(PreTrainedConfig):
    """Sizes and choices of the shared backbone. A variant subclasses it, adds its own fields and repeats `@strict`.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in BERT.
        embedding_size: width of all embeddings and of `inputs_embeds`, if it is not `hidden_size`: a dense layer
            projects them to `hidden_size`, and the head of a language model projects back (ALBERT, Lan et al. 2020,
            arXiv:1909.11942, section 3.1). None means no projection.
        hidden_act: activation of the MLP, by its name in transformers.
        max_position_embeddings: maximum input length in tokens; longer inputs raise a ValueError.
        position_embedding_type: `learned` and `sinusoidal` are added to the word embeddings, `rotary` rotates queries
            and keys (if the mixer has them), `none` leaves the order to the mixer.
        rope_theta: base of the rotary angles.
        type_vocab_size: number of token types; 0 has none.
        norm_first: True normalizes before mixer and MLP and once at the end; False after them and after the
            embeddings, as BERT does.
        reversible: two residual streams, from whose ends the activations of all layers are computed again in training:
            its memory does not grow with the depth, for the time of one more forward pass. Another model, not only
            another way to train one. Needs `norm_first`.
        hidden_dropout_prob, attention_probs_dropout_prob: as in BERT.
        classifier_dropout: dropout before a classifier; None takes hidden_dropout_prob.
        classifier_pooling: what a sequence is judged by: the mean of its tokens, its first (`cls`) or its last one.
        standardize_pooled: normalize each pooled feature to mean 0 and variance 1 over the last examples of training,
            before the pooler's dense layer. The means of long texts are nearly alike, and without it a
            classifier is busy for its first epochs with what they have in common. The statistics are buffers.
        pooler_act: activation after the pooler's dense layer, a name from transformers' `ACT2FN`.
        sparse_prediction: in training, `…ForMaskedLM` returns logits only for tokens that have a label, (labels,
            vocab_size): the same loss and gradients for the share of the vocabulary's products that they are.
        image_size: pixels of a side, or [height, width], makes a model of images, whose tokens are patches in the place
            of words: `max_position_embeddings` is their number, and there are no token types. None takes text.
        patch_size, num_channels: of an image; patches are squares, and 1 makes a token of every pixel.
        is_decoder: causal attention, everywhere in the model. `…ForCausalLM` sets it.
        use_cache: whether a causal model returns its cache.
        pad_token_id: id of the tokenizer's padding token, which `generate` masks if there is no `attention_mask`. None
            means that no id is padding.
    """

    heads: ClassVar[tuple[str, ...]] = (*ENCODER_HEADS, "CausalLM")
    attends: ClassVar[bool] = True  # are there queries and keys?
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]  # one field, see signatures

    vocab_size: int = 30522
    hidden_size: int = 256
    embedding_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    max_position_embeddings: int = 4096
    position_embedding_type: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    rope_theta: float | int = 10000.0
    type_vocab_size: int = 2
    norm_first: bool = True
    reversible: bool = False
    layer_norm_eps: float | int = 1e-12
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    classifier_dropout: float | int | None = None
    classifier_pooling: Literal["mean", "cls", "last"] = "mean"
    standardize_pooled: bool = False
    pooler_act: str = "tanh"
    sparse_prediction: bool = False
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    image_size: int | list[int] | None = None
    patch_size: int = 16
    num_channels: int = 3
    is_decoder: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # recomputed: a checkpoint saved from one head must open as every other
        for key in kwargs:  # transformers keeps unknown keys; refuse those that look like a slip of one of ours
            close = get_close_matches(key, type(self).__dataclass_fields__, n=1, cutoff=0.8)
            if close and not hasattr(PreTrainedConfig, key):
                raise TypeError(f"{type(self).__name__} has no field {key!r}; did you mean {close[0]!r}?")
        labels = self.id2label
        if labels is not None and not isinstance(labels, dict):
            raise ValueError(
                f"id2label ({labels!r}) must be a dict of label names by number, as {{0: 'no', 1: 'yes'}}."
            )
        module, stem = type(self).__module__.rpartition(".")[2], type(self).__name__.removesuffix("Config")
        self.auto_map = {"AutoConfig": f"{module}.{stem}Config", "AutoModel": f"{module}.{stem}Model"}
        self.auto_map |= {f"AutoModelFor{head}": f"{module}.{stem}For{head}" for head in self.heads}
        if self.image_size is not None:
            self.max_position_embeddings = count_patches(self.image_size, self.patch_size)
            self.type_vocab_size = 0
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_width(self) -> int:
        """Features of an embedding: `embedding_size`, or `hidden_size` if that is None."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_position_embeddings

    def row_length(self, length: int) -> int:
        """Places of a row of `length` tokens in the layers."""
        return length

    def check_image_size(self) -> int | list[int]:
        """`image_size` of a model of images, or a ValueError."""
        if self.image_size is None:
            raise ValueError(
                "image_size (None) must be set for a model of images, e.g. image_size=224, patch_size=16: an input of "
                "another size does not fit its positions."
            )
        return self.image_size

    def validate_architecture(self):
        """Sizes are checked here, so that nothing crashes in a forward."""
        # in place of transformers' own check, which runs first and reads head_dim: a division by num_attention_heads
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "num_channels",
        ):
            check_at_least(name, getattr(self, name), 1, "a model needs at least one")
        if self.attends:
            check_divisible(
                "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads, "change either"
            )
        elif self.position_embedding_type == "rotary" or self.attention_probs_dropout_prob:
            raise ValueError(
                f"position_embedding_type ({self.position_embedding_type!r}) must not be 'rotary' and "
                f"attention_probs_dropout_prob ({self.attention_probs_dropout_prob}) must be 0: there are no queries "
                "to turn and no attention weights to drop from; use 'learned' and hidden_dropout_prob."
            )
        if self.embedding_size is not None:
            check_at_least("embedding_size", self.embedding_size, 1, "None embeds in hidden_size")
        check_at_least("num_hidden_layers", self.num_hidden_layers, 0, "0 leaves the embeddings alone")
        check_at_least("type_vocab_size", self.type_vocab_size, 0, "0 has no token types")
        if self.position_embedding_type == "rotary":
            check_divisible("head_dim", self.head_dim, "2", 2, "rotary positions turn pairs of features")
        if self.position_embedding_type == "sinusoidal":
            name = "hidden_size" if self.embedding_size is None else "embedding_size"
            check_divisible(name, self.embedding_width, "2", 2, "sinusoidal positions fill pairs of features")
        if self.reversible and not self.norm_first:
            raise ValueError(
                f"reversible ({self.reversible}) needs norm_first, which is {self.norm_first}: a sum with a norm "
                "after it cannot be inverted. Set norm_first=True or reversible=False."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name} ({rate}) must lie in [0, 1): it is the share of values set to zero.")

    def validate_common(self):
        """The fields of transformers that every model has: what this package does not do is refused, not ignored."""
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type ({self.problem_type!r}) must be None or one of {', '.join(PROBLEM_TYPES)}.")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type 'single_label_classification' needs num_labels of at least 2, and it is 1: one class "
                "has a loss of 0. Set num_labels=2, or problem_type='regression' or 'multi_label_classification'."
            )
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype ({self.dtype!r}) must be None, a torch.dtype or the name of one, as 'float32'.")
        for name in ("is_encoder_decoder", "add_cross_attention"):
            if getattr(self, name, False):
                raise ValueError(f"{name} (True) must be False: these models have no second stack to attend to.")
        check_at_least("chunk_size_feed_forward", self.chunk_size_feed_forward, 0, "0 does not divide the sequence")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{entry.name} ({value}) must be a finite number.")
        check_at_least("layer_norm_eps", self.layer_norm_eps, 0, "it is added to a variance")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta ({self.rope_theta}) must be more than 0: it is the base of the wavelengths.")
        check_at_least("initializer_range", self.initializer_range, 0, "it is a standard deviation")
        for name in ("hidden_act", "pooler_act"):
            if (value := getattr(self, name)) not in ACT2FN:
                nearest = get_close_matches(value, ACT2FN, n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"{name} ({value!r}) is no activation of transformers; the nearest one is {nearest!r}."
                )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as in transformers. Raises ValueError for a config that could not be loaded again as it is."""
        self.check_loadable()
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def check_loadable(self) -> None:
        """Raise ValueError if loading what would be saved fails or leads to other values.

        Fields set after construction have met no check yet, and those that construction derives were not derived again.
        """
        try:
            saved = json.loads(self.to_json_string(use_diff=False))
            loaded = json.loads(type(self).from_dict(saved).to_json_string(use_diff=False))
        except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(
                f"this {type(self).__name__} could not be loaded again, so it is not saved: {error} A field was set to "
                "something else after construction: correct it or delete it."
            ) from error
        for name in {field.name for field in fields(self)} - PreTrainedConfig.__dataclass_fields__.keys():
            if saved[name] != loaded[name]:
                raise ValueError(
                    f"{name} ({saved[name]}) would be loaded as {loaded[name]}, so this {type(self).__name__} is not "
                    "saved: it depends on a field that was changed after construction. Make a new config instead."
                )


@strict
class PatternConfig(EtConfig):
    """Base of the configs of pattern attention; states the pattern of each head of each layer.

    Args:
        anchor_interval: repeat the [CLS] and [SEP] of a model that was trained on short texts every so many places of a
            row, and let positions start again there, as drawn in `base_anchors`. Rows that fit into one interval are
            left as they are and have full attention. The table of learned positions has one row for each place of an
            interval, and `max_position_embeddings` still limits the tokens of a row. For encoders of text. None
            inserts nothing.
        anchor_token_ids: ids of [CLS] and [SEP].
    """

    num_external_tokens: ClassVar[int] = 0
    takes_anchors: ClassVar[bool] = True

    anchor_interval: int | None = None
    anchor_token_ids: list[int] | None = None

    def validate_anchors(self):
        if self.anchor_interval is None:
            return
        for name, reason in (
            ("is_decoder", "a token to come cannot close an interval"),
            ("image_size", "an image has no [CLS] and [SEP]"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"anchor_interval ({self.anchor_interval}) must be None with {name} ({getattr(self, name)}): "
                    f"{reason}."
                )
        if not self.takes_anchors:
            raise ValueError(
                f"anchor_interval ({self.anchor_interval}) must be None for {self.model_type}, whose segments would "
                "mix anchors with tokens: use et_local, et_longformer or another pattern."
            )
        check_at_least("anchor_interval", self.anchor_interval, 3, "two places of an interval are those of anchors")
        ids = self.anchor_token_ids
        if ids is None or len(ids) != 2 or not all(0 <= number < self.vocab_size for number in ids):
            raise ValueError(
                f"anchor_token_ids ({ids}) must be the ids of [CLS] and [SEP], below vocab_size ({self.vocab_size}), "
                "if anchor_interval is set: [tokenizer.cls_token_id, tokenizer.sep_token_id]."
            )

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions."""
        return self.anchor_interval or self.max_position_embeddings

    @property
    def first_interval(self) -> int | None:
        """Places, with external tokens, up to which a row has full attention; None without anchors."""
        return None if self.anchor_interval is None else self.anchor_interval + self.num_external_tokens

    def row_length(self, length: int) -> int:
        """Places of a row of `length` tokens, with its anchors and external tokens."""
        own = length if self.anchor_interval is None else AnchorLayout(self.anchor_interval).total(length)
        return own + self.num_external_tokens

    def attention_patterns(self, layer: int) -> list[AttentionPattern]:
        """One pattern per head of layer `layer`, or one for all of them."""
        raise NotImplementedError

    def per_layer(self, name: str, layer: int) -> int:
        """The entry of a field that is one number or a list with one number per layer."""
        value = getattr(self, name)
        return value[layer] if isinstance(value, list) else value

    def check_per_layer(self, name: str, minimum: int, remedy: str) -> None:
        value = getattr(self, name)
        if isinstance(value, list):
            layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
            check_entries(name, value, "num_hidden_layers", layers, "give one number for all layers or one for each")
        for entry in value if isinstance(value, list) else [value]:
            check_at_least(name, entry, minimum, remedy)

    def check_stride(self) -> None:
        """The fields `stride` and `hops` of a dilated window."""
        stride, hops = self.stride, self.hops  # type: ignore[attr-defined]
        check_at_least("stride", stride, 1, "1 is a window without gaps")
        if hops is not None:
            check_at_least("hops", hops, 1, "a query attends to at least one step on each side; None to all")

    def layer_seed(self, layer: int) -> int:
        """Of the random blocks of layer `layer`, from the field `pattern_seed`."""
        return self.pattern_seed + 0x10001 * layer  # type: ignore[attr-defined]
