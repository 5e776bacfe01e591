"""The encoder every variant shares: embeddings, blocks of mixer and MLP, packing, cache; and its pretrained base."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .base_cache import check_cache, prepare_cache
from .base_configuration import EtConfig
from .base_images import PatchEmbeddings
from .base_mixer import OwnValues, PackedDocuments, SequenceInfo
from .base_packing import (
    Documents,
    find_documents,
    group_by_length,
    inverse,
    pack,
    packing_order,
    places_in_groups,
    unpack,
)
from .base_resizing import Stretch, resize_table
from .base_reversible import chunks, reversible_stack, wide
from .base_signatures import CACHE_FIELD, accepts
from .ops_checks import as_mask, check_at_least, check_length, check_per_token, check_shape
from .ops_engine import row_numbers
from .ops_rotary import rotary_angles
from .ops_tracing import check_exporter, is_exported, is_traced


class EtPreTrainedModel(PreTrainedModel):
    """Base of all models of the zoo. A variant subclasses it, annotates `config` and names its mixer."""

    config: EtConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EtBlock", "EtReversibleBlock", "EtEmbeddings"]
    _keep_in_fp32_modules_strict = ["pooler.norm"]  # a mean in half precision is off by what tells two texts apart
    _supports_sdpa = True
    _supports_flex_attn = True
    mixer_class: ClassVar[type[nn.Module]]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True; transformers searches the source file for a class named …Attention(nn.Module), and gMLP has one."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnValues):
            module.reset_parameters()
        elif isinstance(module, ExternalTokens):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    def resize_positions(self, new_length: int, how: Stretch = "interpolate") -> None:
        """Let the model read `new_length` tokens: every learned table of positions gets as long, in place.

        `tile` repeats the tables: inputs up to the old length give what they gave. `interpolate` moves position i to
        i·(new-1)/(old-1), between which tables run straight on, and divides what is summed over positions by new/old;
        inputs of any length give something else, until some training. A smaller `new_length` cuts the tables. Hashes
        of Reformer whose `num_buckets` follow the length are drawn for the new one.

        Parameters with positions are new ones: make the optimiser afterwards. Raises ValueError for a length below 1
        or another `how`.
        """
        if self.config.image_size is not None:
            raise ValueError(
                f"new_length ({new_length}) cannot be set for a model of images: its positions are the patches of "
                f"image_size ({self.config.image_size})."
            )
        if how not in ("tile", "interpolate"):
            raise ValueError(f"how ({how!r}) must be 'tile' or 'interpolate'.")
        check_at_least("new_length", new_length, 1, "it is the longest input in tokens")
        config = deepcopy(self.config)
        config.max_position_embeddings = new_length
        with torch.device("meta"):
            sizes = {name: tensor.shape for name, tensor in type(self)(config).state_dict().items()}
        owners = [(prefix, module) for prefix, module in self.named_modules() if isinstance(module, OwnValues)]
        for prefix, module in owners:
            for name, axes in module.position_axes.items():
                if size := sizes.get(f"{prefix}.{name}"):
                    lengths = {axis: size[axis] for axis in axes}
                    resize_table(module, name, lengths, module.summed_axes.get(name, ()), how)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), EtConfig):
                module.config.max_position_embeddings = new_length  # type: ignore[union-attr]
        for _, module in owners:
            module.resized()


def sinusoidal_embedding(positions: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Vaswani et al. 2017, section 3.5, sines in the first half and cosines in the second: (b, n) -> (b, n, size).

    The paper interleaves the two, which is a permutation of the features.
    """
    cos, sin = rotary_angles(positions, size, 10000.0, dtype)
    return torch.cat([sin, cos], -1).squeeze(2)


