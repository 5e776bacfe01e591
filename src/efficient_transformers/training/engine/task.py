"""What the tasks with labelled examples share beyond the loop: features, scores, a run from its start to its card.

What each of them does in its own way is a `Task`, in its script.
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
from huggingface_hub import ModelCard
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...cards import description_of
from ..data.texts import SPLITS, TextSettings
from ..settings import InputError, Settings
from .batches import make_loader
from .building import build_config, build_model, load_tokenizer, make_accelerator, model_facts, visible_length
from .card import make_card, report
from .command_line import finished_settings
from .loop import train
from .metrics import OWN_METRICS, compute_metrics, load_metrics
from .outputs import begin_folder, finish_folder, finished_metrics, hardware, metrics_of


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

    def __init__(self, data: Any, settings: Any):
        self.data, self.settings = data, settings

    @classmethod
    def all_names(cls, settings: Any) -> tuple[str, ...]:
        return ("loss", *cls.names)

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """What the scores need of each window of a batch: no tensor, so that it can be gathered from all processes."""
        raise NotImplementedError

    def scores(self, found: list[Any]) -> dict[str, float]:
        """From what was found in all windows, in their order."""
        raise NotImplementedError


class LabelScorer(Scorer):
    """Loss and metrics of examples with one label each; `extra_metrics` of the settings are the user's."""

    names = tuple(OWN_METRICS)

    def __init__(self, data: Any, settings: Any):
        super().__init__(data, settings)
        self.metrics = load_metrics(getattr(settings, "extra_metrics", ()), self.names)

    @classmethod
    def all_names(cls, settings: Any) -> tuple[str, ...]:
        return (*super().all_names(settings), *getattr(settings, "extra_metrics", ()))

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[float, int, int]]:
        """The loss, the class that is predicted and the true one."""
        logits, labels = outputs.logits.float(), batch["labels"]
        losses = cross_entropy(logits, labels, reduction="none")
        return list(zip(losses.tolist(), logits.argmax(-1).tolist(), labels.tolist(), strict=True))

    def scores(self, found: list[tuple[float, int, int]]) -> dict[str, float]:
        losses, predictions, references = zip(*found, strict=True)
        return {"loss": sum(losses) / len(losses), **compute_metrics(self.metrics, predictions, references)}


class Evaluator:
    """Scores of a model on one split, over all processes."""

    def __init__(self, accelerator: Accelerator, scorer: Scorer, collate: Any, batch_size: int):
        self.accelerator, self.scorer, self.size = accelerator, scorer, len(scorer.data)
        self.loader = accelerator.prepare(make_loader(scorer.data, collate, batch_size))

    @torch.inference_mode()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        found: list[Any] = []
        for batch in self.loader:
            # without the labels, from which a model makes a loss that nobody reads
            outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
            windows: Any = self.scorer.judge(outputs, batch)
            found += self.accelerator.gather_for_metrics(windows, use_gather_object=True)
        assert len(found) == self.size
        return self.scorer.scores(found)


@dataclass
class Source:
    """What a task learns from.

    tokenizer: none, where it reads images.
    labels: names of its classes, those of the training examples; none, where it has no classes of its own.
    encode: a split's examples, by its name, from the longest length that the model sees, and the model.
    """

    tokenizer: PreTrainedTokenizerBase | None
    labels: list[str]
    encode: Callable[[str, int, PreTrainedModel], Any]

    @classmethod
    def of_texts(
        cls,
        settings: TextSettings,
        load: Callable[[Any], dict[str, list[Any]]],
        encode: Callable[[list[Any], PreTrainedTokenizerBase, int, Any, Any], Features],
        labels: Callable[[list[Any]], list[str]] | None = None,
    ) -> "Source":
        """From functions that load all splits, encode one of them, and name the classes of the training examples."""
        tokenizer, splits = load_tokenizer(settings), load(settings)
        names = labels(splits["train"]) if labels else []
        return cls(
            tokenizer, names, lambda name, length, model: encode(splits[name], tokenizer, length, settings, model)
        )


@dataclass
class Ready:
    """A task's model and data; `preparation` is what prepares inputs, and is saved beside the model."""

    model: PreTrainedModel
    max_length: int
    labels: list[str]
    preparation: Any
    collate: Any
    encode: Callable[[str], Any]


S = TypeVar("S", bound=Settings)


