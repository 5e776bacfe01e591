"""Train an image classifier, evaluate it on the test split and save it for the Hub.

accelerate launch training/train.py --config configs/pixels.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/pixels-local
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoModelForImageClassification, PreTrainedConfig

from ... import EtImageProcessor
from ...models.base_configuration import EtConfig
from ..data.classes import class_notes
from ..data.images import PictureCollator, PictureSettings, load_pictures
from ..engine.scoring import LabelScorer
from ..engine.task import Ready, Source, Task
from ..settings import InputError


@dataclass
class ClassifyImagesSettings(PictureSettings):
    """Settings of image classification; the shared ones are in settings.py and images.py."""

    best_metric: str = "accuracy"


class ClassifyImagesTask(Task[ClassifyImagesSettings]):
    name = "classify_images"
    settings_class = ClassifyImagesSettings
    auto_class = AutoModelForImageClassification
    task_type = "image-classification"
    unit = "images"
    scorer = LabelScorer

    def load(self, settings: ClassifyImagesSettings) -> Source:
        splits, names = load_pictures(settings)
        counts = Counter(names[label] for label in splits["train"].labels)
        return Source(
            None, names, lambda name, length, model: replace(splits[name], tokens=length), class_notes(counts)
        )

    def preparation(
        self, settings: ClassifyImagesSettings, source: Source, config: PreTrainedConfig
    ) -> tuple[EtImageProcessor, PictureCollator]:
        if not isinstance(config, EtConfig):
            raise InputError(
                f"A {config.model_type} model cannot be trained on images: choose one of the zoo's model types, et_…."
            )
        try:
            processor = EtImageProcessor.for_model(config, **settings.image_processor)
        except ValueError as error:
            raise InputError(f"The model section cannot be used: {error}") from error
        return processor, PictureCollator(processor, config.max_position_embeddings)

    def longest(self, settings: ClassifyImagesSettings, config: PreTrainedConfig) -> int:
        return config.max_position_embeddings  # type: ignore[attr-defined]

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        counts = " / ".join(f"{size:,}" for size in sizes)
        return f"{counts} images of {ready.max_length} tokens; {len(ready.labels)} classes"

    def described(self, settings: ClassifyImagesSettings, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        model, seen = metrics["settings"]["model"], metrics["model"]["max_length"]
        return {
            "purpose": f"A classifier of images into {len(labels)} classes: {', '.join(labels)}.",
            "unit": f"images as sequences of {seen:,} {'patches' if model.get('patch_size', 16) > 1 else 'pixels'}",
            "limits": [
                f"It was trained on {metrics['training']['windows']:,} images of these {len(labels)} classes and "
                "always predicts one of them; images are resized to the size it was trained on.",
                f"The results are from a single seed and {metrics['test']['n']:,} test images.",
            ],
        }


TASK = ClassifyImagesTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