class EtEmbeddings(OwnValues):
    """Words or patches of images, positions and token types, summed; normalised behind if the blocks are."""

    position_axes: ClassVar = {"position_embeddings.weight": (0,)}

    def __init__(self, config: EtConfig):
        super().__init__()
        self.config = config
        if config.image_size is None:
            # a padding index would freeze one row; padding is masked, so no row needs to be
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            sizes = config.image_size, config.patch_size, config.num_channels, config.hidden_size
            self.patch_embeddings = PatchEmbeddings(*sizes)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if not config.norm_first:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if getattr(config, "embedding_projection", False):
            self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        hidden = inputs_embeds
        if self.config.type_vocab_size:
            types = torch.zeros_like(positions) if token_types is None else token_types
            hidden = hidden + self.token_type_embeddings(types)
        if self.config.position_embedding_type == "learned":
            hidden = hidden + self.position_embeddings(positions)
        elif self.config.position_embedding_type == "sinusoidal":
            hidden = hidden + sinusoidal_embedding(positions, self.config.hidden_size, hidden.dtype)
        if not self.config.norm_first:
            hidden = self.norm(hidden)
        if getattr(self.config, "embedding_projection", False):
            hidden = self.projection(hidden)
        return self.dropout(hidden)


class ExternalTokens(nn.Module):
    """Learned embeddings before every sequence, removed from the output: (…, n, e) -> (…, count + n, e)."""

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.weight.to(hidden.dtype).expand(*hidden.shape[:-2], -1, -1), hidden], -2)