class Task(Generic[S]):
    """One kind of labelled task: what is its own, and a run that is the same for all."""

    script: str
    settings_class: type[S]
    auto_class: Any
    task_type: str  # the Hub's name
    unit: str  # what an example is
    collate: Any  # makes a function that puts examples in a batch, from the tokenizer
    scorer: type[Scorer]
    purpose: str  # for the card

    def load(self, settings: S) -> Source:
        raise NotImplementedError

    def limits(self, settings: S) -> list[str]:
        """For the card."""
        raise NotImplementedError

    # --- what most tasks do in the same way

    def build_config(self, settings: S, tokenizer: PreTrainedTokenizerBase | None, **fields: Any) -> PreTrainedConfig:
        return build_config(settings, tokenizer, **fields)

    def build_model(self, settings: S, config: PreTrainedConfig) -> Any:
        return build_model(settings, config, self.auto_class)

    def longest(self, settings: S, config: PreTrainedConfig) -> int:
        """Tokens of an example that the model sees."""
        return visible_length(settings, config)

    def preparation(self, settings: S, source: Source, config: PreTrainedConfig) -> tuple[Any, Any]:
        """What prepares inputs, and a function that puts examples in a batch."""
        return source.tokenizer, self.collate(source.tokenizer)

    def learn_before(
        self, accelerator: Accelerator, settings: S, ready: Ready, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the model learns in front of its labels, and what metrics.json is to hold of it."""
        return {}

    def sizes(self, sizes: list[int], ready: Ready) -> str:
        """For the line that a run begins with."""
        return f"{' / '.join(map(str, sizes))} {self.unit} of up to {ready.max_length} tokens"

    def described(self, settings: S, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        """For the card: what the model is for, what is counted, its limits, and perhaps rows of the table."""
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

    # --- what all tasks do in the same way

    def ready(self, settings: S, folder: Path | None = None) -> Ready:
        """The model and its data; of a finished run, if its `folder` is given: the data must have its classes."""
        source = self.load(settings)
        config = self.build_config(settings, source.tokenizer, **({} if folder else label_fields(source.labels)))
        if folder and source.labels and source.labels != (trained := list((config.id2label or {}).values())):
            raise InputError(self.mismatch(source.labels, trained, folder))
        preparation, collate = self.preparation(settings, source, config)
        length = self.longest(settings, config)
        set_seed(settings.seed)
        model = self.build_model(settings, config)
        return Ready(
            model, length, source.labels, preparation, collate, lambda name: source.encode(name, length, model)
        )

    def run(self, settings: S, command: str = "") -> dict[str, Any]:
        """Trains, evaluates and saves; returns what `metrics.json` holds. Raises Stopped after SIGTERM."""
        accelerator = make_accelerator(settings)
        if (finished := finished_metrics(accelerator, settings)) is not None:
            return finished
        if settings.best_metric not in (known := self.scorer.all_names(settings)):
            raise InputError(f"best_metric ({settings.best_metric!r}) must be one of {', '.join(known)}.")

        ready = self.ready(settings)
        data = {name: ready.encode(name) for name in SPLITS}
        for name, examples in data.items():
            if not len(examples):
                raise InputError(f"The {name} data holds nothing to learn from: no example has anything to predict.")
        facts = model_facts(ready.model, ready.max_length)
        validate, test = (
            Evaluator(accelerator, self.scorer(data[name], settings), ready.collate, settings.eval_batch_size)
            for name in ("validation", "test")
        )

        begin_folder(accelerator, settings)
        sizes = self.sizes([len(examples) for examples in data.values()], ready)
        accelerator.print(
            f"{facts['model_type']}, {facts['parameters']:,} parameters; {sizes}; {hardware(accelerator)}"
        )
        learnt = self.learn_before(accelerator, settings, ready, data)
        lengths = lengths_of(data["train"])
        trained, progress = train(accelerator, settings, ready.model, data["train"], lengths, ready.collate, validate)
        scores = {
            "test": {**test(trained), "n": test.size},
            "validation": {**progress.best_scores, "n": validate.size},
        }
        metrics = metrics_of(accelerator, settings, progress, len(lengths), facts, scores, command) | learnt
        card = self.card(settings, metrics, description_of(ready.model), ready.labels, command)
        finish_folder(accelerator, settings, trained, ready.preparation, card, metrics)
        report(accelerator, settings, metrics, self.auto_class.__name__, shown(metrics))
        return metrics

    def card(
        self, settings: S, metrics: dict[str, Any], description: str, labels: list[str], command: str
    ) -> ModelCard:
        described = self.described(settings, metrics, labels)
        return make_card(
            settings,
            metrics,
            command or f"accelerate launch training/{self.script} --config settings.yaml",
            task_type=self.task_type,
            auto_class=self.auto_class.__name__,
            description=f"{description}\n\n{described.pop('purpose')}",
            shown=shown(metrics),
            **described,
        )

    def evaluate_folder(self, folder: Path, overrides: list[str]) -> dict[str, float]:
        """Test scores of a finished run, on its own data unless `overrides` say otherwise, e.g. `max_length=512`."""
        settings = finished_settings(self.settings_class, folder, overrides)
        accelerator = make_accelerator(settings)
        ready = self.ready(settings, folder)
        scorer = self.scorer(ready.encode("test"), settings)
        test = Evaluator(accelerator, scorer, ready.collate, settings.eval_batch_size)
        scores = {**test(accelerator.prepare_model(ready.model, evaluation_mode=True)), "n": test.size}
        accelerator.print(json.dumps({"max_length": ready.max_length, **scores}))
        return scores


def lengths_of(data: Any) -> list[int]:
    """Tokens of each example."""
    return data.lengths if hasattr(data, "lengths") else [len(ids) for ids in data["input_ids"]]


def shown(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics["test"].items() if name not in ("n", "loss")}


def label_fields(names: list[str]) -> dict[str, Any]:
    """What a config knows of its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
