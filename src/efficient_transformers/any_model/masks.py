"""Recognise the mask that a transformers model requests, without materialising the matrix.

transformers calls `efficient_mask` once for each kind of layer, with a function of index pairs. If that function is
composed of known parts, and agrees with their meaning on sampled rows, the result is a `LazyMask`: a tensor that holds
the description, and becomes the boolean matrix as soon as an operation needs it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging

from ..models.ops_tracing import is_traced

logger = logging.get_logger(__name__)

# Up to this many keys, SDPA with the matrix is as fast as any alternative (measured).
SHORT_LENGTH = 512
# Pairs on which a mask function is compared with its description.
SAMPLED_PAIRS = 2**17
Spans = list[list[tuple[int, int]]]  # for each row of a batch, (start, stop) of its sequences


@dataclass(frozen=True)
class MaskRule:
    """The mask that a model requests for one kind of layer, without padding.

    before, after: number of earlier and later keys that a query attends to; None means no limit, `after=0` is causal.
    documents: index of the sequence of each token, (b, n), in packed rows; None if each row is one sequence.
    """

    before: int | None = None
    after: int | None = None
    documents: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.after == 0

    @property
    def is_plain(self) -> bool:
        """True for full attention, causal or not, with one sequence per row."""
        return self.before is None and self.after in (0, None) and self.documents is None

    def allows(self, row: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True where the query with index i may attend to the key with index j in this row of the batch. Broadcasts."""
        allowed = torch.ones_like(i - j, dtype=torch.bool)
        if self.before is not None:
            allowed = allowed & (i - j <= self.before)
        if self.after is not None:
            allowed = allowed & (j - i <= self.after)
        if self.documents is not None:
            allowed = allowed & (self.documents[row, i] == self.documents[row, j])
        return allowed


class UnknownMask(Exception):
    """An unknown mask function; the message names the unknown part."""