class EtMLP(nn.Module):
    def __init__(self, config: EtConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class EtBlock(GradientCheckpointingLayer):
    """hidden ─ norm ─ mixer ─ + ─ norm ─ MLP ─ +, or with the norms behind the sums; some mixers are a block alone."""

    def __init__(self, config: EtConfig, mixer: nn.Module):
        super().__init__()
        self.norm_first = config.norm_first
        self.mixer = mixer
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.has_mlp = not mixer.is_whole_block
        if self.has_mlp:
            self.mlp = EtMLP(config)
            self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.mix(hidden, sequence)
        if self.norm_first:
            hidden = hidden + mixed
            return hidden + self.feed_forward(hidden) if self.has_mlp else hidden, weights
        hidden = self.mixer_norm(hidden + mixed)
        if not self.has_mlp:
            return hidden, weights
        return self.mlp_norm(hidden + self.feed_forward(hidden)), weights

    def mix(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """What the mixer adds to `hidden` (b, n, e), and its weights if it gives any."""
        mixed, weights = sequence.mix(self.mixer, self.mixer_norm(hidden) if self.norm_first else hidden)
        return self.dropout(mixed), weights

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to `hidden` (b, n, e), by `chunk_size` positions at a time.

        No more than the activations of one chunk exist at once, in a backward pass neither.
        """
        if not self.chunk_size:
            return self.feed_forward_chunk(hidden)
        rule = self.feed_forward_chunk
        if torch.is_grad_enabled() and not is_traced():
            rule = partial(checkpoint, rule, use_reentrant=False)
        return torch.cat([rule(hidden[:, rows]) for rows in chunks(hidden.shape[1], self.chunk_size)], 1)

    def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.mlp_norm(hidden) if self.norm_first else hidden))


class EtReversibleBlock(EtBlock):
    """Two streams that take turns: the mixer reads the second and adds to the first, the MLP the other way round.

    The streams may be wider than the weights.
    """

    def forward(self, x1: Tensor, x2: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        mixed, weights = self.mix(x2, sequence)
        y1 = x1 + mixed
        return y1, x2 + self.feed_forward(y1), weights

    def mix(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        return super().mix(hidden.to(self.mixer_norm.weight.dtype), sequence)

    def feed_forward_chunk(self, hidden: Tensor) -> Tensor:
        return super().feed_forward_chunk(hidden.to(self.mlp_norm.weight.dtype))


class RunningNorm(OwnValues):
    """Gives each feature of vectors (b, e) mean 0 and variance 1 over the examples of training.

    Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1) without its gain and offset, which the
    layer behind has. The paper normalises a batch in training by its own statistics, and so needs large batches; here
    the running ones are used always, as constants, and a batch of one will do.
    """

    MEMORY = 10  # examples; these statistics follow a body that learns, and few are enough for that
    EPSILON = 1e-5

    mean: Tensor
    variance: Tensor
    seen: Tensor  # examples

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.zeros(size))
        self.register_buffer("seen", torch.zeros(()))

    def reset_parameters(self) -> None:
        init.zeros_(self.mean)
        init.zeros_(self.variance)
        init.zeros_(self.seen)

    def forward(self, vectors: Tensor, follow: bool = False) -> Tensor:
        """The vectors (b, e) by the statistics so far, which `follow` first moves to these vectors."""
        if follow:
            self.watch(vectors.to(self.mean.dtype))
        normal = (vectors - self.mean) * (self.variance + self.EPSILON).rsqrt()
        return torch.where(self.seen > 0, normal.to(vectors.dtype), vectors)  # nothing is known of a body not trained

    @torch.no_grad()
    def watch(self, vectors: Tensor) -> None:
        """Plain averages over the first examples, then such that an example counts 1/e of it MEMORY examples later."""
        count = vectors.shape[0]
        share = (count / (self.seen + count)).clamp(min=1 - (1 - 1 / self.MEMORY) ** count)
        variance, mean = torch.var_mean(vectors, 0, correction=0)
        between = share * (1 - share) * (mean - self.mean).square()
        self.variance.copy_(self.variance.lerp(variance, share) + between)
        self.mean.lerp_(mean, share)
        self.seen += count


class PoolerDense(OwnValues):
    """A linear layer (…, e) -> (…, e) that is new in every classifier, and so never adapted but trained as a whole.

    Not an `nn.Linear`: PEFT would put an adapter on it (`target_modules="all-linear"`) inside the copy that it trains
    of the whole pooler, and save what it cannot load.
    """

    def __init__(self, config: EtConfig):
        super().__init__()
        self.std = config.initializer_range
        self.in_features = self.out_features = config.hidden_size
        linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.weight, self.bias = linear.weight, linear.bias

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)
        init.zeros_(self.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.linear(vectors, self.weight, self.bias)


class EtPooler(OwnValues):
    """One vector per sequence: its mean, first or last real token, then BERT's dense layer and (there) tanh."""

    weight = None  # PEFT asks every module it has trained as a whole for one when it merges IA³ and others

    def __init__(self, config: EtConfig):
        super().__init__()
        self.pooling = config.classifier_pooling
        self.norm = RunningNorm(config.hidden_size) if config.standardize_pooled else nn.Identity()
        self.dense = PoolerDense(config)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, hidden: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            keep = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        match self.pooling:
            case "mean":
                pooled = (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
            case "cls":
                pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), keep.int().argmax(1)]
            case "last":
                last = (keep * torch.arange(keep.shape[1], device=hidden.device)).argmax(1)
                pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        if isinstance(self.norm, RunningNorm):
            pooled = self.norm(pooled, follow=self.training and self.learns)
        return self.activation(self.dense(pooled))


