"""What masked and causal language modelling share: settings, scores, a run from its start to its card.

What each of them does in its own way is a `Task`, in pretrain_mlm.py and pretrain_clm.py.
"""

import inspect
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import ModelCard
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    DataCollatorForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...cards import description_of
from ..data.packing import IGNORED, Packing, RowCollator, Windows
from ..data.texts import TextSettings, load_texts, stream_texts
from ..data.token_cache import Row, cache_file, cached_rows
from ..engine.batches import make_loader
from ..engine.building import build_config, make_accelerator, model_facts, visible_length
from ..engine.card import METRIC_NAMES, make_card, report
from ..engine.command_line import finished_settings
from ..engine.loop import train
from ..engine.outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from ..engine.streaming import Stream
from ..settings import InputError


@dataclass
class LanguageModelSettings(TextSettings):
    """How documents become windows of tokens."""

    packing: Packing = "documents"  # joins documents and cuts full windows; padding: each of one document, and padded;
    # best_fit: as many of these in a row as fit, kept apart by the model
    shortest_window: int = 64  # with padding: a shorter rest of a document is dropped, unless it is the only window

    streaming: bool = False  # read training documents as they are needed, for data that are too many; needs max_steps
    stream_buffer: int = 1000  # of a stream: documents that are cut, and shuffled, together

    def check(self) -> None:
        super().check()
        if self.streaming and self.max_steps is None:
            raise InputError("streaming does not know how long an epoch is: set max_steps.")
        if self.streaming and self.dataloader_num_workers:
            raise InputError(
                f"dataloader_num_workers ({self.dataloader_num_workers}) has no use with streaming, which one process "
                "reads: leave it out."
            )
        if self.stream_buffer < 1:
            raise InputError(f"stream_buffer ({self.stream_buffer}) must be at least 1.")
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss (it orders as perplexity) or accuracy.")


def cut(
    pack: Callable[[list[str]], list[Row]],
    row_class: type[Row],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: LanguageModelSettings,
    how: dict[str, Any],
) -> list[Row]:
    """The windows that `pack` makes of the texts, from the cache if they are there; `how` is what else it follows."""
    how = {**how, "packing": settings.packing, "shortest_window": settings.shortest_window}
    file = cache_file(tokenizer, texts, how, ".npz") if settings.cache_tokens else None
    return cached_rows(file, row_class, lambda: pack(texts))


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


