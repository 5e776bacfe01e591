"""Train a model that predicts whether two documents match, evaluate it on the test split and save it.

accelerate launch training/train.py --config configs/president.yaml --variant local [--NAME VALUE …] [--resume]
python training/evaluate.py runs/president-local [--max_length 512]

Each document is encoded separately, so that the vectors of many documents can be stored: the head of LRA's retrieval
task. In the output folder, the encoder is an ordinary checkpoint; `DocumentMatcher.from_pretrained` opens it with its
head.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from transformers import (
    AutoModel,
    DataCollatorForMultipleChoice,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ...folders import read_json
from ..data.coverage import Coverage
from ..data.excerpts import excerpts
from ..data.features import Features
from ..data.texts import BUNDLED, Row, TextSettings, load_splits, text_of, value_of
from ..engine.building import build_model
from ..engine.task import Source, Task
from ..settings import InputError, find_path, ranged
from .choose import ChoiceScorer

HEAD, HEAD_SIZES = "matching_head.safetensors", "matching_head.json"  # next to the encoder's files
CLASSES = ["different", "same"]
Interaction = Literal["nli", "concat"]


@dataclass
class MatchSettings(TextSettings):
    """Settings for pairs of documents, and for the head."""

    examples: Literal["columns", "same"] = "columns"  # same: derived from the text column, see `same_or_not`
    first_column: str = "text1"
    second_column: str = "text2"
    label_column: str = "label"  # 1 for a match, 0 otherwise
    group_column: str = "name"  # for `same`: the property that two documents may share
    excerpt_words: int = ranged(600, least=1)  # for `same`: minimum length
    mask_digits: bool = False  # replace every digit by 0, so that years do not reveal the answer
    interaction: Interaction = "nli"
    head_size: int = ranged(256, least=2)


@dataclass
class Pair:
    texts: tuple[str, str]
    label: int


def load_pairs(settings: MatchSettings) -> dict[str, list[Pair]]:
    """Load all three splits. Pairs are made within a split, so no document occurs in both training and test pairs."""
    if settings.examples == "columns":
        splits = load_splits(settings, lambda row: _pair(row, settings), label_column=settings.label_column)
    else:
        documents = load_splits(settings, lambda row: (text_of(row, settings), _group_of(row, settings)))
        splits = {
            name: same_or_not(documents[name], np.random.default_rng((settings.split_seed, split)), settings)
            for split, name in enumerate(documents)
        }
    for name, pairs in splits.items():
        if {pair.label for pair in pairs} != {0, 1}:
            raise InputError(f"The {name} data must contain both pairs that match and pairs that do not.")
    return splits


def _pair(row: Row, settings: MatchSettings) -> Pair:
    texts = value_of(row, "first_column", settings), value_of(row, "second_column", settings)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"Both documents must be text, but {row[0]} has {text!r}.")
    label = value_of(row, "label_column", settings)
    if str(label) not in ("0", "1"):
        raise InputError(f"The column {settings.label_column!r} must be 1 (a match) or 0, but {row[0]} has {label!r}.")
    return Pair(texts, int(label))


def _group_of(row: Row, settings: MatchSettings) -> str:
    group = value_of(row, "group_column", settings)
    if group is None or group == "":
        raise InputError(f"The column {settings.group_column!r} must name a group, but {row[0]} has {group!r}.")
    return str(group)


def same_or_not(documents: Sequence[tuple[str, str]], rng: np.random.Generator, settings: MatchSettings) -> list[Pair]:
    """Pairs of excerpts from documents of the same group or not; never from the same document, which would be too easy.

    An excerpt from a group with another document yields two pairs, each with a random excerpt: one of another document
    in the group, and one of another group.
    """
    pieces = [
        (text, document, group)
        for document, (whole, group) in enumerate(documents)
        for text in excerpts(whole, settings.excerpt_words)
    ]
    owners, groups = (np.array([piece[i] for piece in pieces]) for i in (1, 2))
    found = []
    for text, document, group in pieces:
        same = np.flatnonzero((groups == group) & (owners != document))
        other = np.flatnonzero(groups != group)
        if len(same) and len(other):
            found.append(Pair((text, pieces[int(rng.choice(same))][0]), 1))
            found.append(Pair((text, pieces[int(rng.choice(other))][0]), 0))
    return found


def pair_rows(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: MatchSettings,
    model: Any,
) -> Features:
    rows, coverage = [], Coverage()
    added = tokenizer.num_special_tokens_to_add()
    for pair in pairs:
        texts = [re.sub(r"\d", "0", text) if settings.mask_digits else text for text in pair.texts]
        encoded = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
        rows.append({**encoded, "labels": pair.label})
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            seen = whole = len(ids) - added
            if len(ids) == max_length:  # possibly truncated
                whole = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            coverage.add(whole, seen)
    return Features(rows, coverage=coverage)


class MatchingHead(nn.Module):
    """An MLP over two vectors, their product and their difference: x₁, x₂, x₁·x₂, x₁ − x₂.

    The head of LRA's retrieval task (Tay et al. 2020, arXiv:2011.04006), as in its code: two hidden layers with ReLU,
    of which the second is half as wide. Product and difference are the `NLI` interaction of that code; the script
    published with the paper omits them (`concat`).
    """

    def __init__(self, hidden_size: int, head_size: int, interaction: Interaction = "nli"):
        super().__init__()
        self.interaction: Interaction = interaction
        self.sizes = {"hidden_size": hidden_size, "head_size": head_size, "interaction": interaction}
        self.mlp = nn.Linear(hidden_size * (4 if interaction == "nli" else 2), head_size)
        self.mlp2 = nn.Linear(head_size, head_size // 2)
        self.logits = nn.Linear(head_size // 2, len(CLASSES))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map the vectors of both documents, (b, e), to logits (b, 2)."""
        features = [first, second, first * second, first - second][: 4 if self.interaction == "nli" else 2]
        return self.logits(relu(self.mlp2(relu(self.mlp(torch.cat(features, dim=-1))))))