@dataclass
class Packing:
    """How the rows of a batch were packed; undoes it."""

    order: Tensor | None  # (b, n), None where the tokens were on the left already
    keep: Tensor | None  # of the original order, (b, n)
    num_external: int

    def restore(self, hidden: Tensor) -> Tensor:
        """(b, g + n, e) packed -> (b, n, e) in the caller's order, zeros at padding."""
        if self.num_external:
            hidden = hidden[:, self.num_external :]
        if self.order is not None:
            hidden = unpack(hidden, self.order)
        return hidden if self.keep is None else hidden * self.keep[..., None]

    def again(self, restored: Tensor, hidden: Tensor) -> Tensor:
        """The inverse of `restore`, with the external tokens of `hidden`."""
        if self.order is not None:
            restored = pack(restored, self.order)
        return torch.cat([hidden[:, : self.num_external], restored], 1) if self.num_external else restored

    def restore_weights(self, weights: Tensor) -> Tensor:
        """(b, h, g + n, m) -> (b, h, n, m'): both axes for a whole sequence, queries alone against a cache."""
        whole = weights.shape[2] == weights.shape[3]
        if self.num_external:
            weights = weights[:, :, self.num_external :, self.num_external if whole else 0 :]
        if self.order is not None:
            back = inverse(self.order)[:, None, :, None]
            weights = weights.gather(2, back.expand_as(weights))
            if whole:
                weights = weights.gather(3, back.transpose(2, 3).expand_as(weights))
        return weights

    def pool(self, pooler: EtPooler, hidden: Tensor) -> Tensor:
        """One vector for each row of `hidden` in the caller's order: (b, e)."""
        return pooler(hidden, self.keep)


