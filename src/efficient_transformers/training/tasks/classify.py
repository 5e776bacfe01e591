"""Trains a document classifier, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/train.py --config configs/era.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/era-local [--max_length 512]
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..data.classes import class_notes
from ..data.documents import DocumentSettings, encode_documents, load_documents
from ..engine.building import load_tokenizer, visible_length
from ..engine.metrics import compute_metrics
from ..engine.scoring import LabelScorer
from ..engine.task import Ready, Source, Task
from .self_pretraining import SelfPretrainingSettings, card_row, self_pretrain


@dataclass
class ClassifySettings(DocumentSettings, SelfPretrainingSettings):
    """The settings of this script; the shared ones are in settings.py, texts.py, documents.py, self_pretraining.py."""

    best_metric: str = "accuracy"
    extra_metrics: list[str] = field(default_factory=list)  # names for `evaluate.load`, which needs the network


def labelled_documents(settings: DocumentSettings, tokenizer: PreTrainedTokenizerBase) -> Source:
    documents = load_documents(settings)
    return Source(
        tokenizer,
        documents.labels,
        lambda name, length, model: encode_documents(documents, name, tokenizer, length, settings),
        class_notes(Counter(documents.splits["train"][1])),
    )


class DocumentScorer(LabelScorer):
    """Loss and metrics of documents, whose windows' logits are averaged; with `window_length`, of windows."""

    def __init__(self, data: Any, settings: Any):
        super().__init__(data, settings)
        self.documents: list[int] | None = None if settings.window_length else getattr(data, "documents", None)

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Any]:
        """Logits and true class of each window."""
        if self.documents is None:
            return super().judge(outputs, batch)
        return list(zip(outputs.logits.float().tolist(), batch["labels"].tolist(), strict=True))

    def scores(self, found: list[Any]) -> dict[str, float]:
        if self.documents is None:
            return super().scores(found)
        windows: dict[int, list[int]] = {}
        for index, document in enumerate(self.documents):
            windows.setdefault(document, []).append(index)
        logits = torch.stack([torch.tensor([found[i][0] for i in own]).mean(0) for own in windows.values()])
        labels = torch.tensor([found[own[0]][1] for own in windows.values()])
        scores = compute_metrics(self.metrics, logits.argmax(-1).tolist(), labels.tolist())
        return {"loss": cross_entropy(logits, labels).item(), **scores}

    def counts(self) -> dict[str, int]:
        return super().counts() if self.documents is None else {"n": len(set(self.documents))}


class ClassifyTask(Task[ClassifySettings]):
    name = "classify"
    settings_class = ClassifySettings
    auto_class = AutoModelForSequenceClassification
    task_type = "text-classification"
    unit = "windows"
    collate = DataCollatorWithPadding
    scorer = DocumentScorer

    def load(self, settings: ClassifySettings) -> Source:
        return labelled_documents(settings, load_tokenizer(settings))

    def longest(self, settings: ClassifySettings, config: PreTrainedConfig) -> int:
        return visible_length(settings, config, default=settings.window_length)

    def before_training(
        self, accelerator: Accelerator, settings: ClassifySettings, ready: Ready, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        learnt = self_pretrain(accelerator, settings, ready.model, data, ready.preparation)
        return {} if learnt is None else {"self_pretraining": learnt}

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        return f"{super().sizes(sizes, ready)}; {len(ready.labels)} classes"

    def described(self, settings: ClassifySettings, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        max_length, window_length = metrics["model"]["max_length"], settings.window_length
        is_cut = window_length and max_length < window_length
        cut = f", of which the model sees the first {max_length:,}" if is_cut else ""
        if window_length:
            unit, note = f"windows of {window_length:,} tokens{cut}", "windows of one document are not independent"
        elif settings.long_documents == "truncate":
            unit, note = f"documents, of which the model sees the first {max_length:,} tokens", ""
        else:
            unit, note = f"windows of up to {max_length:,} tokens, which together show the whole documents", ""
        return {
            "purpose": f"A classifier of documents into {len(labels)} classes: {', '.join(labels)}.",
            "unit": unit,
            **({} if window_length else {"test_unit": "documents"}),
            **({"averaged": True} if not window_length and settings.long_documents == "windows" else {}),
            "training_rows": card_row(metrics),
            "limits": [
                f"It has learnt these {len(labels)} classes from {metrics['training']['windows']:,} training examples "
                "and knows no answer outside them.",
                f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
                f"different ones{f', and {note} of each other' if note else ''}.",
            ],
        }


TASK = ClassifyTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
