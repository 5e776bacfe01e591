"""One training task: its data, its model, and a run from the first check of the settings to the card."""

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

    tokenizer: None if the task reads images.
    labels: names of the classes in the training examples; empty if the task has no classes of its own.
    encode: examples of a split, from its name, the longest length that the model sees, and the model.
    notes: what looks like a slip in the data, to be shown before training.
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
        """From functions that load all splits, encode one of them, and count the classes of the training examples."""
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
    """Model and data of a task; `preparation` prepares inputs, and is saved beside the model."""

    model: PreTrainedModel
    max_length: int
    labels: list[str]
    preparation: Any
    collate: Any
    encode: Callable[[str], Any]
    notes: Sequence[str] = ()


S = TypeVar("S", bound=Settings)


class Task(Generic[S]):
    """One kind of training: a subclass says what is its own, `run` and `evaluate_folder` are the same for all."""

    name: str  # in `tasks.TASKS`
    settings_class: type[S]
    auto_class: Any
    task_type: str  # the Hub's name
    unit: str  # what an example is
    collate: Any  # makes a function that puts examples in a batch, from the tokenizer
    scorer: type[Scorer]
    purpose: str  # for the card

    def load(self, settings: S) -> Source:
        raise NotImplementedError

    # --- the same in most tasks

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
        """The model to train; it may add to the tokenizer what the model needs.

        `complete` says that the checkpoint is a finished run, which brings all weights.
        """
        return build_model(settings, config, self.auto_class, complete=complete)

    def longest(self, settings: S, config: PreTrainedConfig) -> int:
        """Tokens of an example that the model sees."""
        return visible_length(settings, config)

    def preparation(self, settings: S, source: Source, config: PreTrainedConfig) -> tuple[Any, Any]:
        """What prepares inputs, and a function that puts examples in a batch."""
        return source.tokenizer, self.collate(source.tokenizer)

    def start(self, settings: S, model: PreTrainedModel, data: Any) -> None:
        """Changes a new model by its training examples, before anything is written."""

    def before_training(
        self, accelerator: Accelerator, settings: S, ready: Ready, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Trains the model on something else first; returns what is to be recorded of it in metrics.json."""
        return {}

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        """For the line that a run begins with."""
        return f"{' / '.join(map(str, sizes))} {self.unit} of up to {ready.max_length} tokens"

    def shown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """Test scores for the card and the screen."""
        return {name: value for name, value in metrics["test"].items() if name not in ("n", "loss")}

    def limits(self, settings: S) -> list[str]:
        """For the card."""
        raise NotImplementedError

    def described(self, settings: S, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        """For the card: the model's purpose, the unit that is counted, limits, and optionally rows of the table."""
        classes = f" Its classes: {', '.join(labels)}." if labels else ""
        return {
            "purpose": f"{self.purpose}{classes}",
            "unit": f"{self.unit} of up to {metrics['model']['max_length']:,} tokens",
            "limits": [
                *self.limits(settings),
                f"The results are of one seed and {metrics['test']['n']:,} test {self.unit}; another seed gives "
                "somewhat different ones.",
            ],
        }

    def mismatch(self, labels: list[str], trained: list[str], folder: Path) -> str:
        return f"The data has the classes {labels} and the model in {folder} has {trained}."

    # --- the same in all tasks

    def run(self, settings: S, command: str = "") -> dict[str, Any]:
        """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
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
                raise InputError(f"The {name} data holds nothing to learn from: no example has anything to predict.")
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
        """Test scores of a finished run, on its own data unless `options` say otherwise, e.g. `--max_length 512`."""
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
        """The model and its data; with the `folder` of a finished run, whose classes the data must have.

        `device` is the one whose memory the model needs; default: the machine's.
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
    """Fields of a config for these classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
