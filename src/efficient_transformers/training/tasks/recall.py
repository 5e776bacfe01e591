"""Trains a model to recall, on generated sequences, measures it on others and saves it ready for the Hub.

accelerate launch training/train.py --config configs/mqar.yaml --variant full [--NAME VALUE …] [--resume]
python training/evaluate.py runs/mqar-full [--max_length 128]

The tasks are MQAR, copying, induction heads and a needle in real documents: see synthetic/recall.py.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedModel,
)

from ..data.texts import TextSettings, load_texts
from ..engine.building import load_tokenizer
from ..engine.scoring import TokenScorer
from ..engine.task import Ready, Source, Task
from ..settings import InputError, did_you_mean
from ..synthetic.generated import Examples, Generator, OneOf, generate, word_tokenizer
from ..synthetic.recall import Copy, Induction, Mqar, Needle

GENERATED = {
    "mqar": "Multi-query associative recall: the value that stood behind a key, where the key stands again.",
    "copy": "Copying: the first tokens of a sequence, at its end.",
    "induction": "Induction heads: what stood behind a mark, where the mark stands again.",
}
NEEDLE = "A needle in a haystack: a fact planted in a document, asked for at its end."
TASKS = {**GENERATED, "needle": NEEDLE}


@dataclass
class RecallSettings(TextSettings):
    """The settings of this script; the shared ones are in settings.py. `data` is the task.

    A sequence has `max_length` tokens, or as many as the model can take. The data follow from `split_seed`.
    """

    train_examples: int = 100_000
    validation_examples: int = 1_000
    test_examples: int = 3_000
    items: int = 4  # pairs of key and value (mqar), symbols to be copied, facts (needle)
    vocabulary: int = 8192  # different tokens (mqar, copy, induction)
    power: float = 0.01  # of the law of the gaps in front of the queries (mqar)
    min_length: int | None = None  # half of the training sequences and more are short: this long, twice, four times, …
    haystack: str = "era"  # documents to hide a needle in: a bundled corpus, a file, a folder or a Hub name

    def check(self) -> None:
        super().check()
        if self.data not in TASKS:
            raise InputError(f"data ({self.data!r}) must be one of {', '.join(TASKS)}{did_you_mean(self.data, TASKS)}.")
        for name in ("train_examples", "validation_examples", "test_examples", "items"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.vocabulary < 4:
            raise InputError(f"vocabulary ({self.vocabulary}) must be at least 4.")
        if self.min_length is not None:
            if self.data not in GENERATED:
                raise InputError(f"min_length ({self.min_length}) has no use: {self.data} has documents. Leave it out.")
            if most_items(self.data, self.min_length) < 1:
                raise InputError(f"min_length ({self.min_length}) leaves no room for an item of {self.data}: raise it.")
        if self.data in GENERATED and self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no use: {self.data} makes its own words. Leave it out."
            )
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss or accuracy.")


def most_items(task: str, length: int) -> int:
    """How many items a generated sequence has room for."""
    return {"mqar": length // 4, "copy": (length - 1) // 2, "induction": length // 3}[task]


def make_generator(settings: RecallSettings, length: int, items: int | None = None) -> Generator:
    """Of a task that needs no documents."""
    items = items or settings.items
    if settings.data == "mqar":
        return Mqar(length, items, settings.vocabulary, settings.power)
    if settings.data == "copy":
        return Copy(length, items, settings.vocabulary)
    assert settings.data == "induction"
    return Induction(length, settings.vocabulary)


def training_generator(settings: RecallSettings, length: int) -> Generator:
    """With `min_length`, of sequences of that length, of twice that, and so on up to `length`, equally often.

    What is learnt of short sequences is found in long ones: with 8, 16 and 32 tokens beside them, full attention learns
    MQAR of 64 tokens in hundreds of steps instead of thousands.
    """
    full = make_generator(settings, length)
    if settings.min_length is None:
        return full
    shorter = []
    while (short := settings.min_length * 2 ** len(shorter)) < length:
        shorter.append(make_generator(settings, short, min(settings.items, most_items(settings.data, short))))
    return OneOf((*shorter, full))


def load_task(settings: RecallSettings) -> Source:
    """Tokenizer and names of the answers, which do not depend on the length, and the examples, which do."""
    if settings.data == "needle":
        tokenizer = load_tokenizer(settings)
        answers: list[str] = list(Needle.answers)
        # documents of one split, and so the windows of one document, are in no other
        texts = load_texts(dataclasses.replace(settings, data=settings.haystack))
    else:
        any_length = make_generator(settings, 4 * settings.items + 3)
        tokenizer, answers = word_tokenizer(any_length.words, has_cls=False), list(any_length.answers)
        texts = {}

    def examples(name: str, length: int, model: PreTrainedModel) -> Examples:
        if settings.data == "needle":
            generator: Generator = Needle(tokenizer, texts[name], length, settings.items)
        else:
            generator = (training_generator if name == "train" else make_generator)(settings, length)
        return generate(generator, name, getattr(settings, f"{name}_examples"), settings.split_seed)

    return Source(tokenizer, answers, examples)


class RecallTask(Task[RecallSettings]):
    name = "recall"
    settings_class = RecallSettings
    auto_class = AutoModelForTokenClassification
    task_type = "token-classification"
    unit = "sequences"
    collate = DataCollatorForTokenClassification
    scorer = TokenScorer  # the labels are at the positions that ask

    def load(self, settings: RecallSettings) -> Source:
        return load_task(settings)

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        return f"{' / '.join(map(str, sizes))} sequences of {ready.max_length} tokens; {len(ready.labels)} answers"

    def described(self, settings: RecallSettings, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        return {
            "purpose": TASKS[settings.data],
            "unit": f"sequences of {metrics['model']['max_length']:,} tokens",
            "limits": [
                f"It knows this task and its {len(labels):,} answers alone: it is made to compare models by.",
                "Accuracy is that of the positions that ask; every other position is labelled, too, and means nothing.",
                "The results are of one seed; another seed may learn the task or fail to.",
            ],
        }

    def mismatch(self, labels: list[str], trained: list[str], folder: Path) -> str:
        return (
            f"The task has {len(labels)} answers and the model in {folder} has {len(trained)}, or others: leave data "
            "and vocabulary as they were."
        )


TASK = RecallTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