@dataclass
class DocumentPacking(Packing):
    """How the tokens of packed documents came into one row, (1, t, e); undoes it."""

    documents: Documents
    own: Tensor | None  # places in that row that are no external token's, None where there are none

    def restore(self, hidden: Tensor) -> Tensor:
        tokens = hidden[0] if self.own is None else hidden[0].index_select(0, self.own)
        return self.documents.scatter(tokens)

    def again(self, restored: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.documents.gather(restored)[None]
        return tokens if self.own is None else hidden.index_copy(1, self.own, tokens)

    def pool(self, pooler: EtPooler, hidden: Tensor) -> Tensor:
        """One vector for each document, in their order: (documents, e)."""
        tokens = self.documents.gather(hidden)
        groups = group_by_length(self.documents.lengths, hidden.device)
        pooled = torch.cat([pooler(group.gather(tokens), group.keep) for group in groups])
        numbers = torch.tensor([number for group in groups for number in group.numbers], device=hidden.device)
        return pooled.index_select(0, numbers.argsort())


class Encoder:
    """Mixin: embeddings, then blocks of `mixer_class`. Stands in front of the variant's pretrained base."""

    has_marked_tokens: ClassVar[bool] = False  # does the variant take a global_attention_mask?
    config: EtConfig

    def __init__(self, config: EtConfig, add_pooling_layer: bool = True):
        super().__init__(config)  # type: ignore[call-arg]
        self.embeddings = EtEmbeddings(config)
        self.num_external = getattr(config, "num_external_tokens", 0)
        if self.num_external:
            self.external_tokens = ExternalTokens(self.num_external, config.hidden_size)
        self.shared = self.mixer_class.new_shared(config)  # type: ignore[attr-defined]
        mixers = (self.mixer_class(config, layer) for layer in range(config.num_hidden_layers))  # type: ignore[attr-defined]
        block_class = EtReversibleBlock if config.reversible else EtBlock
        self.layers = nn.ModuleList(block_class(config, mixer) for mixer in mixers)
        if config.norm_first:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = EtPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        if config.image_size is not None:
            self.main_input_name = "pixel_values"
        self.post_init()  # type: ignore[attr-defined]

    def get_input_embeddings(self) -> nn.Module:
        if self.config.image_size is None:
            return self.embeddings.word_embeddings
        return self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        if self.config.image_size is None:
            self.embeddings.word_embeddings = value
        else:
            self.embeddings.patch_embeddings = value

    @accepts()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        r"""Encode a batch of sequences.

        `input_ids` (b, n) int64, or `inputs_embeds` (b, n, e) in their place, or `pixel_values` (b, channels, height,
        width) for a model of images. `attention_mask` is 1 at real tokens and 0 at padding, anywhere in a row:
        (b, n), or (b, past + n) after a cache; without one, all tokens are real. `token_type_ids` and `position_ids`
        (b, n) or (1, n), integers; positions count the real tokens of a row from 0 if not given, and token types are
        ignored if `type_vocab_size` is 0.
        `global_attention_mask` (b, n) is 1 at tokens that attend to every token and that every token attends to, for
        the variants that have them. Both masks may be bool, integer or float, with no other values than 0 and 1: an
        additive mask (0 and -10000) is refused, and so is a 2 for a global token, as some Longformer code writes it.
        Traced code does not check values. Outputs at padding are zero.

        Where `position_ids` start again at 0 inside of a row, it holds several documents: each gives what it gives
        alone, and `pooler_output` is (documents, e), in their order. To see this, torch.compile breaks its graph where
        it is given `position_ids`, and leaves packed rows uncompiled; an exported or traced program takes every row
        for one document.

        Raises ValueError for a sequence longer than `max_position_embeddings`, masks and ids of another shape, dtype or
        value, both or neither of `input_ids` and `inputs_embeds`, a cache that this model cannot use, and for packed
        rows if a cache or attentions are asked for. Raises TypeError for any other keyword, except those that Trainer
        and `generate` pass (`base_signatures.SHARED`); transformers 5.24 renamed `past_key_values` to `cache`.
        """
        check_exporter(type(self).__name__)
        config = self.config
        inputs = self.choose_input(input_ids, pixel_values, inputs_embeds)
        check_cache(past_key_values, type(self).__name__, config.is_decoder)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(inputs)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        wanted = bool(output_hidden_states), bool(output_attentions)

        assert inputs_embeds is not None
        attention_mask, global_attention_mask = self.read_masks(attention_mask, global_attention_mask)
        self.check_ids(inputs_embeds, token_type_ids, position_ids)
        if documents := self.divide(position_ids, attention_mask, inputs_embeds):
            for name, asked in (
                ("past_key_values", past_key_values is not None),
                ("use_cache", use_cache),
                ("output_attentions", output_attentions),
            ):
                if asked:
                    raise ValueError(
                        f"{name} cannot go with packed rows: position_ids start again at 0 and divide the "
                        f"{documents.rows[0]} rows into {len(documents.lengths)} documents. Leave {name} out, or give "
                        "each document a row of its own."
                    )
            inputs = documents, inputs_embeds, token_type_ids, position_ids, global_attention_mask
            return uncompiled(self.read_documents)(*inputs, *wanted)

        cache = self.open_cache(past_key_values, use_cache)
        seen = 0 if cache is None else cache.get_seq_length()
        keep, positions = self.locate(inputs_embeds, attention_mask, seen, cache)
        inputs_embeds, keep, positions, token_type_ids, position_ids, marked, packing = self.pack(
            inputs_embeds, keep, positions, token_type_ids, position_ids, global_attention_mask, bool(seen)
        )
        if position_ids is None:
            position_ids = positions.clamp(min=0)
        elif position_ids.shape[0] != positions.shape[0]:
            position_ids = position_ids.expand_as(positions)
        hidden = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        hidden, sequence = self.describe(hidden, keep, positions, position_ids, marked, cache, bool(output_attentions))
        return self.run(hidden, sequence, packing, *wanted)

    def choose_input(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor | None:
        """What the embeddings look up: token ids, or pixels in a model of images; None with `inputs_embeds`."""
        given = {"input_ids": input_ids, "pixel_values": pixel_values}
        name, other = ("input_ids", "pixel_values") if self.config.image_size is None else ("pixel_values", "input_ids")
        if given[other] is not None:
            raise ValueError(
                f"{type(self).__name__} takes {name} and got {other}: image_size={self.config.image_size}."
            )
        if (given[name] is None) == (inputs_embeds is None):
            raise ValueError(f"give either {name} or inputs_embeds, not both and not neither.")
        return given[name]

    def run(
        self,
        hidden: Tensor,
        sequence: SequenceInfo,
        packing: Packing,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """From the embeddings to the outputs."""
        if self.training:  # type: ignore[attr-defined]
            for layer in self.layers:
                layer.mixer.count_pass()  # type: ignore[operator]
        hidden_states, attentions = [], []
        if self.recomputes(sequence, output_hidden_states):
            hidden = reversible_stack(self.layers, hidden, sequence)  # type: ignore[arg-type]
        else:
            hidden, hidden_states, attentions = self.run_layers(hidden, sequence, packing, output_hidden_states)
        if self.training:  # type: ignore[attr-defined]
            for layer in self.layers:
                layer.mixer.finish_pass(sequence)  # type: ignore[operator]
        if self.config.norm_first:
            hidden = self.norm(hidden)
        hidden = packing.restore(hidden)
        if output_hidden_states:
            hidden_states.append(hidden)

        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else packing.pool(self.pooler, hidden),
            **{CACHE_FIELD: sequence.cache},  # type: ignore[arg-type]
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions and attentions else None,
        )

    def recomputes(self, sequence: SequenceInfo, output_hidden_states: bool) -> bool:
        """Does the stack run without keeping its activations? Not where there is something to give out or to store."""
        if not self.config.reversible or not torch.is_grad_enabled() or is_traced():
            return False
        checkpointing = self.gradient_checkpointing and self.training  # type: ignore[attr-defined]
        gives_out = output_hidden_states or sequence.output_attentions
        return not checkpointing and not gives_out and sequence.cache is None

    def run_layers(
        self, hidden: Tensor, sequence: SequenceInfo, packing: Packing, output_hidden_states: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What leaves the last layer; what enters each, if wanted; and the weights of each, if wanted."""
        hidden_states, attentions = [], []
        # Gomez et al. split the features in two; the Reformer paper leaves open how its streams begin and end.
        # transformers' begins as here and ends with the streams side by side, which makes every head twice as wide.
        dtype, streams = hidden.dtype, [wide(hidden)] * 2 if self.config.reversible else [hidden]
        for layer in self.layers:
            if output_hidden_states:
                hidden = mean(streams).to(dtype)
                hidden_states.append(packing.restore(hidden))
                # zero at real tokens: what is given out gets the gradient, too
                change = packing.again(hidden_states[-1], hidden) - hidden
                streams = [stream + change for stream in streams]
            *streams, weights = layer(*streams, sequence)
            if sequence.output_attentions and weights is not None:
                attentions.append(packing.restore_weights(weights))
        return mean(streams).to(dtype), hidden_states, attentions

    def open_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to read and write, or None. Exported programs have none."""
        if not self.config.is_decoder:
            return None
        if is_exported():
            if cache is not None or use_cache:
                raise ValueError(
                    f"{type(self).__name__} cannot be exported with a cache, whose size changes with every token: "
                    "leave past_key_values out and use_cache=None or False. The exported program takes the whole "
                    "sequence at each step."
                )
            return None
        wanted = self.config.use_cache if use_cache is None else use_cache
        if (self.gradient_checkpointing or self.config.reversible) and self.training:  # type: ignore[attr-defined]
            wanted = False  # a layer that runs twice would store its keys twice
        if cache is None and not wanted:
            return None
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        kinds = [mixer.cache_class for mixer in mixers]
        return prepare_cache(cache, kinds, lambda: [mixer.new_cache_layer() for mixer in mixers])

    def read_masks(self, mask: Tensor | None, marked: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The attention_mask and the global_attention_mask as bool."""
        if mask is not None:
            remedy = "turn an additive mask into mask == 0; packed documents are separated by position_ids"
            if self.has_marked_tokens:
                remedy += "; global tokens are marked by global_attention_mask (mask == 2, if 2 means global)"
            mask = as_mask("attention_mask", mask, "real tokens", "padding", remedy)
        if marked is not None:
            remedy = "it marks tokens, and padding is said by attention_mask"
            marked = as_mask("global_attention_mask", marked, "global tokens", "other tokens", remedy)
        return mask, marked

    def check_ids(self, embeds: Tensor, token_types: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise ValueError for ids of another dtype or shape, which would be broadcast without a word."""
        for name, ids in (("token_type_ids", token_types), ("position_ids", position_ids)):
            if ids is not None:
                check_per_token(name, ids, *embeds.shape[:2])

    def locate(
        self, hidden: Tensor, mask: Tensor | None, seen: int, cache: Cache | None
    ) -> tuple[Tensor | None, Tensor]:
        """Which of the new tokens are real (None: all), and how many real ones precede each; -1 at padding."""
        batch, length, _ = hidden.shape
        check_length(seen + length, self.config.max_position_embeddings, type(self).__name__)
        if seen and (mask is None or mask.shape[1] == length):  # says nothing of the past
            if getattr(cache, "holds_padding", False):
                raise ValueError(
                    f"attention_mask must cover the {seen} tokens in the cache, too, for some of them are padding: "
                    f"give it with shape (batch, past + length) = ({batch}, {seen + length})."
                )
            mask = None if mask is None else torch.cat([mask.new_ones(batch, seen), mask], 1)
        if mask is not None:
            check_shape("attention_mask", mask.shape, (batch, seen + length), "batch, past + length")
        if mask is not None and not is_traced() and bool(mask.all()):
            mask = None
        if cache is not None:
            cache.holds_padding = mask is not None  # type: ignore[attr-defined]
        if mask is None:
            return None, torch.arange(seen, seen + length, device=hidden.device).expand(batch, -1)
        positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        return mask[:, seen:], positions[:, seen:]

    def pack(
        self,
        embeds: Tensor,
        keep: Tensor | None,
        positions: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor | None,
        marked: Tensor | None,
        continues: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Packing]:
        """Everything that is per token, real tokens first, and how to get back."""
        self.check_marks(marked, positions.shape)
        if marked is not None:
            marked = marked if keep is None else marked & keep
        packing = Packing(None, keep, self.num_external)
        if keep is None or continues:
            return embeds, keep, positions, token_types, position_ids, marked, packing
        if not is_traced() and bool((keep[:, 1:] <= keep[:, :-1]).all()):
            return embeds, keep, positions, token_types, position_ids, marked, packing  # padded on the right already
        packing.order = order = packing_order(keep)
        per_token = [keep, positions, token_types, position_ids, marked]
        packed = [None if x is None else pack(x.expand(order.shape), order) for x in per_token]
        return pack(embeds, order), *packed, packing  # type: ignore[return-value]

    def check_marks(self, marked: Tensor | None, shape: tuple[int, ...]) -> None:
        if marked is None:
            return
        if not self.has_marked_tokens or self.config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} takes no global_attention_mask"
                + (" as a decoder: its global tokens are the first ones." if self.has_marked_tokens else ".")
            )
        check_shape("global_attention_mask", marked.shape, shape, "batch, length")

    def divide(self, position_ids: Tensor | None, mask: Tensor | None, embeds: Tensor) -> Documents | None:
        """The documents of packed rows, None if each row is one."""
        if position_ids is None or position_ids.shape[1] == 1 or is_exported():
            return None
        keep = None if mask is None else mask[:, -embeds.shape[1] :]  # before these is the past
        documents = uncompiled(find_documents)(position_ids.expand(embeds.shape[:2]), keep)
        if documents is not None and mask is not None:
            check_shape("attention_mask", mask.shape, documents.rows, "batch, length")
        return documents

    def read_documents(
        self,
        documents: Documents,
        embeds: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor,
        marked: Tensor | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """All of `forward` behind the inputs, for packed rows."""
        hidden, sequence, packing = self.join(documents, embeds, token_types, position_ids, marked)
        return self.run(hidden, sequence, packing, output_hidden_states, output_attentions)

    def join(
        self,
        documents: Documents,
        embeds: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor,
        marked: Tensor | None,
    ) -> tuple[Tensor, PackedDocuments, DocumentPacking]:
        """All tokens of packed documents in one row, (1, t, e), external ones in front of each document's."""
        self.check_marks(marked, documents.rows)
        check_length(max(documents.lengths), self.config.max_position_embeddings, type(self).__name__)
        position_ids = position_ids.expand(documents.rows)
        hidden = documents.gather(self.embeddings(embeds, position_ids, token_types))
        position_ids = documents.gather(position_ids)
        marked = None if marked is None else documents.gather(marked)
        own, lengths, device = None, documents.lengths, hidden.device
        if count := self.num_external:
            lengths = [count + length for length in lengths]
            sizes = torch.tensor(lengths, device=device)
            number = torch.arange(len(lengths), device=device).repeat_interleave(sizes)
            at = torch.arange(len(number), device=device)
            place = at - (sizes.cumsum(0) - sizes)[number]  # in its document
            source = torch.where(place < count, place, at - count * number)
            hidden = self.external_tokens(hidden)[source]
            position_ids = torch.cat([torch.arange(count, device=device), position_ids + count])[source]
            marked = None if marked is None else nn.functional.pad(marked, (count, 0))[source]
            own = (place >= count).nonzero()[:, 0]
        parts = []
        for group in (groups := group_by_length(lengths, device)):
            positions = torch.arange(group.tokens.shape[1], device=device).expand_as(group.tokens)
            of_group = None if marked is None else group.gather(marked)
            if group.keep is not None:
                positions = positions.masked_fill(~group.keep, -1)
                of_group = None if of_group is None else of_group & group.keep
            told = group.keep, positions, group.gather(position_ids), of_group, hidden.dtype
            parts.append((group, self.inform(*told)))
        sequence = PackedDocuments(
            torch.arange(len(hidden), device=device)[None],
            shared=self.shared,
            groups=parts,
            places=places_in_groups(groups),
        )
        return hidden[None], sequence, DocumentPacking(None, None, self.num_external, documents, own)

    def describe(
        self,
        hidden: Tensor,
        keep: Tensor | None,
        positions: Tensor,
        position_ids: Tensor,
        marked: Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> tuple[Tensor, SequenceInfo]:
        """Put the external tokens in front and write down what the mixers may know."""
        if count := self.num_external:
            batch = hidden.shape[0]
            hidden = self.external_tokens(hidden)
            front = torch.arange(count, device=hidden.device).expand(batch, -1)
            positions = torch.cat([front, torch.where(positions < 0, -1, positions + count)], 1)
            position_ids = torch.cat([front, position_ids + count], 1)
            keep = None if keep is None else nn.functional.pad(keep, (count, 0), value=True)
            marked = None if marked is None else nn.functional.pad(marked, (count, 0))
        return hidden, self.inform(keep, positions, position_ids, marked, hidden.dtype, cache, output_attentions)

    def inform(
        self,
        keep: Tensor | None,
        positions: Tensor,
        position_ids: Tensor,
        marked: Tensor | None,
        dtype: torch.dtype,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> SequenceInfo:
        """What the mixers may know of rows with their external tokens."""
        config, rotary = self.config, None
        if config.position_embedding_type == "rotary":
            rotary = rotary_angles(position_ids, config.head_dim, config.rope_theta, dtype)
        return SequenceInfo(
            positions=positions,
            keep=keep,
            global_mask=marked,
            **row_numbers(keep, marked),
            rotary=rotary,
            cache=cache,
            output_attentions=output_attentions,
            shared=self.shared,
        )


def uncompiled(function: Callable) -> Callable:
    """Runs as it is where torch.compile meets it: documents are other ones at each step, as would be their graph."""
    return torch.compiler.disable(function) if is_traced() else function


def mean(streams: list[Tensor]) -> Tensor:
    return streams[0] if len(streams) == 1 else (streams[0] + streams[1]) / 2
