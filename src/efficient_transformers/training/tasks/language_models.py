"""Masked and causal language modelling: shared settings, windows of tokens, scores and the card."""

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
    """Settings for the conversion of documents to windows of tokens."""

    packing: Packing = "documents"  # joins documents and cuts full windows; padding: one document per window, padded;
    # best_fit: as many documents in a row as fit, separated by the model
    # with padding: a shorter remainder of a document is dropped, unless it is the only window
    shortest_window: int = ranged(64, least=1)

    streaming: bool = False  # read training documents on demand, for data that do not fit in memory; needs max_steps
    stream_buffer: int = ranged(1000, least=1)  # number of streamed documents that are cut and shuffled together

    def check(self) -> None:
        super().check()
        if self.streaming and self.max_steps is None:
            raise InputError("streaming does not know how long an epoch is: set max_steps.")
        if self.streaming and self.dataloader_num_workers:
            raise InputError(
                f"dataloader_num_workers ({self.dataloader_num_workers}) has no effect with streaming, which reads in "
                "one process: omit it."
            )
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss (same order as perplexity) or accuracy.")


def cut(
    pack: Pack[Row],
    row_class: type[Row],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: LanguageModelSettings,
    how: dict[str, Any],
) -> tuple[list[Row], Coverage]:
    """Return the windows of the texts, from the cache if possible, and their coverage of the texts.

    `how` has all other settings that the windows depend on.
    """
    how = {**how, "packing": settings.packing, "shortest_window": settings.shortest_window}
    file = cache_file(tokenizer, texts, how) if settings.cache_tokens else None
    return cached_rows(pack, row_class, texts, file)


@torch.no_grad()
def check_packing(model: PreTrainedModel, settings: LanguageModelSettings) -> None:
    """Raise InputError if rows contain several documents but the model does not compute the same as for each alone.

    Most models of transformers do not: they detect documents only if there is no padding mask.
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
            f"packing ('best_fit') needs a model that separates the documents of a row by their position_ids, but in a "
            f"{model.config.model_type} model they attend to each other: set packing to padding, or use a model of "
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
        """Load the tokenizer; `texts` are some of the training texts."""
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
            "padding": "one document each, padded",
            "best_fit": "rows of documents, or pieces of longer ones, that do not attend to each other",
        }[settings.packing]
        full = settings.packing == "documents"
        slant = "It was trained only on this data and reproduces its biases."
        if "checkpoint" in settings.model:
            slant = "It reproduces the biases of this training data, and of the data its checkpoint was trained on."
        rows, limits = self.describe(settings, metrics)
        return {
            "purpose": self.purpose,
            "unit": f"windows of {'' if full else 'up to '}{metrics['model']['max_length']:,} tokens",
            "training_rows": {"windows": windows, **rows},
            "limits": [*limits, slant],
        }
