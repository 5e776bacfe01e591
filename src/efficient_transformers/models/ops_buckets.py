"""Groups of tokens that depend on the data: their members, the allowed pairs, and how often each pair occurs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops_tracing import count_blocks, is_exported, is_traced

PADDING = 2**40  # a bucket after all others; times any length it fits into int64


@dataclass(frozen=True)
class BucketLayout:
    """Groups of slots, each for one token of a sequence; a token may be in several groups or in none.

    queries: the token in each query slot, (b, h, g, c) int64, -1 where it is empty.
    keys: the token in each key slot of a group, (b, h, g, m), -1 where it is empty. None: the slots of a group are its
        keys as well, and so are those of the group before it.
    labels: (b, h, g, c), only without `keys`: equal at slots that attend to each other, -1 at empty ones. Equal labels
        are contiguous, in the order of the tokens.
    missed: real tokens in no query slot, (b, h, n); None if there are none.
    own: does a token attend to itself as to any other? If not, then only if it has no other key, and the slots of a
        group are the last c of its keys.
    causal: does no token attend to a later one? Without `keys` a token then attends to the last c tokens of its label:
        no later token changes that, whereas the boundaries of groups depend on all of them.
    """

    queries: Tensor
    keys: Tensor | None = None
    labels: Tensor | None = None
    missed: Tensor | None = None
    own: bool = True
    causal: bool = False

    @property
    def keys_per_group(self) -> int:
        return 2 * self.queries.shape[-1] if self.keys is None else self.keys.shape[-1]

    def key_tokens(self) -> Tensor:
        """The token in each key slot, (b, h, g, m)."""
        return with_group_before(self.queries, -1) if self.keys is None else self.keys

    def allowed(self) -> Tensor:
        """The allowed pairs within groups, without a token and itself unless `own`: (b, h, g, c, m) bool."""
        queries, keys = self.queries[..., None], self.key_tokens()[..., None, :]
        allowed = (queries >= 0) & (keys >= 0)
        if self.labels is not None:
            allowed = allowed & (self.labels[..., None] == with_group_before(self.labels, -2)[..., None, :])
        if self.causal:
            allowed = allowed & (keys <= queries)
            if self.keys is None:  # the slot's distance to key j is c + i - j
                slot = torch.arange(self.keys_per_group, device=keys.device)
                allowed = allowed & (slot >= slot[: queries.shape[-2], None])
        return allowed if self.own else allowed & (keys != queries)

    def itself(self) -> Tensor:
        """The pairs of a query slot and itself among the keys, (c, m) bool; only if `own` is False."""
        slot = torch.arange(self.keys_per_group, device=self.queries.device)
        return slot == slot[-self.queries.shape[-1] :, None]

    def counts(self, length: int) -> Tensor:
        """Number of groups in which token i attends to j, (b, h, n, n) int64; 1 for itself if it has no other key."""
        batch, heads = self.queries.shape[:2]
        rows = torch.where(self.queries < 0, length, self.queries)[..., None]  # empty slots write outside
        columns = torch.where(self.key_tokens() < 0, length, self.key_tokens())[..., None, :]
        place = (rows * (length + 1) + columns).flatten(2)
        counts = torch.zeros(batch, heads, (length + 1) ** 2, dtype=torch.long, device=rows.device)
        counts = counts.scatter_add(2, place, self.allowed().flatten(2).long())
        counts = counts.unflatten(2, (length + 1, length + 1))[:, :, :length, :length]
        return counts + itself(self.standing(length), counts)

    def standing(self, length: int) -> Tensor:
        """Real tokens, (b, h, n) bool."""
        places = torch.where(self.queries < 0, length, self.queries).flatten(2)
        standing = places.new_zeros(*places.shape[:2], length + 1).scatter(2, places, 1)[..., :length].bool()
        return standing if self.missed is None else standing | self.missed


def with_group_before(x: Tensor, empty: int) -> Tensor:
    """(b, h, g, c) -> (b, h, g, 2c): each group after the previous one; `empty` before the first."""
    group = torch.arange(x.shape[2], device=x.device)  # by index: a slice of a traced length may be empty
    before = torch.where(group[:, None] > 0, x.index_select(2, (group - 1).clamp(min=0)), empty)
    return torch.cat([before, x], -1)


def itself(real: Tensor, counts: Tensor) -> Tensor:
    """1 on the diagonal for each `real` query (b, h, n) that has no key by `counts` (b, h, n, n)."""
    return torch.diag_embed((real & (counts.sum(-1) == 0)).long())


def sorted_chunks(buckets: Tensor, padding_mask: Tensor | None, chunk_length: int, causal: bool) -> BucketLayout:
    """Sort tokens by bucket, in chunks; they attend to their bucket within their own chunk and the previous one.

    `buckets` (b, h, r, n) int64 ≥ 0 for each of r rounds; `padding_mask` (b, n) is True at real tokens, which come
    first. Each round begins with a new chunk. Returns r · ⌈n / chunk_length⌉ groups; O(r·n log n).
    """
    order, real = sorted_tokens(buckets, padding_mask)
    rounds = buckets.shape[2]
    labels = buckets.gather(-1, order) * rounds + torch.arange(rounds, device=buckets.device)[:, None]
    labels, tokens = torch.where(real, labels, -1), torch.where(real, order, -1)
    labels, tokens = (cut_into_chunks(x, chunk_length) for x in (labels, tokens))
    return BucketLayout(tokens, labels=labels, own=False, causal=causal)


def chained_chunks(
    buckets: Tensor, padding_mask: Tensor | None, chunk_length: int, causal: bool, chunks: Tensor | None = None
) -> BucketLayout:
    """`sorted_chunks`, but tokens attend to their whole chunk and the previous one, whatever the bucket.

    The chunks of all rounds form a ring: the first chunk of a round attends to the last one of the previous round.
    `chunks` (b,) is the number of chunks of a round that belong to the ring; None takes those that hold real tokens.
    This is what transformers' Reformer computes, with all chunks in the ring, those of padding too.
    """
    order, real = sorted_tokens(buckets, padding_mask)
    tokens = cut_into_chunks(torch.where(real, order, -1), chunk_length)
    _, heads, groups, size = tokens.shape
    rounds = buckets.shape[2]
    if chunks is None:
        lengths = real[:, 0, 0].sum(-1)  # (b,), the same in all rounds
        chunks = -(-lengths // size)
    number = torch.arange(groups // rounds, device=tokens.device)
    turn, in_round = torch.arange(rounds, device=tokens.device)[:, None], groups // rounds
    start = turn * in_round
    last = (turn - 1) % rounds * in_round + chunks[:, None, None] - 1  # of the round before
    before = torch.where(number > 0, start + number - 1, last).flatten(1)  # (b, g)
    previous = tokens.gather(2, before[:, None, :, None].clamp(min=0).expand(-1, heads, -1, size))
    previous = torch.where((chunks > 1)[:, None, None, None], previous, -1)
    return BucketLayout(tokens, keys=torch.cat([previous, tokens], -1), own=False, causal=causal)


def sorted_tokens(buckets: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens by bucket, then by position, padding last; and the places of real ones: (b, h, r, n) each."""
    if padding_mask is not None:
        buckets = torch.where(padding_mask[:, None, None], buckets, PADDING)
    order = stable_order(buckets)
    if padding_mask is None:
        return order, torch.ones_like(order, dtype=torch.bool)
    place = torch.arange(order.shape[-1], device=order.device)
    return order, (place < padding_mask.sum(1)[:, None, None, None]).expand_as(order)


