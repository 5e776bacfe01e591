"""Train a document classifier, evaluate it on the test split and save it for the Hub.

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
    """Settings of classification; the shared ones are in settings.py, texts.py, documents.py, self_pretraining.py."""

    best_metric: str = "accuracy"
    extra_metrics: list[str] = field(default_factory=list)  # names for `evaluate.load`; needs a network connection


def labelled_documents(settings: DocumentSettings, tokenizer: PreTrainedTokenizerBase) -> Source:
    documents = load_documents(settings)
    return Source(
        tokenizer,
        documents.labels,
        lambda name, length, model: encode_documents(documents, name, tokenizer, length, settings),
        class_notes(Counter(documents.splits["train"][1])),
    )


class DocumentScorer(LabelScorer):
    """Loss and metrics of documents, with the logits of their windows averaged; with `window_length`, of windows."""

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
        cut = f", of which only the first {max_length:,} are used" if is_cut else ""
        if window_length:
            unit, note = f"windows of {window_length:,} tokens{cut}", "windows of one document are not independent"
        elif settings.long_documents == "truncate":
            unit, note = f"documents, of which only the first {max_length:,} tokens are used", ""
        else:
            unit, note = f"windows of up to {max_length:,} tokens, which together cover the whole documents", ""
        return {
            "purpose": f"A classifier of documents with {len(labels)} classes: {', '.join(labels)}.",
            "unit": unit,
            **({} if window_length else {"test_unit": "documents"}),
            **({"averaged": True} if not window_length and settings.long_documents == "windows" else {}),
            "training_rows": card_row(metrics),
            "limits": [
                f"It was trained on {metrics['training']['windows']:,} examples of these {len(labels)} classes and "
                "always predicts one of them.",
                f"The results are from a single seed and {metrics['test']['n']:,} test examples; they vary somewhat "
                f"with the seed{f', and {note}' if note else ''}.",
            ],
        }


TASK = ClassifyTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
