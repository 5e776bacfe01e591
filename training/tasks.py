"""What the tasks with labelled examples share beyond the loop: features, scores, a run from its start to its card.

What each of them does in its own way is a `Task`, in tag_tokens.py, answer.py, choose.py and match.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from batches import make_loader
from building import build_config, build_model, load_tokenizer, make_accelerator, model_facts, visible_length
from command_line import finished_settings
from huggingface_hub import ModelCard
from loop import train
from outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of
from reporting import make_card, report
from settings import InputError
from texts import TextSettings
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from efficient_transformers.cards import description_of


class Features(Dataset):
    """Windows as a data set: `rows` are what the model gets of each, `notes` what an evaluation knows of it besides,
    and `shared` what it knows of all."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], notes: Sequence[Any] = (), shared: Any = None):
        self.rows, self.notes, self.shared = rows, notes, shared

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {key: value.astype(np.int64) if isinstance(value, np.ndarray) else value for key, value in row.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each, of the longest where one has several sequences."""
        first = (row["input_ids"] for row in self.rows)
        return [max(map(len, ids)) if isinstance(ids, list) else len(ids) for ids in first]


class Scorer:
    """Scores of one split: what is found in each window, then what all of it says."""

    names: ClassVar[tuple[str, ...]]  # of the scores, besides the loss

    def __init__(self, data: Features, settings: Any):
        self.data, self.settings = data, settings

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """What the scores need of each window of a batch: no tensor, so that it can be gathered from all processes."""
        raise NotImplementedError

    def scores(self, found: list[Any]) -> dict[str, float]:
        """From what was found in all windows, in their order."""
        raise NotImplementedError


class Evaluator:
    """Scores of a model on one split, over all processes."""

    def __init__(self, accelerator: Accelerator, scorer: Scorer, collate: Any, batch_size: int):
        self.accelerator, self.scorer = accelerator, scorer
        self.loader = accelerator.prepare(make_loader(scorer.data, collate, batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        found: list[Any] = []
        for batch in self.loader:
            windows: Any = self.scorer.judge(model(**batch), batch)
            found += self.accelerator.gather_for_metrics(windows, use_gather_object=True)
        assert len(found) == len(self.scorer.data)
        return self.scorer.scores(found)


S = TypeVar("S", bound=TextSettings)


@dataclass(frozen=True)
class Task(Generic[S]):
    """One kind of labelled task.

    load: the examples of all splits.
    encode: a split's features, from its examples, the tokenizer, the longest window, the settings and the model.
    collate: makes a function that puts features in a batch, from the tokenizer.
    labels: names of the classes, from the training examples; None where a task has no classes of its own.
    limits: for the card, from the settings.
    """

    script: str
    settings_class: type[S]
    auto_class: Any
    task_type: str  # the Hub's name
    purpose: str
    unit: str  # what a feature is
    load: Callable[[S], dict[str, list[Any]]]
    encode: Callable[[list[Any], PreTrainedTokenizerBase, int, S, PreTrainedModel], Features]
    collate: Callable[[PreTrainedTokenizerBase], Any]
    scorer: type[Scorer]
    limits: Callable[[S], list[str]]
    labels: Callable[[list[Any]], list[str]] | None = None
    build_config: Callable[..., PreTrainedConfig] = build_config
    build_model: Callable[..., Any] = build_model

    def run(self, settings: S, command: str = "") -> dict[str, Any]:
        """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
        accelerator = make_accelerator(settings)
        if (finished := finished_metrics(accelerator, settings)) is not None:
            return finished
        known = ("loss", *self.scorer.names)
        if settings.best_metric not in known:
            raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(known)}.")

        tokenizer = load_tokenizer(settings)
        examples = self.load(settings)
        names = self.labels(examples["train"]) if self.labels else []
        config = self.build_config(settings, tokenizer, **label_fields(names))
        max_length = visible_length(settings, config)
        set_seed(settings.seed)
        model = self.build_model(settings, config, self.auto_class)
        data = {name: self.encode(split, tokenizer, max_length, settings, model) for name, split in examples.items()}
        for name, features in data.items():
            if not len(features):
                raise InputError(f"The {name} data holds nothing to learn from: no example has anything to predict.")
        facts = model_facts(model, max_length)
        collate = self.collate(tokenizer)
        validate, test = (
            Evaluator(accelerator, self.scorer(data[name], settings), collate, settings.eval_batch_size)
            for name in ("validation", "test")
        )

        begin_folder(accelerator, settings)
        sizes = " / ".join(str(len(features)) for features in data.values())
        accelerator.print(
            f"{config.model_type}, {facts['parameters']:,} parameters; {sizes} {self.unit} of up to {max_length} "
            f"tokens; {hardware(accelerator)}"
        )
        lengths = data["train"].lengths
        trained, progress = train(accelerator, settings, model, data["train"], lengths, collate, validate)
        scores = {
            "test": {**test(trained), "n": len(data["test"])},
            "validation": {**progress.best_scores, "n": len(data["validation"])},
        }
        metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command)
        card = self.card(settings, metrics, description_of(model), names, command)
        finish_folder(accelerator, settings, trained, tokenizer, card, metrics)
        report(accelerator, settings, metrics, self.auto_class.__name__, self.shown(metrics))
        return metrics

    def shown(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {name: metrics["test"][name] for name in self.scorer.names}

    def card(self, settings: S, metrics: dict[str, Any], description: str, names: list[str], command: str) -> ModelCard:
        classes = f" Its classes: {', '.join(names)}." if names else ""
        return make_card(
            settings,
            metrics,
            command or f"accelerate launch training/{self.script} --config settings.yaml",
            task_type=self.task_type,
            auto_class=self.auto_class.__name__,
            description=f"{description}\n\n{self.purpose}{classes}",
            shown=self.shown(metrics),
            unit=f"{self.unit} of up to {metrics['model']['max_length']:,} tokens",
            limits=[
                *self.limits(settings),
                f"The results are of one seed and {metrics['test']['n']:,} test {self.unit}; another seed gives "
                "somewhat different ones.",
            ],
        )

    def evaluate_folder(self, folder: Path, overrides: list[str]) -> dict[str, float]:
        """Test scores of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
        settings = finished_settings(self.settings_class, folder, overrides)
        accelerator = make_accelerator(settings)
        tokenizer = load_tokenizer(settings)
        config = self.build_config(settings, tokenizer)
        examples = self.load(settings)
        names, trained = self.labels(examples["train"]) if self.labels else [], list((config.id2label or {}).values())
        if self.labels and names != trained:
            raise InputError(f"The data has the classes {names} and the model in {folder} has {trained}.")
        max_length = visible_length(settings, config)
        model = self.build_model(settings, config, self.auto_class)
        data = self.encode(examples["test"], tokenizer, max_length, settings, model)
        scorer = self.scorer(data, settings)
        test = Evaluator(accelerator, scorer, self.collate(tokenizer), settings.eval_batch_size)
        scores = {**test(accelerator.prepare_model(model, evaluation_mode=True)), "n": len(data)}
        accelerator.print(json.dumps({"max_length": max_length, **scores}))
        return scores


def label_fields(names: list[str]) -> dict[str, Any]:
    """What a config knows of its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
