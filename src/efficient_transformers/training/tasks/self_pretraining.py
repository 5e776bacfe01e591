"""Self-pretraining: the body of a classifier is first trained to denoise the training inputs of its own task.

Amos et al. 2023 (arXiv:2310.02980): masked denoising for bidirectional models, causal denoising for causal ones.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence, Sized
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.masking import MaskedWindows, Masker, RemaskedWindows
from ..data.packing import IGNORED, NO_WORD, Window, Windows
from ..engine.checkpoints import writing
from ..engine.loop import train
from ..engine.outputs import CHECKPOINTS, write_whole
from ..engine.scoring import Evaluator, NextTokenScorer, TokenScorer
from ..engine.sharding import whole_state
from ..settings import InputError, Settings, ranged

FOLDER, BODY, RECORD = "self-pretraining", "body.safetensors", "record.json"


@dataclass
class SelfPretrainingSettings(Settings):
    """Setting one of the first two enables self-pretraining."""

    # over the training inputs, before training with labels
    self_pretrain_epochs: int | None = ranged(None, least=1, why="omit it for no self-pretraining")
    # optimizer steps; replaces self_pretrain_epochs
    self_pretrain_steps: int | None = ranged(None, least=1, why="omit it for no self-pretraining")
    self_pretrain_learning_rate: float | None = ranged(None, above=0, most=1)  # default: learning_rate
    # of the tokens; the paper masks more where neighbours are similar: half of an image's pixels
    self_pretrain_mask_share: float = ranged(0.15, above=0, below=1)

    @property
    def self_pretrains(self) -> bool:
        return self.self_pretrain_epochs is not None or self.self_pretrain_steps is not None

    def for_self_pretraining(self) -> "SelfPretrainingSettings":
        """Settings of the denoising loop, whose checkpoints are stored with those of the run."""
        return dataclasses.replace(
            self,
            out=str(self.folder / CHECKPOINTS / FOLDER),
            epochs=self.self_pretrain_epochs or 1,
            max_steps=self.self_pretrain_steps,
            learning_rate=self.self_pretrain_learning_rate or self.learning_rate,
            head_learning_rate=None,
            best_metric="loss",
            patience=None,
            eval_first=False,
            tracker="none",
        )


class NextTokens(Windows):
    """Inputs in which each token is predicted from the earlier ones."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids = self.windows[index].ids.astype(np.int64)
        return {"input_ids": ids, "labels": np.concatenate([[IGNORED], ids[1:]])}


def self_pretrain(
    accelerator: Accelerator,
    settings: SelfPretrainingSettings,
    model: PreTrainedModel,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any] | None:
    """Pretrain the body of `model`, in place, on the inputs of the splits `train` and `validation` of `data`.

    These are sequences of examples with `input_ids`. Resumes an interrupted run and raises Stopped, like `train`; a
    finished self-pretraining is not repeated. Returns the entry for metrics.json, or None if the settings do not ask
    for it. The folder of the run must exist. Afterwards, random states are those of the seed in all cases.
    """
    if not settings.self_pretrains:
        return None
    inner = settings.for_self_pretraining()
    causal = bool(getattr(model.config, "is_decoder", False))
    if not (inner.folder / RECORD).exists():
        accelerator.print(f"Self-pretraining: {'causal' if causal else 'masked'} denoising of the training inputs.")
        learn(accelerator, inner, model, data, tokenizer, causal)
    record = json.loads((inner.folder / RECORD).read_text(encoding="utf-8"))
    take_body(model, inner.folder / BODY)
    accelerator.free_memory()
    set_seed(settings.seed)
    return record


