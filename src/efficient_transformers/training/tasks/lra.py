"""Train a classifier on a task of the Long Range Arena, evaluate it and save it for the Hub.

accelerate launch training/train.py --config configs/listops.yaml --variant full [--NAME VALUE …] [--resume]
python training/evaluate.py runs/listops-full [--max_length 512]

ListOps and Pathfinder are generated, images are those of Fashion-MNIST, texts are encoded as bytes (Tay et al. 2020,
arXiv:2011.04006). Retrieval, with pairs of documents, is in match.py.
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
    "listops": "ListOps: the digit that a nested list of digits and operators evaluates to.",
    "pathfinder": "Pathfinder: are two dots at the ends of the same dashed path? From the sequence of pixels.",
    "fashion_mnist": "Fashion-MNIST: the class of a garment, from the sequence of pixels of its picture.",
}
TEXT = "Classification of documents encoded as bytes."


@dataclass
class LraSettings(ClassifySettings):
    """Settings of the Long Range Arena; the shared ones are in settings.py, texts.py, documents.py and classify.py.

    `data` is listops, pathfinder, fashion_mnist, or labelled documents, which are encoded as bytes. Generated data
    depend on `split_seed`.
    """

    long_documents: Literal["windows", "truncate"] = "truncate"  # the paper's protocol
    # default: the number in the paper (listops, pathfinder), or all examples
    train_examples: int | None = ranged(None, least=1)
    validation_examples: int | None = ranged(None, least=1)
    test_examples: int | None = ranged(None, least=1)
    cache: str | None = None  # folder for generated examples, shared by runs on the same examples
    min_tokens: int = ranged(500, least=1)  # listops: a list has more tokens than this,
    max_tokens: int = ranged(2000, least=3)  # and fewer than this
    contour_length: int = ranged(14, least=3, most=16)  # pathfinder: dashes of a long path
    image_folder: str = FOLDER  # for fashion_mnist: the folder of its four files

    def check(self) -> None:
        super().check()
        for name in SPLITS:
            if (size := getattr(self, f"{name}_examples")) is not None and self.data not in TASKS:
                raise InputError(
                    f"{name}_examples ({size}) has no effect: all documents of {self.data} are used. Omit it."
                )
        if self.best_metric not in (known := ("loss", *OWN_METRICS, *self.extra_metrics)):
            raise InputError(f"best_metric ({self.best_metric!r}) must be one of {', '.join(known)}.")
        if self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no effect: the tokens of these tasks are words, pixels or bytes. "
                "Omit it, or set task to classify."
            )


def load_source(settings: LraSettings) -> Source:
    if settings.data == "listops":
        generator = ListOps(settings.min_tokens, settings.max_tokens)
        return generated_source(settings, generator, (96_000, 2_000, 2_000))
    if settings.data == "pathfinder":
        # the paper splits 200,000 pictures 8 : 1 : 1
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
                "Tasks of the Long Range Arena compare models; they say little about performance on natural text.",
                f"The results are from a single seed and {metrics['test']['n']:,} test examples; they vary somewhat "
                "with the seed.",
            ],
        }


TASK = LraTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
