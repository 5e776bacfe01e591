"""Trains a document classifier, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/train.py --config configs/era.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/era-local [--max_length 512]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ..data.documents import DocumentSettings, encode_documents, load_documents
from ..engine.building import load_tokenizer, visible_length
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
    )


class ClassifyTask(Task[ClassifySettings]):
    name = "classify"
    settings_class = ClassifySettings
    auto_class = AutoModelForSequenceClassification
    task_type = "text-classification"
    unit = "windows"
    collate = DataCollatorWithPadding
    scorer = LabelScorer

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
        return {
            "purpose": f"A classifier of documents into {len(labels)} classes: {', '.join(labels)}.",
            "unit": f"windows of {window_length:,} tokens{cut}" if window_length else "documents",
            "training_rows": card_row(metrics),
            "limits": [
                f"It has learnt these {len(labels)} classes from {metrics['training']['windows']:,} training examples "
                "and knows no answer outside them.",
                f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
                "different ones, and windows of one document are not independent of each other.",
            ],
        }


TASK = ClassifyTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
