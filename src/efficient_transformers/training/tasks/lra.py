"""Trains a classifier on a task of the Long Range Arena, evaluates it and saves it ready for the Hub.

accelerate launch training/train.py --config configs/listops.yaml --variant full [--NAME VALUE …] [--resume]
python training/evaluate.py runs/listops-full [--max_length 512]

ListOps and Pathfinder are generated, images are Fashion-MNIST's, text is read as bytes (Tay et al. 2020,
arXiv:2011.04006). Retrieval, which has two documents, is the business of match.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedModel

from ..data.fashion_mnist import CLASSES, FOLDER, PIXELS, load_fashion_mnist
from ..data.texts import SPLITS
from ..engine.metrics import OWN_METRICS
from ..engine.task import Source
from ..settings import InputError, ranged
from ..synthetic.generated import Examples, Generator, byte_tokenizer, generate, with_special, word_tokenizer
from ..synthetic.listops import ListOps
from ..synthetic.pathfinder import Pathfinder
from .classify import ClassifySettings, ClassifyTask, labelled_documents
from .self_pretraining import card_row

TASKS = {
    "listops": "ListOps: the digit that a nested list of digits and operators comes to.",
    "pathfinder": "Pathfinder: whether two dots lie at the ends of one dashed path, from a picture's pixels in a row.",
    "fashion_mnist": "Fashion-MNIST: the class of a garment, from the pixels of its picture in a row.",
}
TEXT = "Documents, read as bytes."


@dataclass
class LraSettings(ClassifySettings):
    """The settings of this script; the shared ones are in settings.py, texts.py, documents.py and classify.py.

    `data` is listops, pathfinder, fashion_mnist, or labelled documents, which are read as bytes. What is generated
    follows from `split_seed`.
    """

    long_documents: Literal["windows", "truncate"] = "truncate"  # the paper's protocol
    # default: the paper's number (listops, pathfinder), or all there are
    train_examples: int | None = ranged(None, least=1)
    validation_examples: int | None = ranged(None, least=1)
    test_examples: int | None = ranged(None, least=1)
    cache: str | None = None  # folder for generated examples, which other runs on the same ones then read
    min_tokens: int = ranged(500, least=1)  # listops: a list has more tokens than this,
    max_tokens: int = ranged(2000, least=3)  # and fewer than this
    contour_length: int = ranged(14, least=3, most=16)  # pathfinder: dashes of a long path
    image_folder: str = FOLDER  # fashion_mnist: of its four files

    def check(self) -> None:
        super().check()
        for name in SPLITS:
            if (size := getattr(self, f"{name}_examples")) is not None and self.data not in TASKS:
                raise InputError(
                    f"{name}_examples ({size}) has no use: all documents of {self.data} are taken. Leave it out."
                )
        if self.best_metric not in (known := ("loss", *OWN_METRICS, *self.extra_metrics)):
            raise InputError(f"best_metric ({self.best_metric!r}) must be one of {', '.join(known)}.")
        if self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no use: these tasks are read by the word, the pixel or the byte. "
                "Leave it out, or set task to classify."
            )


def load_source(settings: LraSettings) -> Source:
    if settings.data == "listops":
        generator = ListOps(settings.min_tokens, settings.max_tokens)
        return generated_source(settings, generator, (96_000, 2_000, 2_000))
    if settings.data == "pathfinder":
        # the paper divides 200,000 pictures 8 : 1 : 1
        return generated_source(settings, Pathfinder(settings.contour_length), (160_000, 20_000, 20_000))
    if settings.data == "fashion_mnist":
        images = load_fashion_mnist(settings.image_folder)
        return Source(word_tokenizer(PIXELS, has_cls=True), list(CLASSES), partial(image_rows, settings, images))
    return labelled_documents(settings, byte_tokenizer())


def generated_source(settings: LraSettings, generator: Generator, sizes: tuple[int, int, int]) -> Source:
    def split(name: str, max_length: int, model: PreTrainedModel) -> Examples:
        size = getattr(settings, f"{name}_examples") or sizes[SPLITS.index(name)]
        whole = generate(generator, name, size, settings.split_seed, settings.cache)
        return Examples(whole.ids, whole.labels, max_length)

    return Source(word_tokenizer(generator.words, has_cls=True), list(generator.answers), split)


def image_rows(
    settings: LraSettings, images: dict[str, Any], name: str, max_length: int, model: PreTrainedModel
) -> Examples:
    (pictures, labels), size = images[name], getattr(settings, f"{name}_examples")
    rows = [with_special(picture.ravel(), has_cls=True) for picture in pictures[:size]]
    return Examples(rows, labels[:size].tolist(), max_length)


class LraTask(ClassifyTask):
    name = "lra"
    settings_class = LraSettings
    unit = "sequences"

    def load(self, settings: LraSettings) -> Source:
        return load_source(settings)

    def described(self, settings: LraSettings, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        return {
            "purpose": TASKS.get(settings.data, TEXT),
            "unit": f"sequences of up to {metrics['model']['max_length']:,} tokens",
            "training_rows": card_row(metrics),
            "limits": [
                "A task of the Long Range Arena is made to compare models by: it says little of what they do with "
                "text.",
                f"The results are of one seed and {metrics['test']['n']:,} test examples; another seed gives somewhat "
                "different ones.",
            ],
        }


TASK = LraTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
