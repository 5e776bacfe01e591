"""Train a model on recall with generated sequences, evaluate it on others and save it for the Hub.

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
from ..settings import InputError, did_you_mean, ranged
from ..synthetic.generated import Examples, Generator, OneOf, generate, word_tokenizer
from ..synthetic.recall import Copy, Induction, Mqar, Needle

GENERATED = {
    "mqar": "Multi-query associative recall: when a key occurs again, predict the value that followed it.",
    "copy": "Copying: repeat the first tokens of a sequence at its end.",
    "induction": "Induction heads: when a mark occurs again, predict the token that followed it.",
}
NEEDLE = "A needle in a haystack: recall a fact inserted into a document, at its end."
TASKS = {**GENERATED, "needle": NEEDLE}


@dataclass
class RecallSettings(TextSettings):
    """Settings of the recall tasks; settings.py has the shared ones. `data` is the task.

    A sequence has `max_length` tokens, or the maximum length of the model. The data depend on `split_seed`.
    """

    train_examples: int = ranged(100_000, least=1)
    validation_examples: int = ranged(1_000, least=1)
    test_examples: int = ranged(3_000, least=1)
    items: int = ranged(4, least=1)  # key-value pairs (mqar), symbols to copy, facts (needle)
    vocabulary: int = ranged(8192, least=4)  # number of different tokens (mqar, copy, induction)
    power: float = ranged(0.01, least=0)  # exponent of the power law of the gaps before the queries (mqar)
    # if set, training also uses this length, twice, four times, … up to max_length
    min_length: int | None = ranged(None, least=1)
    haystack: str = "era"  # documents to hide a needle in: a bundled corpus, a file, a folder or a dataset on the Hub

    def check(self) -> None:
        super().check()
        if self.data not in TASKS:
            raise InputError(f"data ({self.data!r}) must be one of {', '.join(TASKS)}{did_you_mean(self.data, TASKS)}.")
        if self.min_length is not None:
            if self.data not in GENERATED:
                raise InputError(f"min_length ({self.min_length}) has no effect: {self.data} uses documents. Omit it.")
            if most_items(self.data, self.min_length) < 1:
                raise InputError(
                    f"min_length ({self.min_length}) is too short for an item of {self.data}: increase it."
                )
        if self.data in GENERATED and self.tokenizer is not None:
            raise InputError(
                f"tokenizer ({self.tokenizer!r}) has no effect: {self.data} generates its own words. Omit it."
            )
        if self.best_metric not in ("loss", "accuracy"):
            raise InputError(f"best_metric ({self.best_metric!r}) must be loss or accuracy.")


def most_items(task: str, length: int) -> int:
    """Maximum number of items in a generated sequence."""
    return {"mqar": length // 4, "copy": (length - 1) // 2, "induction": length // 3}[task]


def make_generator(settings: RecallSettings, length: int, items: int | None = None) -> Generator:
    """The generator of a task without documents."""
    items = items or settings.items
    if settings.data == "mqar":
        return Mqar(length, items, settings.vocabulary, settings.power)
    if settings.data == "copy":
        return Copy(length, items, settings.vocabulary)
    assert settings.data == "induction"
    return Induction(length, settings.vocabulary)


def training_generator(settings: RecallSettings, length: int) -> Generator:
    """A generator of training sequences: with `min_length`, of that length, twice that, and so on, equally often.

    What is learned on short sequences transfers to long ones: with additional lengths of 8, 16 and 32 tokens, full
    attention learns MQAR of 64 tokens in hundreds of steps instead of thousands.
    """
    full = make_generator(settings, length)
    if settings.min_length is None:
        return full
    shorter = []
    while (short := settings.min_length * 2 ** len(shorter)) < length:
        shorter.append(make_generator(settings, short, min(settings.items, most_items(settings.data, short))))
    return OneOf((*shorter, full))


def load_task(settings: RecallSettings) -> Source:
    """The tokenizer and the names of the answers, which do not depend on the length, and the examples, which do."""
    if settings.data == "needle":
        tokenizer = load_tokenizer(settings)
        answers: list[str] = list(Needle.answers)
        # the documents of a split, and so all windows of a document, are in no other split
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
    scorer = TokenScorer  # the labels are at the query positions

    def load(self, settings: RecallSettings) -> Source:
        return load_task(settings)

    def sizes(self, sizes: list[int | str], ready: Ready) -> str:
        return f"{' / '.join(map(str, sizes))} sequences of {ready.max_length} tokens; {len(ready.labels)} answers"

    def described(self, settings: RecallSettings, metrics: dict[str, Any], labels: list[str]) -> dict[str, Any]:
        return {
            "purpose": TASKS[settings.data],
            "unit": f"sequences of {metrics['model']['max_length']:,} tokens",
            "limits": [
                f"It was trained only on this task and its {len(labels):,} answers, in order to compare models.",
                "Accuracy is that at the query positions; its predictions at other positions are meaningless.",
                "The results are from a single seed; with another seed, the model may learn the task or fail to.",
            ],
        }

    def mismatch(self, labels: list[str], trained: list[str], folder: Path) -> str:
        return (
            f"The task has {len(labels)} answers, but the model in {folder} has {len(trained)}, or different ones: use "
            "the same data and vocabulary."
        )


TASK = RecallTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
