"""Trains a tagger of words, evaluates it on the test split and saves it ready for the Hub.

accelerate launch training/tag_tokens.py --config configs/case/local.yaml [key=value …] [--resume]
python training/tag_tokens.py --evaluate runs/case-local [max_length=512]
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from ..data.packing import IGNORED
from ..engine.command_line import command_line
from ..engine.metrics import EntityF1
from ..engine.task import Scorer, Source, Task
from .tagging import TagSettings, load_tagged, tag_names, tag_windows


class TagScorer(Scorer):
    """Loss, accuracy and the F1 of entities, at one token of each word; an entity may reach over windows."""

    names = ("f1", "precision", "recall", "accuracy")

    def judge(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[tuple[float, list[int], list[int]]]:
        found = []
        for logits, labels in zip(outputs.logits.float(), batch["labels"], strict=True):
            logits, labels = logits[labels != IGNORED], labels[labels != IGNORED]
            loss = cross_entropy(logits, labels, reduction="sum").item()
            found.append((loss, logits.argmax(-1).tolist(), labels.tolist()))
        return found

    def scores(self, found: list[tuple[float, list[int], list[int]]]) -> dict[str, float]:
        losses, predictions, references = zip(*found, strict=True)
        # the windows of a document stand in its order, and each of its words is in one of them
        documents: dict[int, tuple[list[int], list[int]]] = {}
        for index, ours, theirs in zip(self.data.notes, predictions, references, strict=True):
            whole = documents.setdefault(index, ([], []))
            whole[0].extend(ours)
            whole[1].extend(theirs)
        tags = [
            [[self.data.shared[tag] for tag in row] for row in rows] for rows in zip(*documents.values(), strict=True)
        ]
        entities = EntityF1(keep_in_memory=True).compute(predictions=tags[0], references=tags[1])
        return {"loss": sum(losses) / sum(map(len, references)), **(entities or {})}


class TagTask(Task[TagSettings]):
    script = "tag_tokens.py"
    settings_class = TagSettings
    auto_class = AutoModelForTokenClassification
    task_type = "token-classification"
    unit = "windows"
    collate = DataCollatorForTokenClassification
    scorer = TagScorer
    purpose = "A tagger: a class for every word."

    def load(self, settings: TagSettings) -> Source:
        return Source.of_texts(settings, load_tagged, tag_windows, tag_names)

    def limits(self, settings: TagSettings) -> list[str]:
        case = settings.examples == "case"
        made = "It restores the case of English text in lower case and without punctuation at the words' ends: START "
        made += "is the first word of a sentence, NAME a run of capitalised words."
        return [
            "The first token of a word carries its tag; those of its other tokens mean nothing.",
            *([made] if case else ["It knows no tag outside of those that its training data has."]),
        ]


TASK = TagTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder


def main(arguments: list[str] | None = None) -> None:
    command_line(TASK.script, __doc__, TASK.settings_class, run, evaluate_folder, arguments)