def closure_of(function: Callable) -> dict[str, Any]:
    """Captured variables of a nested function."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def recognise(function: Callable) -> MaskRule:
    """Return the rule of a `transformers.masking_utils` mask function. Raises UnknownMask for any other function."""
    if function is masking_utils.causal_mask_function:
        return MaskRule(after=0)
    if function is masking_utils.bidirectional_mask_function:
        return MaskRule()
    part = getattr(function, "__qualname__", type(function).__name__).partition(".<locals>")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__:
        raise UnknownMask(f"a custom mask function, {part}")
    captured = closure_of(function)
    match part:
        case "and_masks":
            return _intersection([recognise(each) for each in captured["mask_functions"]])
        case "sliding_window_overlay":  # this window includes the query itself
            return MaskRule(before=captured["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return MaskRule(before=captured["sliding_window"], after=captured["sliding_window"])
        case "packed_sequence_mask_function":
            return MaskRule(documents=captured["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # within a document, distances are those of the indices
            return recognise(captured["mask_function"])
    raise UnknownMask(f"a mask of the kind {part}")


def _intersection(rules: list[MaskRule]) -> MaskRule:
    before, after, documents = (
        [value for rule in rules if (value := getattr(rule, name)) is not None]
        for name in ("before", "after", "documents")
    )
    if len(documents) > 1:
        raise UnknownMask("several packings at once")
    return MaskRule(min(before, default=None), min(after, default=None), documents[0] if documents else None)


def agrees(
    rule: MaskRule, function: Callable, batch: int, queries: range, keys: range, device: torch.device | str
) -> bool:
    """Compare `function` with `rule` on whole rows: the first, the last, those at the edges of the window, and others.

    `function` does not include the padding that `sdpa_mask` adds.
    """
    if not queries or not keys:
        return True
    count = max(4, min(16, SAMPLED_PAIRS // (batch * len(keys))))
    edges = {queries[0], queries[-1], queries[len(queries) // 2]}
    if rule.before is not None:
        edges.update(i for i in (rule.before, rule.before + 1) if i in queries)
    edges.update(queries[place * (len(queries) - 1) // max(1, count - 1)] for place in range(count))
    row = torch.arange(batch, device=device)[:, None, None, None]
    i = torch.tensor(sorted(edges), device=device)[None, None, :, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, None, None]
    expected = rule.allows(row, i, j)
    found = function(row, torch.zeros_like(row), i, j)
    return bool((expected == found).all())


class LazyMask(torch.Tensor):
    """A mask (b, 1, q, k) that is materialised only when an operation needs its values.

    Boolean, True at pairs to compute; for models without SDPA a float mask, 0 at these pairs and the lowest number
    elsewhere.

    rule: the requested mask. padding: True at real tokens, (b, tokens so far), or None if all are real. q_offset,
    kv_offset: index of the first query and of the first key in the sequence. arguments: those of `sdpa_mask`.
    """

    rule: MaskRule
    padding: Tensor | None
    q_offset: int
    kv_offset: int
    arguments: dict[str, Any]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def make(rule: MaskRule, q_offset: int, kv_offset: int, padding: Tensor | None, arguments: dict) -> "LazyMask":
        shape = arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"]
        dtype = torch.bool if has_sdpa(type(arguments.get("config"))) else arguments["dtype"]
        mask = torch.Tensor._make_wrapper_subclass(LazyMask, shape, dtype=dtype, device=arguments.get("device", "cpu"))
        mask.rule, mask.padding = rule, padding
        mask.q_offset, mask.kv_offset, mask.arguments = q_offset, kv_offset, arguments
        return mask

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        logger.warning_once(
            'attn_implementation="efficient" passes layers on to SDPA, because the model computes with their mask '
            f"({func})."
        )
        plain = tree_map_only(LazyMask, lambda mask: mask.dense, (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"LazyMask({self.rule}, shape={tuple(self.shape)})"

    @property
    def keys(self) -> tuple[int, int]:
        """Index of the first key, and number of keys."""
        return self.kv_offset, self.arguments["kv_length"]

    @cached_property
    def dense(self) -> Tensor:
        """The matrix, (b, 1, q, k)."""
        write = sdpa_mask if self.dtype == torch.bool else eager_mask
        mask = write(**{**self.arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        return mask

    @cached_property
    def for_sdpa(self) -> Tensor | None:
        """The mask that transformers passes to SDPA: None if the flag `is_causal` is sufficient."""
        mask = sdpa_mask(**self.arguments)
        return mask if mask is None or self.dtype != torch.bool else self.dense

    @cached_property
    def spans(self) -> Spans | None:
        """The sequences of each row, if queries and keys are the same tokens; None if padding interrupts one."""
        batch, length = self.shape[0], self.shape[2]
        if self.rule.documents is not None:
            starts = self.rule.documents.diff(dim=1).nonzero().tolist()
            found: Spans = [[] for _ in range(batch)]
            cuts: list[list[int]] = [[0] for _ in range(batch)]
            for row, before in starts:
                cuts[row].append(before + 1)
            for row, of_row in enumerate(cuts):
                found[row] = list(zip(of_row, [*of_row[1:], length], strict=True))
            return found
        if self.padding is None:
            return [[(0, length)]] * batch
        real = self.padding[:, :length]
        if real.shape[1] < length:
            real = torch.nn.functional.pad(real, (0, length - real.shape[1]))
        count = real.sum(1)
        first = real.int().argmax(1)
        last = length - real.flip(1).int().argmax(1)
        table = torch.stack([first, last, count], 1).tolist()
        if any(count and stop - start != count for start, stop, count in table):
            return None
        return [[(start, stop)] if count else [] for start, stop, count in table]

    @cached_property
    def positions(self) -> Tensor:
        """Index of each token among the real tokens of its row or document, -1 at padding: (b or 1, tokens so far)."""
        arguments = self.arguments
        total = max(self.kv_offset + arguments["kv_length"], self.q_offset + arguments["q_length"])
        if self.rule.documents is not None:
            index = torch.arange(total, device=self.device)
            first = torch.ones_like(self.rule.documents, dtype=torch.bool)
            first[:, 1:] = self.rule.documents.diff(dim=1) != 0
            return index - torch.where(first, index, 0).cummax(1).values
        if self.padding is None:
            return torch.arange(total, device=self.device)[None]
        real = torch.nn.functional.pad(self.padding[:, :total], (0, max(0, total - self.padding.shape[1])))
        return (real.cumsum(1) - 1).masked_fill(~real, -1)


@lru_cache(maxsize=1024)
def has_sdpa(config_class: type) -> bool:
    """True if the models of a config support SDPA, or if their module is not loaded."""
    file = config_class.__module__.replace("configuration_", "modeling_")
    found = vars(sys.modules[file]).values() if file in sys.modules else ()
    models = [c for c in found if isinstance(c, type) and issubclass(c, PreTrainedModel) and c.__module__ == file]
    own = [model for model in models if getattr(model, "config_class", None) is config_class]
    return all(model._supports_sdpa for model in own or models)


def efficient_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs,
) -> Tensor | None:
    """The mask function registered as "efficient"; arguments as in `transformers.masking_utils.sdpa_mask`.

    Returns a `LazyMask` if an efficient engine may take over, and otherwise the mask for SDPA.
    """
    arguments = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, **kwargs,
    }  # fmt: skip
    config = kwargs.get("config")
    configured = getattr(config, "efficient_attention", None) is not None
    plain = sdpa_mask if has_sdpa(type(config)) else eager_mask
    if is_traced():
        if configured and kwargs.get("local_size") is not None:  # the mask does not show what its window hides
            raise ValueError(
                "a rule of set_attention cannot be compiled or exported in a model with windows of its own: run the "
                "model without torch.compile, or restore its windows with set_attention(model, None)."
            )
        skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False} if configured else {}
        return plain(**{**arguments, **skip})
    # Gemma 3n and 4 cut queries off a mask; None would then mean causal from the first remaining query on.
    may_be_cut = bool(getattr(config, "num_kv_shared_layers", 0)) and q_length > 1
    if not configured and kv_length <= SHORT_LENGTH and not may_be_cut:
        return plain(**arguments)
    queries = range(int(q_offset), int(q_offset) + q_length)
    keys = range(int(kv_offset), int(kv_offset) + kv_length)
    try:
        if kwargs.get("use_vmap"):
            raise UnknownMask("a mask with custom parts")
        rule = recognise(mask_function)
        if not agrees(rule, mask_function, batch_size, queries, keys, kwargs.get("device", "cpu")):
            raise UnknownMask("a mask that differs from the meaning of its parts")
    except UnknownMask as unknown:
        logger.warning_once(
            f'attn_implementation="efficient" passes layers on to SDPA, because the model asks for {unknown}.'
        )
        return plain(**arguments)
    padding = attention_mask
    if padding is not None:
        seen = padding[:, : queries.stop] if rule.causal else padding
        padding = None if seen.shape[1] >= queries.stop and bool(seen.all()) else padding
    if not configured and rule.is_plain and padding is None and not may_be_cut:
        return plain(**arguments)
    return LazyMask.make(rule, queries.start, keys.start, padding, arguments)
