"""What masked and causal language modelling share: settings, windows of tokens, scores and the card."""

import inspect
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import DataCollatorForTokenClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.coverage import Coverage
from ..data.packing import Packing, RowCollator, Windows
from ..data.texts import TextSettings, load_texts, stream_texts
from ..data.token_cache import Pack, Row, cache_file, cached_rows
from ..engine.card import METRIC_NAMES
from ..engine.scoring import TokenScorer
from ..engine.streaming import Stream
from ..engine.task import Source, Task
from ..settings import InputError, ranged


@dataclass
class LanguageModelSettings(TextSettings):
    """How documents become windows of tokens."""

    packing: Packing = "documents"  # joins documents and cuts full windows; padding: each of one document, and padded;
    # best_fit: as many of these in a row as fit, kept apart by the model
    # with padding: a shorter rest of a document is dropped, unless it is the only window
    shortest_window: int = ranged(64, least=1)

    streaming: bool = False  # read training documents as they are needed, for data that are too many; needs max_steps
    stream_buffer: int = ranged(1000, least=1)  # of a stream: documents that are cut, and shuffled, together

    def check(self) -> None:
        super().check()
        if self.streaming and self.max_steps is None:
            raise InputError("streaming does not know how long an epoch is: set max_steps.")
        if self.streaming and self.dataloader_num_workers:
            raise InputError(
                f"dataloader_num_workers ({self.dataloader_num_workers}) has no use with streaming, which one process "
                "reads: leave it out."
            )
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss (it orders as perplexity) or accuracy.")


def cut(
    pack: Pack[Row],
    row_class: type[Row],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: LanguageModelSettings,
    how: dict[str, Any],
) -> tuple[list[Row], Coverage]:
    """The windows that `pack` makes of the texts, from the cache if they are there, and how much of these they show.

    `how` is what else they follow from.
    """
    how = {**how, "packing": settings.packing, "shortest_window": settings.shortest_window}
    file = cache_file(tokenizer, texts, how) if settings.cache_tokens else None
    return cached_rows(pack, row_class, texts, file)


@torch.no_grad()
def check_packing(model: PreTrainedModel, settings: LanguageModelSettings) -> None:
    """Raises InputError if rows hold several documents and the model does not make of each what it makes of it alone.

    Most of transformers' models do not: they look for documents only where there is no mask of padding.
    """
    if settings.packing != "best_fit":
        return
    length = min(16, (getattr(model.config, "max_position_embeddings", None) or 16) // 2)
    ids = torch.arange(2 * length, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(length, device=model.device).repeat(1, 2)
    apart = "position_ids" in inspect.signature(model.forward).parameters
    if apart:
        together = model.eval()(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits.float()
        alone = model(ids.view(2, -1)).logits.float().flatten(0, 1)[None]
        apart = torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * alone.std().item())
    if not apart:
        raise InputError(
            f"packing ('best_fit') needs a model that keeps the documents of a row apart by their position_ids, and a "
            f"{model.config.model_type} model lets them read each other: set packing to padding, or take a model of "
            "this zoo."
        )


class PerplexityScorer(TokenScorer):
    """Scores of a language model at the predicted tokens."""

    def scores(self, found: list[list[float]]) -> dict[str, float]:
        scores = super().scores(found)
        # math.exp overflows past 709; the loss itself shows such a divergence
        return {
            "loss": scores["loss"],
            "perplexity": math.exp(min(scores["loss"], 709)),
            "accuracy": scores["accuracy"],
        }

    def counts(self) -> dict[str, int]:
        return {**super().counts(), **self.data.counts()}


S = TypeVar("S", bound=LanguageModelSettings)


class LanguageModelTask(Task[S]):
    unit = "windows"
    scorer = PerplexityScorer

    def load_tokenizer(self, settings: S, texts: list[str]) -> PreTrainedTokenizerBase:
        """The tokenizer; `texts` are some of those that it is for."""
        raise NotImplementedError

    def make_windows(
        self, name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, settings: S
    ) -> Windows:
        """The windows of a split, or of a part of the stream of training texts."""
        raise NotImplementedError

    def describe(self, settings: S, metrics: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
        """Rows of the card's table, and limits."""
        raise NotImplementedError

    def load(self, settings: S) -> Source:
        if settings.streaming:
            read, texts = stream_texts(settings)
            known = list(itertools.islice(read(), 100))
        else:
            read, texts = None, load_texts(settings)
            known = texts["train"]
        tokenizer = self.load_tokenizer(settings, known)

        def encode(name: str, length: int, model: PreTrainedModel) -> Windows | Stream:
            if name != "train" or read is None:
                return self.make_windows(name, texts[name], tokenizer, length, settings)
            passing = replace(settings, cache_tokens=False)
            return Stream(
                read,
                lambda part: self.make_windows(name, part, tokenizer, length, passing),
                settings.stream_buffer,
                settings.seed,
            )

        return Source(tokenizer, [], encode)

    def build_model(
        self, settings: S, config: PreTrainedConfig, tokenizer: Any, *, complete: bool = False
    ) -> PreTrainedModel:
        model = super().build_model(settings, config, tokenizer, complete=complete)
        check_packing(model, settings)
        return model

    def preparation(self, settings: S, source: Source, config: PreTrainedConfig) -> tuple[Any, Any]:
        tokenizer: Any = source.tokenizer
        return tokenizer, RowCollator(DataCollatorForTokenClassification(tokenizer), tokenizer.padding_side)

    def shown(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {name: value for name, value in metrics["test"].items() if name in METRIC_NAMES}

    def described(self, settings: S, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        windows = {
            "documents": "documents joined and cut, without padding",
            "padding": "of one document each, padded",
            "best_fit": "rows of documents, or pieces of longer ones, that do not read each other",
        }[settings.packing]
        full = settings.packing == "documents"
        slant = "It has seen no more than this training data and repeats its slant."
        if "checkpoint" in settings.model:
            slant = "It repeats the slant of this training data, and of what its checkpoint was trained on."
        rows, limits = self.describe(settings, metrics)
        return {
            "purpose": self.purpose,
            "unit": f"windows of {'' if full else 'up to '}{metrics['model']['max_length']:,} tokens",
            "training_rows": {"windows": windows, **rows},
            "limits": [*limits, slant],
        }