def learn(
    accelerator: Accelerator,
    settings: SelfPretrainingSettings,
    model: PreTrainedModel,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    causal: bool,
) -> None:
    """Train a language model that starts from the body of `model`; save its body and a record in the folder."""
    windows = {name: inputs_of(data[name], tokenizer) for name in ("train", "validation")}
    denoised = {name: denoising(name, split, tokenizer, settings, causal) for name, split in windows.items()}
    set_seed(settings.seed)
    auto_class: Any = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        denoiser = auto_class.from_config(deepcopy(model.config), trust_remote_code=settings.trust_remote_code)
    except ValueError as error:
        raise InputError(
            f"A {model.config.model_type} model has no head to self-pretrain with; omit self_pretrain_epochs and "
            f"self_pretrain_steps: {error}"
        ) from error
    # the body of a head without a pooled input has no pooler
    missing = denoiser.base_model.load_state_dict(model.base_model.state_dict(), strict=False).missing_keys
    assert not missing, missing
    collate = DataCollatorForTokenClassification(tokenizer)
    scorer = NextTokenScorer if causal else TokenScorer
    validate = Evaluator(accelerator, scorer(denoised["validation"], settings), collate, settings.eval_batch_size)
    trained, progress = train(accelerator, settings, denoiser, denoised["train"], collate, validate)

    state = whole_state(accelerator, trained)
    if accelerator.is_main_process:
        prefix = f"{denoiser.base_model_prefix}."
        body = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        record = {
            "objective": "causal" if causal else "masked",
            **({} if causal else {"mask_share": settings.self_pretrain_mask_share}),
            "learning_rate": settings.learning_rate,
            "steps": progress.step,
            "epochs": progress.epoch,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "validation": progress.best_scores,
            "history": progress.history,
        }
        with writing("The self-pretrained body", settings.folder):
            save_file(body, settings.folder / BODY)
            # written last, because it marks the body as complete
            write_whole(settings.folder / RECORD, json.dumps(record, indent=1))
    accelerator.wait_for_everyone()


def inputs_of(split: Sized, tokenizer: PreTrainedTokenizerBase) -> list[Window]:
    """The inputs of a split as windows, with special tokens excluded from masking."""
    examples: Any = split
    windows = []
    for index in range(len(split)):
        ids = np.asarray(examples[index]["input_ids"], dtype=np.int32)
        words = np.where(np.isin(ids, tokenizer.all_special_ids), NO_WORD, np.arange(len(ids)))
        if len(ids) > 1 and (words != NO_WORD).any():
            windows.append(Window(ids, words))
    if not windows:
        raise InputError("The inputs contain no token to self-pretrain on: omit self_pretrain_epochs and _steps.")
    return windows


def denoising(
    name: str,
    windows: Sequence[Window],
    tokenizer: PreTrainedTokenizerBase,
    settings: SelfPretrainingSettings,
    causal: bool,
) -> Windows:
    if causal:
        return NextTokens(windows)
    if tokenizer.mask_token_id is None:
        raise InputError(
            "Self-pretraining a bidirectional model needs a mask token, but the tokenizer has none: use another "
            "tokenizer, or omit self_pretrain_epochs and self_pretrain_steps."
        )
    # the paper masks every selected token; here a tenth becomes another token and a tenth stays, as in BERT, so that
    # the body is also trained on unmasked tokens, which it will meet later
    masker = Masker.of(tokenizer, settings.self_pretrain_mask_share)
    if name == "train":
        return RemaskedWindows(list(windows), masker, settings.seed)
    return MaskedWindows(list(windows), masker, settings.split_seed)


def take_body(model: PreTrainedModel, path: Path) -> None:
    """Load the body; parameters that are not in it (pooler, head) are marked as new, for head_learning_rate."""
    state = load_file(path)
    found = model.base_model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    # tied parameters are in `state` only once
    brought = {id(parameter) for name, parameter in model.base_model.named_parameters() if name in state}
    parameters: Any = model.parameters()
    for parameter in parameters:
        parameter.newly_initialized = id(parameter) not in brought


def card_row(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Row of the card's table, if there was self-pretraining."""
    if (record := metrics.get("self_pretraining")) is None:
        return {}
    share = f" of {100 * record['mask_share']:g} % of the tokens" if "mask_share" in record else ""
    return {
        "self-pretraining": f"{record['objective']} denoising{share} of the training inputs, {record['steps']:,} steps "
        f"({record['tokens']:,} tokens), learning rate {record['learning_rate']:g}, validation loss "
        f"{record['validation']['loss']:.4f}"
    }