class Evaluator:
    """Loss and accuracy at the predicted tokens of one split, each token counting the same, over all processes."""

    def __init__(self, accelerator: Accelerator, data: Windows, collate: Any, settings: LanguageModelSettings):
        self.accelerator, self.data = accelerator, data
        self.loader = accelerator.prepare(make_loader(data, collate, settings.eval_batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in self.loader:
            labels = batch.pop("labels")
            windows = zip(model(**batch).logits, labels, strict=True)
            sums = torch.stack([window_sums(*self.aligned(*window)) for window in windows])
            # sums of each window, and no logits, are gathered: what fills up the last batch is known by its window
            gathered: Any = self.accelerator.gather_for_metrics(sums)
            totals += gathered.cpu().double().sum(0)
        return self.scores(*totals.tolist())

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A window's logits (n, v), and the labels (n,) that they are to predict."""
        return logits, labels

    def scores(self, loss: float, right: float, count: float) -> dict[str, float]:
        # past e^709 a float ends; a model that has diverged so far is told by its loss
        return {"loss": loss / count, "perplexity": math.exp(min(loss / count, 709)), "accuracy": right / count}


def window_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Of one window: the loss in nats, the tokens predicted rightly, and all that are to be predicted."""
    predicted = labels != IGNORED
    logits, targets = logits[predicted].float(), labels[predicted]
    loss, right = cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1) == targets
    return torch.stack([loss, right.sum(), predicted.sum()])


S = TypeVar("S", bound=LanguageModelSettings)


@dataclass(frozen=True)
class Task(Generic[S]):
    """One kind of language modelling.

    load_tokenizer: from the settings, and texts of which it surely knows some.
    build_model: the model to be trained; it may add to the tokenizer what the model needs.
    make_windows: from the split's name, its texts, the tokenizer, the longest window and the settings.
    describe: rows of the card's table, and limits that it names; from the settings and the metrics.
    start: changes a model by the windows that it is going to be trained on, which are not a stream's.
    """

    script: str
    settings_class: type[S]
    auto_class: Any
    task_type: str  # the Hub's name
    purpose: str
    load_tokenizer: Callable[[S, list[str]], PreTrainedTokenizerBase]
    build_model: Callable[[S, PreTrainedConfig, PreTrainedTokenizerBase], PreTrainedModel]
    make_windows: Callable[[str, list[str], PreTrainedTokenizerBase, int, S], Windows]
    describe: Callable[[S, dict[str, Any]], tuple[dict[str, str], list[str]]]
    evaluator: type[Evaluator] = Evaluator
    start: Callable[[S, PreTrainedModel, Windows], None] | None = None

    def run(self, settings: S, command: str = "") -> dict[str, Any]:
        """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
        accelerator = make_accelerator(settings)
        if (finished := finished_metrics(accelerator, settings)) is not None:
            return finished

        read, texts = stream_texts(settings) if settings.streaming else (None, load_texts(settings))
        known = texts["train"] if read is None else list(itertools.islice(read(), 100))
        tokenizer = self.load_tokenizer(settings, known)
        config = build_config(settings, tokenizer)
        max_length = visible_length(settings, config)
        set_seed(settings.seed)
        model = self.build_model(settings, config, tokenizer)
        check_packing(model, settings)
        data: dict[str, Any] = {
            name: self.make_windows(name, split, tokenizer, max_length, settings) for name, split in texts.items()
        }
        if read is not None:
            passing = replace(settings, cache_tokens=False)
            data["train"] = Stream(
                read,
                lambda part: self.make_windows("train", part, tokenizer, max_length, passing),
                settings.stream_buffer,
                settings.seed,
            )
        elif self.start is not None:
            self.start(settings, model, data["train"])
        facts = model_facts(model, max_length)
        collate = RowCollator(DataCollatorForTokenClassification(tokenizer), tokenizer.padding_side)
        validate = self.evaluator(accelerator, data["validation"], collate, settings)
        test = self.evaluator(accelerator, data["test"], collate, settings)

        begin_folder(accelerator, settings)
        lengths = [] if isinstance(data["train"], Stream) else data["train"].lengths()
        training = "streamed" if read else len(lengths)
        accelerator.print(
            f"{config.model_type}, {facts['parameters']:,} parameters; {training} / {len(data['validation'])} / "
            f"{len(data['test'])} windows of up to {max_length} tokens; {hardware(accelerator)}"
        )
        trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
        scores = {
            name: {**values, "n": len(data[name]), **data[name].counts()}
            for name, values in (("test", test(trained)), ("validation", progress.best_scores))
        }
        seen = len(lengths) or progress.step * settings.step_size(accelerator.num_processes)
        metrics = metrics_of(accelerator, settings, progress, seen, facts, scores, command)
        card = self.card(settings, metrics, description_of(model), command)
        finish_folder(accelerator, settings, trained, tokenizer, card, metrics)
        report(accelerator, settings, metrics, self.auto_class.__name__, shown(metrics))
        return metrics

    def card(self, settings: S, metrics: dict[str, Any], description: str, command: str) -> ModelCard:
        windows = {
            "documents": "documents joined and cut, without padding",
            "padding": "of one document each, padded",
            "best_fit": "rows of documents, or pieces of longer ones, that do not read each other",
        }[settings.packing]
        full = settings.packing == "documents"
        rows, limits = self.describe(settings, metrics)
        return make_card(
            settings,
            metrics,
            command or f"accelerate launch training/{self.script} --config settings.yaml",
            task_type=self.task_type,
            auto_class=self.auto_class.__name__,
            description=f"{description}\n\n{self.purpose}",
            shown=shown(metrics),
            unit=f"windows of {'' if full else 'up to '}{metrics['model']['max_length']:,} tokens",
            training_rows={
                "windows": windows,
                **rows,
            },
            limits=[*limits, "It has seen no more than this training data and repeats its slant."],
        )

    def evaluate_folder(self, folder: Path, overrides: list[str]) -> dict[str, float]:
        """Test scores of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
        settings = finished_settings(self.settings_class, folder, overrides)
        accelerator = make_accelerator(settings)
        texts = load_texts(settings)["test"]
        tokenizer = self.load_tokenizer(settings, texts)
        config = build_config(settings, tokenizer)
        max_length = visible_length(settings, config)
        model = self.build_model(settings, config, tokenizer)
        check_packing(model, settings)
        data = self.make_windows("test", texts, tokenizer, max_length, settings)
        collate = RowCollator(DataCollatorForTokenClassification(tokenizer), tokenizer.padding_side)
        test = self.evaluator(accelerator, data, collate, settings)
        scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": len(data)}
        accelerator.print(json.dumps({"max_length": max_length, **scores}))
        return scores


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics["test"].items() if name in METRIC_NAMES}
