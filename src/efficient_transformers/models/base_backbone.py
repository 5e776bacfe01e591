"""The backbone of every variant: embeddings, blocks of mixer and MLP, packing, cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from .base_anchors import AnchoredRows, AnchorLayout
from .base_blocks import EtBlock, EtReversibleBlock
from .base_cache import check_cache, prepare_cache
from .base_configuration import EtConfig
from .base_embeddings import EtEmbeddings, ExternalTokens
from .base_inputs import ModelInputs
from .base_mixer import PackedDocuments, SequenceInfo
from .base_packing import DocumentPacking, Documents, LeftPacking, find_documents, group_by_length, places_in_groups
from .base_pooling import EtPooler
from .base_reversible import reversible_stack, wide
from .base_signatures import CACHE_FIELD, accepts
from .ops_checks import check_length, check_shape
from .ops_engine import row_numbers
from .ops_rotary import rotary_angles
from .ops_tracing import check_exporter, is_exported, is_traced


class Backbone(ModelInputs):
    """Mixin: embeddings, then blocks of `mixer_class`. List it before the variant's pretrained base class."""

    def __init__(self, config: EtConfig, add_pooling_layer: bool = True):
        super().__init__(config)  # type: ignore[call-arg]
        self.embeddings = EtEmbeddings(config)
        self.num_external = getattr(config, "num_external_tokens", 0)
        interval = getattr(config, "anchor_interval", None)
        self.anchors = None if interval is None else AnchorLayout(interval)
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

        `input_ids` (b, n) int64, or `inputs_embeds` (b, n, e) instead, or `pixel_values` (b, channels, height,
        width) for a model of images. `attention_mask` is 1 at real tokens and 0 at padding, anywhere in a row:
        (b, n), or (b, past + n) after a cache; without one, all tokens are real. `token_type_ids` and `position_ids`
        (b, n) or (1, n), integers; positions count the real tokens of a row from 0 if not given, and token types are
        ignored if `type_vocab_size` is 0.
        `global_attention_mask` (b, n) is 1 at tokens that attend to every token and that every token attends to, for
        the variants that have them. Both masks may be bool, integer or float, with no other values than 0 and 1: an
        additive mask (0 and -10000) is refused, and so is a 2 for a global token, as some Longformer code writes it.
        Traced code does not check values. Outputs at padding are zero.

        Where `position_ids` start again at 0 inside of a row, it holds several documents: each has the outputs it has
        alone, and `pooler_output` is (documents, e), in their order. To see this, torch.compile breaks its graph if
        `position_ids` are passed, and leaves packed rows uncompiled; an exported or traced program treats every row
        as one document. With `config.anchor_interval`, `position_ids` do nothing else.

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
                        f"{documents.rows[0]} rows into {len(documents.lengths)} documents. Leave {name} out, or put "
                        "each document in a row of its own."
                    )
            inputs = documents, inputs_embeds, token_type_ids, position_ids, global_attention_mask
            return uncompiled(self.read_documents)(*inputs, *wanted)

        cache = self.open_cache(past_key_values, use_cache)
        seen = 0 if cache is None else cache.get_seq_length()
        padding_mask, positions = self.locate(inputs_embeds, attention_mask, seen, cache)
        inputs_embeds, padding_mask, positions, token_type_ids, position_ids, global_mask, packing = self.pack(
            inputs_embeds, padding_mask, positions, token_type_ids, position_ids, global_attention_mask, bool(seen)
        )
        if self.anchors is not None:
            inputs_embeds, padding_mask, positions, token_type_ids, position_ids, global_mask, packing = (
                self.insert_anchors(inputs_embeds, padding_mask, positions, token_type_ids, global_mask, packing)
            )
        elif position_ids is None:
            position_ids = positions.clamp(min=0)
        elif position_ids.shape[0] != positions.shape[0]:
            position_ids = position_ids.expand_as(positions)
        hidden = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        hidden, sequence = self.describe(
            hidden, padding_mask, positions, position_ids, global_mask, cache, bool(output_attentions)
        )
        return self.run(hidden, sequence, packing, *wanted)

    def run(
        self,
        hidden: Tensor,
        sequence: SequenceInfo,
        packing: LeftPacking,
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
        """Does the stack run without storing its activations? Not if intermediate results are returned or cached."""
        if not self.config.reversible or not torch.is_grad_enabled() or is_traced():
            return False
        checkpointing = self.gradient_checkpointing and self.training  # type: ignore[attr-defined]
        gives_out = output_hidden_states or sequence.output_attentions
        return not checkpointing and not gives_out and sequence.cache is None

    def run_layers(
        self, hidden: Tensor, sequence: SequenceInfo, packing: LeftPacking, output_hidden_states: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Output of the last layer; if wanted, the input of each layer; if wanted, the weights of each."""
        hidden_states, attentions = [], []
        # Gomez et al. split the features in two; the Reformer paper does not define how its streams begin and end.
        # transformers begins as here and ends with concatenated streams, which makes every head twice as wide.
        dtype, streams = hidden.dtype, [wide(hidden)] * 2 if self.config.reversible else [hidden]
        for layer in self.layers:
            if output_hidden_states:
                hidden = mean(streams).to(dtype)
                hidden_states.append(packing.restore(hidden))
                # zero at real tokens, so that returned hidden states get gradients as well
                change = packing.again(hidden_states[-1], hidden) - hidden
                streams = [stream + change for stream in streams]
            *streams, weights = layer(*streams, sequence)
            if sequence.output_attentions and weights is not None:
                attentions.append(packing.restore_weights(weights))
        return mean(streams).to(dtype), hidden_states, attentions

    def open_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache of this pass, or None. Exported programs have none."""
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

    def divide(self, position_ids: Tensor | None, mask: Tensor | None, embeds: Tensor) -> Documents | None:
        """The documents of packed rows, None if each row is one."""
        if position_ids is None or position_ids.shape[1] == 1 or is_exported():
            return None
        padding_mask = None if mask is None else mask[:, -embeds.shape[1] :]  # the columns before belong to the cache
        documents = uncompiled(find_documents)(position_ids.expand(embeds.shape[:2]), padding_mask)
        if documents is not None and mask is not None:
            check_shape("attention_mask", mask.shape, documents.rows, "batch, length")
        return documents

    def read_documents(
        self,
        documents: Documents,
        embeds: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor,
        global_mask: Tensor | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """The rest of `forward` for packed rows."""
        hidden, sequence, packing = self.join(documents, embeds, token_types, position_ids, global_mask)
        return self.run(hidden, sequence, packing, output_hidden_states, output_attentions)

    def join(
        self,
        documents: Documents,
        embeds: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor,
        global_mask: Tensor | None,
    ) -> tuple[Tensor, PackedDocuments, DocumentPacking]:
        """The tokens of packed documents in one row, (1, t, e); each document's external tokens precede its own."""
        self.check_global_mask(global_mask, documents.rows)
        check_length(max(documents.lengths), self.config.max_position_embeddings, type(self).__name__)
        embeds, position_ids, token_types, global_mask = (
            None if x is None else documents.gather(x.expand(*documents.rows, *x.shape[2:]))[None]
            for x in (embeds, position_ids, token_types, global_mask)
        )  # type: ignore[assignment]
        own, lengths, device = None, documents.lengths, embeds.device
        if self.anchors is not None:
            rows = AnchoredRows.of_documents(self.anchors, lengths, device)
            embeds, token_types = rows.embed(embeds, self.anchor_embeddings()), rows.types(token_types)
            global_mask, position_ids, own = rows.global_mask_of(global_mask), rows.position_ids, rows.places[0]
            lengths = self.anchors.total(torch.tensor(lengths)).tolist()
        hidden = self.embeddings(embeds, position_ids, token_types)[0]
        position_ids, global_mask = position_ids[0], None if global_mask is None else global_mask[0]
        if count := self.num_external:
            lengths = [count + length for length in lengths]
            sizes = torch.tensor(lengths, device=device)
            number = torch.arange(len(lengths), device=device).repeat_interleave(sizes)
            at = torch.arange(len(number), device=device)
            place = at - (sizes.cumsum(0) - sizes)[number]  # in its document
            source = torch.where(place < count, place, at - count * number)
            hidden = self.external_tokens(hidden)[source]
            position_ids = torch.cat([torch.arange(count, device=device), position_ids + count])[source]
            global_mask = None if global_mask is None else nn.functional.pad(global_mask, (count, 0))[source]
            words = (place >= count).nonzero()[:, 0]
            own = words if own is None else words[own]
        parts = []
        for group in (groups := group_by_length(lengths, device)):
            positions = torch.arange(group.tokens.shape[1], device=device).expand_as(group.tokens)
            of_group = None if global_mask is None else group.gather(global_mask)
            if group.padding_mask is not None:
                positions = positions.masked_fill(~group.padding_mask, -1)
                of_group = None if of_group is None else of_group & group.padding_mask
            facts = group.padding_mask, positions, group.gather(position_ids), of_group, hidden.dtype
            parts.append((group, self.inform(*facts)))
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
        padding_mask: Tensor | None,
        positions: Tensor,
        position_ids: Tensor,
        global_mask: Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> tuple[Tensor, SequenceInfo]:
        """Prepend the external tokens and describe the rows for the mixers."""
        if count := self.num_external:
            batch = hidden.shape[0]
            hidden = self.external_tokens(hidden)
            front = torch.arange(count, device=hidden.device).expand(batch, -1)
            positions = torch.cat([front, torch.where(positions < 0, -1, positions + count)], 1)
            position_ids = torch.cat([front, position_ids + count], 1)
            padding_mask = None if padding_mask is None else nn.functional.pad(padding_mask, (count, 0), value=True)
            global_mask = None if global_mask is None else nn.functional.pad(global_mask, (count, 0))
        return hidden, self.inform(
            padding_mask, positions, position_ids, global_mask, hidden.dtype, cache, output_attentions
        )

    def inform(
        self,
        padding_mask: Tensor | None,
        positions: Tensor,
        position_ids: Tensor,
        global_mask: Tensor | None,
        dtype: torch.dtype,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> SequenceInfo:
        """The description of rows for the mixers, external tokens included."""
        config, rotary = self.config, None
        if config.position_embedding_type == "rotary":
            rotary = rotary_angles(position_ids, config.head_dim, config.rope_theta, dtype)
        return SequenceInfo(
            positions=positions,
            padding_mask=padding_mask,
            global_mask=global_mask,
            **row_numbers(padding_mask, global_mask),
            rotary=rotary,
            cache=cache,
            output_attentions=output_attentions,
            shared=self.shared,
        )


def uncompiled(function: Callable) -> Callable:
    """Run eagerly inside torch.compile: document boundaries change at every step and would force a recompile."""
    return torch.compiler.disable(function) if is_traced() else function


def mean(streams: list[Tensor]) -> Tensor:
    return streams[0] if len(streams) == 1 else (streams[0] + streams[1]) / 2
