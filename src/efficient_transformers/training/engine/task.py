"""Base class of a training task: its data, its model, and a run from the checks of the settings to the card."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...cards import description_of
from ..data.classes import class_notes
from ..data.coverage import coverage_lines, recorded
from ..data.features import Features
from ..data.texts import SPLITS, TextSettings, source_of
from ..settings import InputError, Settings
from .batches import lengths_of
from .building import (
    build_config,
    build_model,
    check_memory,
    load_tokenizer,
    make_accelerator,
    model_facts,
    visible_length,
)
from .card import make_card, report
from .lock import hold_for_all
from .loop import train
from .outputs import begin_folder, finish_folder, finished_metrics, finished_settings, hardware, metrics_of
from .scoring import Evaluator, Scorer
from .streaming import Stream


@dataclass
class Source:
    """Data of a task.

    tokenizer: None for images.
    labels: names of the classes in the training examples; empty if the task has no classes.
    encode: returns the examples of a split, given its name, the maximum input length, and the model.
    notes: possible mistakes in the data, shown before training.
    """

    tokenizer: PreTrainedTokenizerBase | None
    labels: list[str]
    encode: Callable[[str, int, PreTrainedModel], Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of_texts(
        cls,
        settings: TextSettings,
        load: Callable[[Any], dict[str, list[Any]]],
        encode: Callable[[list[Any], PreTrainedTokenizerBase, int, Any, Any], Features],
        labels: Callable[[list[Any]], Counter[str]] | None = None,
    ) -> "Source":
        """Create a Source from functions that load all splits, encode one, and count the classes in training data."""
        tokenizer, splits = load_tokenizer(settings), load(settings)
        counts = labels(splits["train"]) if labels else Counter()
        return cls(
            tokenizer,
            sorted(counts),
            lambda name, length, model: encode(splits[name], tokenizer, length, settings, model),
            class_notes(counts),
        )


@dataclass
class Ready:
    """Model and data of a task; `preparation` prepares inputs, and is saved next to the model."""

    model: PreTrainedModel
    max_length: int
    labels: list[str]
    preparation: Any
    collate: Any
    encode: Callable[[str], Any]
    notes: Sequence[str] = ()


S = TypeVar("S", bound=Settings)


class Task(Generic[S]):
    """A kind of training: subclasses define what is specific, `run` and `evaluate_folder` are the same for all."""

    name: str  # in `tasks.TASKS`
    settings_class: type[S]
    auto_class: Any
    task_type: str  # name on the Hub
    unit: str  # name of an example, plural
    collate: Any  # given the tokenizer, returns a function that collates examples into a batch
    scorer: type[Scorer]
    purpose: str  # for the card

    def load(self, settings: S) -> Source:
        raise NotImplementedError

    # --- defaults for most tasks

    def build_config(self, settings: S, tokenizer: PreTrainedTokenizerBase | None, **fields: Any) -> PreTrainedConfig:
        return build_config(settings, tokenizer, **fields)

    def build_model(
        self,
        settings: S,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        complete: bool = False,
    ) -> PreTrainedModel:
        """Build the model to train; may add tokens to the tokenizer.

        `complete`: the checkpoint is a finished run and must contain all weights.
        """
        return build_model(settings, config, self.auto_class, complete=complete)

    def longest(self, settings: S, config: PreTrainedConfig) -> int:
        """Maximum number of tokens per example."""
        return visible_length(settings, config)

    def preparation(self, settings: S, source: Source, config: PreTrainedConfig) -> tuple[Any, Any]:
        """Return the object that prepares inputs, and a function that collates examples into a batch."""
        return source.tokenizer, self.collate(source.tokenizer)

    def start(self, settings: S, model: PreTrainedModel, data: Any) -> None:
        """Initialise parts of a new model from its training examples, before anything is written."""

    def before_training(
        self, accelerator: Accelerator, settings: S, ready: Ready, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Train the model on another objective first; return what metrics.json records about it."""
        return {}

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        """Text for the first line of a run."""
        return f"{' / '.join(map(str, sizes))} {self.unit} of up to {ready.max_length} tokens"

    def shown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Test scores for the card and the screen."""
        return {name: value for name, value in metrics["test"].items() if name not in ("n", "loss")}

    def limits(self, settings: S) -> list[str]:
        """Limits of the model, for the card."""
        raise NotImplementedError

    def described(self, settings: S, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        """For the card: purpose of the model, unit of the examples, limits, and optionally rows of the table."""
        classes = f" Its classes: {', '.join(labels)}." if labels else ""
        return {
            "purpose": f"{self.purpose}{classes}",
            "unit": f"{self.unit} of up to {metrics['model']['max_length']:,} tokens",
            "limits": [
                *self.limits(settings),
                f"The results are from a single seed and {metrics['test']['n']:,} test {self.unit}; they vary somewhat "
                "with the seed.",
            ],
        }

    def mismatch(self, labels: list[str], trained: list[str], folder: Path) -> str:
        return f"The data has the classes {labels}, but the model in {folder} has {trained}."

    # --- shared by all tasks

    def run(self, settings: S, command: str = "") -> dict[str, Any]:
        """Train, evaluate and save; return the contents of `metrics.json`. Raises Stopped after SIGTERM."""
        accelerator = make_accelerator(settings)
        with hold_for_all(accelerator, settings.folder):
            return self._run(accelerator, settings, command)

    def _run(self, accelerator: Accelerator, settings: S, command: str) -> dict[str, Any]:
        if (finished := finished_metrics(accelerator, settings)) is not None:
            return finished
        if settings.best_metric not in (known := self.scorer.all_names(settings)):
            raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(known)}.")

        ready = self.ready(settings, device=accelerator.device)
        data = {name: ready.encode(name) for name in SPLITS}
        sizes = {name: "streamed" if isinstance(split, Stream) else len(split) for name, split in data.items()}
        for name, size in sizes.items():
            if not size:
                raise InputError(f"The {name} data contains nothing to predict, so there is nothing to learn.")
        lengths = {name: lengths_of(split) for name, split in data.items() if not isinstance(split, Stream)}
        check_memory(settings, ready.model.config, lengths, accelerator.device)
        coverage = recorded(data)
        self.start(settings, ready.model, data["train"])
        facts = model_facts(ready.model, ready.max_length)
        validate, test = (
            Evaluator(accelerator, self.scorer(data[name], settings), ready.collate, settings.eval_batch_size)
            for name in ("validation", "test")
        )

        begin_folder(accelerator, settings)
        accelerator.print(
            f"{facts['model_type']}, {facts['parameters']:,} parameters; {self.sizes(list(sizes.values()), ready)}; "
            f"{hardware(accelerator)}"
        )
        for line in (*coverage_lines(coverage), *ready.notes):
            accelerator.print(line)
        learnt = self.before_training(accelerator, settings, ready, data)
        trained, progress = train(accelerator, settings, ready.model, data["train"], ready.collate, validate)
        scores = {
            "test": {**test(trained), **test.scorer.counts()},
            "validation": {**progress.best_scores, **validate.scorer.counts()},
        }
        size = sizes["train"]
        seen = size if isinstance(size, int) else progress.step * settings.step_size(accelerator.num_processes)
        metrics = metrics_of(accelerator, settings, progress, seen, facts, scores, command) | learnt
        metrics |= {"data": coverage} if coverage else {}
        metrics["training"]["data_source"] = source_of(settings.data)
        card = self.card(settings, metrics, description_of(ready.model), ready.labels, command)
        finish_folder(accelerator, settings, trained, ready.preparation, card, metrics)
        report(accelerator, settings, metrics, self.auto_class.__name__, self.shown(metrics))
        return metrics

    def evaluate_folder(self, folder: Path, options: list[str]) -> dict[str, float]:
        """Test scores of a finished run, on its own data unless `options` change it, e.g. `--max_length 512`."""
        settings = finished_settings(self.settings_class, folder, options)
        accelerator = make_accelerator(settings)
        ready = self.ready(settings, folder, accelerator.device)
        scorer = self.scorer(ready.encode("test"), settings)
        for line in coverage_lines(recorded({"test": scorer.data}), incomplete_only=True):
            if accelerator.is_main_process:
                print(line, file=sys.stderr)
        test = Evaluator(accelerator, scorer, ready.collate, settings.eval_batch_size)
        scores = {**test(accelerator.prepare_model(ready.model, evaluation_mode=True)), "n": scorer.counts()["n"]}
        accelerator.print(json.dumps({"max_length": ready.max_length, **scores}))
        return scores

    def ready(self, settings: S, folder: Path | None = None, device: torch.device | None = None) -> Ready:
        """Load model and data; with the `folder` of a finished run, the data must have its classes.

        `device` is the device whose memory the model needs; default: that of the machine.
        """
        self.scorer.check(settings)
        source = self.load(settings)
        config = self.build_config(settings, source.tokenizer, **({} if folder else label_fields(source.labels)))
        if folder and source.labels and source.labels != (trained := list((config.id2label or {}).values())):
            raise InputError(self.mismatch(source.labels, trained, folder))
        preparation, collate = self.preparation(settings, source, config)
        length = self.longest(settings, config)
        check_memory(settings, config, {"test" if folder else "train": [length]}, device)
        set_seed(settings.seed)
        model = self.build_model(settings, config, source.tokenizer, complete=folder is not None)
        return Ready(
            model,
            length,
            source.labels,
            preparation,
            collate,
            lambda name: source.encode(name, length, model),
            source.notes,
        )

    def card(
        self, settings: S, metrics: dict[str, Any], description: str, labels: list[str], command: str
    ) -> ModelCard:
        described = self.described(settings, metrics, labels)
        return make_card(
            settings,
            metrics,
            command or "accelerate launch training/train.py --config settings.yaml",
            task_type=self.task_type,
            auto_class=self.auto_class.__name__,
            description=f"{description}\n\n{described.pop('purpose')}",
            shown=self.shown(metrics),
            **described,
        )


def label_fields(names: list[str]) -> dict[str, Any]:
    """Config fields for these classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