class DocumentMatcher(nn.Module):
    """One encoder for both documents, and a MatchingHead.

    transformers has no Auto class for pairs that are encoded separately. `save_pretrained` saves the encoder as an
    ordinary checkpoint, which AutoModel opens, and the head in files next to it; `from_pretrained` opens both.
    """

    def __init__(self, encoder: PreTrainedModel, head: MatchingHead):
        super().__init__()
        self.encoder, self.head = encoder, head

    @property
    def config(self) -> PreTrainedConfig:
        return self.encoder.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """All inputs have an axis for the two documents, (b, 2, n); labels are (b,)."""
        flat = {name: value.flatten(0, 1) for name, value in {"input_ids": input_ids, **inputs}.items()}
        # the paper's head uses the pooled states; here, as in the other heads, they first pass the pooler's layer
        pooled = self.encoder(**flat).pooler_output.unflatten(0, (-1, 2))  # (b, 2, e)
        logits = self.head(*pooled.unbind(1))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save to a local folder; `state_dict` replaces that of this module if it is sharded across processes."""
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
        for name, value in (self.state_dict() if state_dict is None else state_dict).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.encoder.save_pretrained(folder, state_dict=parts["encoder"])
        save_file(parts["head"], Path(folder, HEAD))
        Path(folder, HEAD_SIZES).write_text(json.dumps(self.head.sizes) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **keywords: Any) -> "DocumentMatcher":
        """Load from a local folder; `keywords` are passed to AutoModel, e.g. `trust_remote_code`."""
        return cls(AutoModel.from_pretrained(folder, **keywords), load_head(Path(folder)))


def load_head(folder: Path) -> MatchingHead:
    try:
        head = MatchingHead(**read_json(folder / HEAD_SIZES))
        head.load_state_dict(load_file(folder / HEAD))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The head in {folder} ({HEAD_SIZES}, {HEAD}) cannot be loaded: {error}") from error
    return head


def build_matcher(
    settings: MatchSettings, config: PreTrainedConfig, auto_class: Any, complete: bool = False
) -> DocumentMatcher:
    """Build a new model, or load a checkpoint with its head if there is one that fits; with `complete`, it must fit."""
    encoder = build_model(settings, config, auto_class, complete=complete)
    folder = find_path(settings.model.get("checkpoint") or "")
    wanted = MatchingHead(config.hidden_size, settings.head_size, settings.interaction)
    if "checkpoint" in settings.model and folder is not None and (folder / HEAD).exists():
        saved = load_head(folder)
        if saved.sizes == wanted.sizes:
            return DocumentMatcher(encoder, saved)
        if complete:
            raise InputError(
                f"The head of {folder} has {saved.sizes}, but the settings have {wanted.sizes}: fix these."
            )
        PartialState().print(f"New head with {wanted.sizes}: that of {folder} has {saved.sizes}.")
    elif complete:
        raise InputError(f"{folder} has no {HEAD}, the head of the trained model: copy the folder again.")
    for parameter in wanted.parameters():
        parameter.newly_initialized = "checkpoint" in settings.model  # type: ignore[attr-defined]
    return DocumentMatcher(encoder, wanted)


class MatchTask(Task[MatchSettings]):
    name = "match"
    settings_class = MatchSettings
    auto_class = AutoModel
    task_type = "text-classification"
    unit = "pairs"
    collate = DataCollatorForMultipleChoice  # pads inputs with a second axis, here of two documents
    scorer = ChoiceScorer
    purpose = "It encodes two documents separately and predicts whether they match."

    def load(self, settings: MatchSettings) -> Source:
        return Source.of_texts(settings, load_pairs, pair_rows)

    def build_model(
        self,
        settings: MatchSettings,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        complete: bool = False,
    ) -> DocumentMatcher:
        return build_matcher(settings, config, self.auto_class, complete)

    def limits(self, settings: MatchSettings) -> list[str]:
        made = f"Its pairs have the same {settings.group_column!r} or not, in excerpts of texts that are not in the "
        made += "training data, but mostly from groups that are."
        made += " Many groups can be distinguished by time and topic." if settings.data in BUNDLED else ""
        return [
            "The head is in matching_head.safetensors. `DocumentMatcher.from_pretrained`, from "
            "`efficient_transformers.training.tasks.match`, loads both; AutoModel loads only the encoder.",
            *([made] if settings.examples == "same" else []),
        ]


TASK = MatchTask()
run, evaluate_folder = TASK.run, TASK.evaluate_folder
