"""Move padding to the right and back, and split rows with several documents and join them again.

Mixers that count blocks or own per-position parameters cannot handle padding before or between the tokens. So
the backbone packs each row once on the way in and undoes it on the way out: a mixer only ever meets right padding.

Nor can all mixers separate documents that share a row: a mask cannot restart a Fourier transform or a matrix over
positions. So a mixer receives such documents as separate rows, and everything else, which processes each token
separately, receives all of their tokens in one row. The outputs then equal those of the separate documents in every
variant, and quadratic ones compute less than with a block mask. The cost is padding in the mixer: documents are grouped
so that the longest is less than twice as long as the shortest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def packing_order(padding_mask: Tensor) -> Tensor:
    """Positions of the real tokens of each row, in order, then of the padding: (b, n) bool -> (b, n) int64."""
    # counted, not sorted: it is linear, and ONNX has no stable sort
    real, padding = padding_mask.long(), (~padding_mask).long()
    place = torch.where(padding_mask, real.cumsum(1), real.sum(1, keepdim=True) + padding.cumsum(1)) - 1
    return inverse(place)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`, row by row: (b, n) -> (b, n)."""
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def pack(x: Tensor, order: Tensor) -> Tensor:
    """The entries of `x` (b, n, …) along axis 1 that `order` (b, m) names: (b, m, …)."""
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def unpack(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return pack(x, inverse(order))


@dataclass
class Documents:
    """Places of the documents in the packed rows of a batch.

    rows: b and n. real: the places of their tokens in the flattened rows, document by document, (t,); None
    where all are real. lengths: tokens of each document.
    """

    rows: tuple[int, int]
    real: Tensor | None
    lengths: list[int]

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of all documents: (b, n, …) -> (t, …)."""
        x = x.flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.real)

    def scatter(self, tokens: Tensor) -> Tensor:
        """Back to their rows, zeros at padding: (t, …) -> (b, n, …)."""
        if self.real is not None:
            batch, length = self.rows
            tokens = tokens.new_zeros(batch * length, *tokens.shape[1:]).index_copy(0, self.real, tokens)
        return tokens.unflatten(0, self.rows)


def find_documents(position_ids: Tensor, padding_mask: Tensor | None) -> Documents | None:
    """The documents of packed rows, or None if no row of `position_ids` (b, n) holds more than one.

    A document begins at the first real token of a row, and at every other token with position 0, as in transformers'
    DataCollatorWithFlattening and in TRL. transformers itself treats every step other than +1 as a boundary; here,
    positions may skip numbers, begin anywhere, or have any value at padding.
    """
    if position_ids.shape[1] < 2 or not bool((position_ids[:, 1:] == 0).any()):
        return None
    real = torch.ones_like(position_ids, dtype=torch.bool) if padding_mask is None else padding_mask
    begins = real & ((position_ids == 0) | (real.cumsum(1) == 1))
    if bool((begins.sum(1) <= 1).all()):
        return None
    places = real.flatten().nonzero()[:, 0]
    first = begins.flatten()[places].nonzero()[:, 0]
    lengths = torch.diff(first, append=first.new_tensor([len(places)])).tolist()
    return Documents((position_ids.shape[0], position_ids.shape[1]), None if padding_mask is None else places, lengths)


@dataclass
class Group:
    """Documents of about one length, as rows.

    numbers: which documents, d of them. tokens: the places of their tokens among those of all documents, (d, l);
    padding repeats the last one. padding_mask: False at that padding; None where there is none.
    """

    numbers: list[int]
    tokens: Tensor
    padding_mask: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of this group: (t, …) -> (d, l, …)."""
        return x.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)


def group_by_length(lengths: list[int], device: torch.device) -> list[Group]:
    """Documents of up to 1, 2, 4, 8, … tokens together."""
    numbers: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        numbers.setdefault((length - 1).bit_length(), []).append(number)
    ends = torch.tensor(lengths, device=device).cumsum(0)
    groups = []
    for members in numbers.values():
        own = [lengths[number] for number in members]
        sizes = torch.tensor(own, device=device)[:, None]
        place = torch.arange(max(own), device=device)
        tokens = ends[torch.tensor(members, device=device)][:, None] - sizes + torch.minimum(place, sizes - 1)
        groups.append(Group(members, tokens, None if min(own) == max(own) else place < sizes))
    return groups


def places_in_groups(groups: list[Group]) -> Tensor:
    """Places of the tokens of all documents in the concatenation of the flattened groups, (t,)."""
    kept = [torch.ones_like(g.tokens, dtype=torch.bool) if g.padding_mask is None else g.padding_mask for g in groups]
    real = torch.cat([x.flatten() for x in kept]).nonzero()[:, 0]
    tokens = torch.cat([g.tokens.flatten() for g in groups])
    return torch.zeros_like(real).scatter(0, tokens[real], real)


@dataclass
class LeftPacking:
    """How the rows of a batch were packed; undoes it."""

    order: Tensor | None  # (b, n), None where the tokens were on the left already
    padding_mask: Tensor | None  # of the original order, (b, n)
    num_external: int

    def restore(self, hidden: Tensor) -> Tensor:
        """(b, g + n, e) packed -> (b, n, e) in the caller's order, zeros at padding."""
        if self.num_external:
            hidden = hidden[:, self.num_external :]
        if self.order is not None:
            hidden = unpack(hidden, self.order)
        return hidden if self.padding_mask is None else hidden * self.padding_mask[..., None]

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

    def pool(self, pooler: nn.Module, hidden: Tensor) -> Tensor:
        """One vector for each row of `hidden` in the caller's order: (b, e)."""
        return pooler(hidden, self.padding_mask)


@dataclass
class DocumentPacking(LeftPacking):
    """How the tokens of packed documents came into one row, (1, t, e); undoes it."""

    documents: Documents
    own: Tensor | None  # places in that row of the documents' own tokens, None where there are no others

    def restore(self, hidden: Tensor) -> Tensor:
        tokens = hidden[0] if self.own is None else hidden[0].index_select(0, self.own)
        return self.documents.scatter(tokens)

    def again(self, restored: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.documents.gather(restored)[None]
        return tokens if self.own is None else hidden.index_copy(1, self.own, tokens)

    def pool(self, pooler: nn.Module, hidden: Tensor) -> Tensor:
        """One vector for each document, in their order: (documents, e)."""
        tokens = self.documents.gather(hidden)
        groups = group_by_length(self.documents.lengths, hidden.device)
        pooled = torch.cat([pooler(group.gather(tokens), group.padding_mask) for group in groups])
        numbers = torch.tensor([number for group in groups for number in group.numbers], device=hidden.device)
        return pooled.index_select(0, numbers.argsort())
