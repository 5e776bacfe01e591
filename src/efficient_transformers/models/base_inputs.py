"""What a model may be given: checks of its arguments, positions of real tokens, and packing of rows to the left."""

from typing import ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .base_anchors import AnchoredPacking, AnchoredRows, AnchorLayout
from .base_configuration import EtConfig
from .base_packing import LeftPacking, pack, packing_order
from .ops_checks import as_mask, check_length, check_per_token, check_shape
from .ops_tracing import is_traced


class ModelInputs:
    """Mixin of `Backbone`: reads and checks the arguments of `forward`."""

    has_marked_tokens: ClassVar[bool] = False  # does the variant take a global_attention_mask?
    num_external: int
    anchors: AnchorLayout | None
    config: EtConfig

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

    def read_masks(self, mask: Tensor | None, global_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The attention_mask and the global_attention_mask as bool."""
        if mask is not None:
            remedy = "turn an additive mask into mask == 0; packed documents are separated by position_ids"
            if self.has_marked_tokens:
                remedy += "; global tokens are marked by global_attention_mask (mask == 2, if 2 means global)"
            mask = as_mask("attention_mask", mask, "real tokens", "padding", remedy)
        if global_mask is not None:
            remedy = "it marks tokens, and padding is said by attention_mask"
            global_mask = as_mask("global_attention_mask", global_mask, "global tokens", "other tokens", remedy)
        return mask, global_mask

    def check_ids(self, embeds: Tensor, token_types: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise ValueError for embeddings of another width, and for ids of another dtype or shape, which broadcast."""
        if not is_traced():
            width = self.config.embedding_width
            check_shape("inputs_embeds", embeds.shape, (*embeds.shape[:2], width), "batch, length, width of embeddings")
        for name, ids in (("token_type_ids", token_types), ("position_ids", position_ids)):
            if ids is not None:
                check_per_token(name, ids, *embeds.shape[:2])

    def check_global_mask(self, global_mask: Tensor | None, shape: tuple[int, ...]) -> None:
        if global_mask is None:
            return
        if not self.has_marked_tokens or self.config.is_decoder:
            raise ValueError(
                f"{type(self).__name__} takes no global_attention_mask"
                + (" as a decoder: its global tokens are the first ones." if self.has_marked_tokens else ".")
            )
        check_shape("global_attention_mask", global_mask.shape, shape, "batch, length")

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
        padding_mask: Tensor | None,
        positions: Tensor,
        token_types: Tensor | None,
        position_ids: Tensor | None,
        global_mask: Tensor | None,
        continues: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, LeftPacking]:
        """Everything that is per token, real tokens first, and how to get back."""
        self.check_global_mask(global_mask, positions.shape)
        if global_mask is not None:
            global_mask = global_mask if padding_mask is None else global_mask & padding_mask
        packing = LeftPacking(None, padding_mask, self.num_external)
        if padding_mask is None or continues:
            return embeds, padding_mask, positions, token_types, position_ids, global_mask, packing
        if not is_traced() and bool((padding_mask[:, 1:] <= padding_mask[:, :-1]).all()):
            return (
                embeds,
                padding_mask,
                positions,
                token_types,
                position_ids,
                global_mask,
                packing,
            )  # padded on the right already
        packing.order = order = packing_order(padding_mask)
        per_token = [padding_mask, positions, token_types, position_ids, global_mask]
        packed = [None if x is None else pack(x.expand(order.shape), order) for x in per_token]
        return pack(embeds, order), *packed, packing  # type: ignore[return-value]

    def insert_anchors(
        self,
        embeds: Tensor,
        padding_mask: Tensor | None,
        positions: Tensor,
        token_types: Tensor | None,
        global_mask: Tensor | None,
        packing: LeftPacking,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None, LeftPacking]:
        """As `pack`, for packed rows: with their anchors, and with positions that start again in each interval."""
        assert self.anchors is not None
        batch, length, _ = embeds.shape
        if not is_traced() and length <= self.anchors.interval:
            return embeds, padding_mask, positions, token_types, positions.clamp(min=0), global_mask, packing
        rows = AnchoredRows.of(self.anchors, batch, length, padding_mask, embeds.device)
        packing = AnchoredPacking(packing.order, packing.padding_mask, packing.num_external, rows.places)
        embeds = rows.embed(embeds, self.anchor_embeddings())
        types, global_mask = rows.types(token_types), rows.global_mask_of(global_mask)
        return embeds, rows.padding_mask, rows.positions, types, rows.position_ids, global_mask, packing

    def anchor_embeddings(self) -> Tensor:
        """Word embeddings of [CLS] and [SEP], (2, e)."""
        ids = self.config.anchor_token_ids  # type: ignore[attr-defined]
        words = self.get_input_embeddings()  # type: ignore[attr-defined]
        return words(torch.tensor(ids, device=words.weight.device))