def stable_order(buckets: Tensor) -> Tensor:
    """`buckets.argsort(dim=-1, stable=True)` of int64 ≥ 0, (…, n); ONNX has no stable sort, so ties go by position."""
    if not is_exported():
        return buckets.argsort(dim=-1, stable=True)
    length = buckets.shape[-1]
    place = torch.arange(length, device=buckets.device)
    return (buckets * length + place).argsort(dim=-1)


def cut_into_chunks(x: Tensor, size: int) -> Tensor:
    """(b, h, r, n) -> (b, h, r · ⌈n / size⌉, size), -1 in what is left of the last chunk; one chunk is cut at n."""
    length = x.shape[-1]
    size = size if is_traced() else min(size, length)
    groups = count_blocks(length, size)
    # selected by index: to fold what was padded would make a traced length a multiple of the chunk
    place = torch.arange(groups * size, device=x.device)
    chunks = torch.where(place < length, x[..., place.clamp(max=length - 1)], -1)
    return chunks.view(*x.shape[:2], x.shape[2] * groups, size)


def recent_counts(buckets: Tensor, key_buckets: Tensor, positions: Tensor, key_positions: Tensor, reach: int) -> Tensor:
    """Number of rounds in which a key is one of the last `reach` tokens of a query's bucket, (b, h, n, m) int64.

    The rule of a causal `BucketLayout` without `keys`, for queries whose past is at hand: `buckets` (b, h, r, n),
    `key_buckets` (b, h, r, m), `positions` (b, n) and `key_positions` (b, m) ascending, -1 at padding. The queries are
    the last keys. A query attends to itself once if it has no other key; padding has no pairs.
    """
    i, j = positions[:, None, None, :, None], key_positions[:, None, None, None]
    same = (buckets[..., None] == key_buckets[..., None, :]) & (j >= 0) & (j < i)  # (b, h, r, n, m)
    distance = same.flip(-1).cumsum(-1).flip(-1)  # members of the bucket from j on
    counts = (same & (distance <= reach)).sum(2)
    alone = (counts.sum(-1, keepdim=True) == 0) & (i == j)[:, :, 0] & (i >= 0)[:, :, 0]
    return counts + alone
