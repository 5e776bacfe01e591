"""Labelled images: Fashion-MNIST from the Debian package, a folder of pictures, or a dataset on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from sklearn.model_selection import train_test_split
from transformers import BaseImageProcessor

from ..settings import InputError, Settings, find_path, ranged
from .fashion_mnist import CLASSES, FOLDER, read_fashion_mnist

FASHION_MNIST = "fashion_mnist"
SPLITS = ("train", "validation", "test")
PROCESSOR_FIELDS = ("image_mean", "image_std", "do_normalize", "rescale_factor", "resample")


@dataclass
class PictureSettings(Settings):
    """Settings for labelled images."""

    image_folder: str = FOLDER  # for fashion_mnist: the folder of its four files
    image_column: str = "image"
    label_column: str = "label"
    # share of the training images for each split without images of its own
    held_out: float = ranged(0.05, above=0, below=0.5, why="it is a share of the images")
    image_processor: dict[str, Any] = field(default_factory=dict)  # fields, e.g. image_mean; default: -1 to 1

    def check(self) -> None:
        super().check()
        for name in self.image_processor:
            if name not in PROCESSOR_FIELDS:
                raise InputError(
                    f"image_processor has the field {name!r}, but only {', '.join(PROCESSOR_FIELDS)} are allowed: the "
                    "sizes are those of the model."
                )


@dataclass
class Pictures:
    """Images and the indices of their labels."""

    images: Sequence[Any]  # inputs of an image processor
    labels: list[int]
    tokens: int = 0  # per image, in the model

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.labels[index]

    @property
    def lengths(self) -> list[int]:
        return [self.tokens] * len(self)

    def some(self, indices: Sequence[int]) -> "Pictures":
        return Pictures([self.images[i] for i in indices], [self.labels[i] for i in indices])


def load_pictures(settings: PictureSettings) -> tuple[dict[str, Pictures], list[str]]:
    """Load all three splits and the names of the labels; missing splits are cut from the training images."""
    splits, names = _read_fashion_mnist(settings) if settings.data == FASHION_MNIST else _read_data_set(settings)
    held = round(settings.held_out * len(splits["train"]))
    for name in SPLITS[1:]:
        if name not in splits:
            whole = splits["train"]
            if held < len(names) or len(whole) - held < len(names):
                raise InputError(
                    f"{len(whole)} images of {len(names)} classes are too few to cut a {name} split from: add images, "
                    "raise held_out, or provide images for the split."
                )
            kept, kept_out = train_test_split(
                range(len(whole)), test_size=held, random_state=settings.split_seed, stratify=whole.labels
            )
            splits["train"], splits[name] = whole.some(sorted(kept)), whole.some(sorted(kept_out))
    return {name: splits[name] for name in SPLITS}, names


def _read_fashion_mnist(settings: PictureSettings) -> tuple[dict[str, Pictures], list[str]]:
    splits = read_fashion_mnist(settings.image_folder)
    # add an axis for the single channel
    return {name: Pictures(list(x[..., None]), y.tolist()) for name, (x, y) in splits.items()}, list(CLASSES)


def _read_data_set(settings: PictureSettings) -> tuple[dict[str, Pictures], list[str]]:
    """Read a folder with a subfolder per class, optionally in a folder per split; or a dataset on the Hub."""
    where = find_path(settings.data)
    try:
        if where is None:
            loaded: Any = datasets.load_dataset(settings.data, settings.data_config)
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=str(where))
    except Exception as error:  # errors of the Hub and of broken pictures have no common class
        raise InputError(
            f"data ({settings.data!r}) is neither {FASHION_MNIST} nor a folder of pictures here, and could not be "
            f"loaded from the Hub: {error}"
        ) from error
    if "train" not in loaded:
        raise InputError(f"The data {settings.data} has no split 'train'; it has {', '.join(map(str, loaded))}.")
    for setting in ("image_column", "label_column"):
        if (name := getattr(settings, setting)) not in loaded["train"].features:
            there = ", ".join(loaded["train"].features)
            raise InputError(f"The data {settings.data} has no column {name!r}; there are: {there}. Set {setting}.")
    label = loaded["train"].features[settings.label_column]
    if not isinstance(label, datasets.ClassLabel):
        raise InputError(
            f"The column {settings.label_column!r} of {settings.data} must name classes, but it is {label}: choose "
            "another with label_column."
        )
    splits = {
        split: Pictures(loaded[split][settings.image_column], loaded[split][settings.label_column])
        for split in SPLITS
        if split in loaded
    }
    return splits, label.names


class PictureCollator:
    """Batches for image classification heads."""

    def __init__(self, processor: BaseImageProcessor, tokens: int):
        self.processor, self.tokens = processor, tokens

    def __call__(self, examples: list[tuple[Any, int]]) -> dict[str, torch.Tensor]:
        images, labels = zip(*examples, strict=True)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        every = torch.ones(len(images), self.tokens, dtype=torch.long)  # used by the training loop to count tokens
        return {"pixel_values": pixels, "labels": torch.tensor(labels), "attention_mask": every}
