"""Trains any of the tasks with transformers' Trainer, for those who would rather have it than the loop of loop.py.

python training/trainer_finetune.py --task classify --model_type et_local --config_overrides window_size=128 \
    --tokenizer data/tokenizer --data era --settings label_column=era window_length=4096 --output_dir runs/trained
python training/trainer_finetune.py --task mlm --checkpoint runs/mlm-local --data texts.jsonl --output_dir runs/more

Data, features and scores are those of the task's own script; `--settings` takes its settings of the data as key=value.
Everything else is an argument of TrainingArguments: `--learning_rate`, `--push_to_hub`, …
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from efficient_transformers.folders import fit_tokenizer
from efficient_transformers.training.data.causal import CausalPacker, CausalWindows
from efficient_transformers.training.data.features import Features
from efficient_transformers.training.data.packing import IGNORED, Packer, RowCollator, Rows, packed
from efficient_transformers.training.data.texts import SPLITS, load_texts
from efficient_transformers.training.engine.building import build_config, visible_length
from efficient_transformers.training.engine.task import Task
from efficient_transformers.training.settings import InputError, Settings, did_you_mean, merge, parse_override
from efficient_transformers.training.tasks import answer, choose, classify, pretrain_clm, pretrain_mlm, tag_tokens
from efficient_transformers.training.tasks.pretrain_clm import ClmSettings, load_open_tokenizer
from efficient_transformers.training.tasks.pretrain_mlm import MlmSettings

TASKS: dict[str, Task] = {
    "classify": classify.TASK,
    "tags": tag_tokens.TASK,
    "answers": answer.TASK,
    "choices": choose.TASK,
}
SETTINGS: dict[str, type[Settings]] = {
    "mlm": MlmSettings,
    "clm": ClmSettings,
    **{name: task.settings_class for name, task in TASKS.items()},
}
# of the settings that all scripts share, those of the data; in the place of the others are the Trainer's arguments
SHARED = {"data_config", "validation_data", "test_data", "split_seed", "trust_remote_code"}


@dataclass
class FinetuneArguments:
    """The model and the data."""

    task: Literal["classify", "tags", "answers", "choices", "mlm", "clm"] = field(metadata={"help": "what to learn"})
    data: str = field(metadata={"help": "a bundled corpus, a file, a folder of split files or a Hub name"})
    checkpoint: str | None = field(default=None, metadata={"help": "folder or Hub name of a model to go on from"})
    model_type: str | None = field(default=None, metadata={"help": "or the type of a new one, e.g. et_local"})
    config_overrides: list[str] = field(default_factory=list, metadata={"help": "config fields, as field=value"})
    tokenizer: str | None = field(default=None, metadata={"help": "default: the checkpoint's own"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of an example; default: all positions"})
    settings: list[str] = field(default_factory=list, metadata={"help": "settings of the task's data, as key=value"})


@dataclass
class Ready:
    """What a Trainer needs of a task. `scores` are of a split's name and predictions."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, Any]
    collate: Any
    scores: Callable[[str, EvalPrediction], dict[str, float]]
    reduce: Callable[[Any, Any], Any] | None = None  # of logits, so that not all of them are kept


def settings_of(given: FinetuneArguments, seed: int) -> Settings:
    settings_class = SETTINGS[given.task]
    known = SHARED | {f.name for f in dataclasses.fields(settings_class)} - {
        f.name for f in dataclasses.fields(Settings)
    }
    values: dict[str, Any] = {"model": {"checkpoint": given.checkpoint, "model_type": given.model_type}}
    for override in given.config_overrides:
        values = merge(values, parse_override(f"model.{override}"))
    values["model"] = {name: value for name, value in values["model"].items() if value is not None}
    for override in given.settings:
        setting = parse_override(override)
        if unknown := setting.keys() - known:
            raise InputError(f"There is no setting {unknown} of the data{did_you_mean(unknown.pop(), sorted(known))}")
        values |= setting
    values |= {"data": given.data, "tokenizer": given.tokenizer, "max_length": given.max_length, "seed": seed}
    return settings_class.from_dict(values)


def ready(task: str, settings: Any) -> Ready:
    match task:
        case "mlm":
            return ready_to_fill(settings)
        case "clm":
            return ready_to_write(settings)
        case _:
            return ready_for(TASKS[task], settings)


def ready_for(task: Task, settings: Any) -> Ready:
    """One of the tasks of tasks.py, with its own features, collator and scores."""
    made = task.ready(settings)
    data = {name: made.encode(name) for name in SPLITS}
    scorers = {name: task.scorer(examples, settings) for name, examples in data.items()}

    def scores(split: str, prediction: EvalPrediction) -> dict[str, float]:
        several = isinstance(prediction.predictions, tuple)
        logits = prediction.predictions if several else (prediction.predictions,)
        labels = prediction.label_ids if isinstance(prediction.label_ids, tuple) else (prediction.label_ids,)
        outputs = ("start_logits", "end_logits") if several else ("logits",)
        inputs = ("start_positions", "end_positions") if several else ("labels",)
        found = scorers[split].judge(
            SimpleNamespace(**{name: torch.from_numpy(row) for name, row in zip(outputs, logits, strict=True)}),
            {name: torch.from_numpy(row) for name, row in zip(inputs, labels, strict=True)},
        )
        return scorers[split].scores(found)

    return Ready(made.model, made.preparation, data, made.collate, scores)


def ready_to_fill(settings: MlmSettings) -> Ready:
    if settings.whole_word:
        raise InputError("whole_word (True) is for training/pretrain_mlm.py: here transformers' collator masks tokens.")
    texts = load_texts(settings)
    tokenizer = pretrain_mlm.TASK.load_tokenizer(settings, texts["train"])
    config = build_config(settings, tokenizer)
    model = pretrain_mlm.TASK.build_model(settings, config, tokenizer)
    length = visible_length(settings, config)
    pack = Packer(tokenizer, length, settings.packing, settings.shortest_window)
    data: dict[str, Any] = {}
    for name, split in texts.items():
        windows = [{"input_ids": window.ids} for window in pack(split)]
        data[name] = Features(windows)
        if settings.packing == "best_fit":
            data[name] = Rows(windows, [len(window["input_ids"]) for window in windows], length)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=settings.mlm_probability)
    collate = RowCollator(collate, tokenizer.padding_side)
    return Ready(model, tokenizer, data, collate, lambda _, prediction: share_right(prediction), most_likely)


def ready_to_write(settings: ClmSettings) -> Ready:
    texts = load_texts(settings)
    tokenizer = load_open_tokenizer(settings, texts["train"])
    config = build_config(settings, tokenizer)
    model = pretrain_clm.TASK.build_model(settings, config, tokenizer)
    length = visible_length(settings, config)
    pack = CausalPacker(tokenizer, length, settings.packing, settings.shortest_window)
    data = {name: packed(CausalWindows(pack(split)), length, settings.packing) for name, split in texts.items()}
    # it pads labels that are there; transformers' for causal models would ignore an end token that pads, too
    collate = RowCollator(DataCollatorForTokenClassification(tokenizer), tokenizer.padding_side)
    return Ready(model, tokenizer, data, collate, lambda _, prediction: share_right(prediction, 1), most_likely)


def most_likely(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1)


def share_right(prediction: EvalPrediction, ahead: int = 0) -> dict[str, float]:
    """Accuracy at the tokens that are to be predicted, by the output `ahead` tokens in front of each."""
    labels = np.asarray(prediction.label_ids)[:, ahead:]
    predicted = np.asarray(prediction.predictions)[:, : labels.shape[1]]
    return {"accuracy": float((predicted == labels)[labels != IGNORED].mean())}


def run(given: FinetuneArguments, training: TrainingArguments) -> dict[str, float]:
    """Trains, scores the test split and saves a folder that `from_pretrained` opens, with `test_results.json`."""
    settings = settings_of(given, training.seed)
    set_seed(training.seed)
    made = ready(given.task, settings)
    fit_tokenizer(made.tokenizer, made.model.config, settings.max_length)
    split = "validation"
    trainer = Trainer(
        made.model,
        training,
        data_collator=made.collate,
        train_dataset=made.data["train"],
        eval_dataset=made.data["validation"],
        processing_class=made.tokenizer,
        compute_metrics=lambda prediction: made.scores(split, prediction),
        preprocess_logits_for_metrics=made.reduce,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    split = "test"
    metrics = trainer.evaluate(made.data["test"], metric_key_prefix="test")
    if given.task in ("mlm", "clm"):
        metrics["test_perplexity"] = math.exp(min(metrics["test_loss"], 709))
    trainer.save_model()
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    return metrics


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser((FinetuneArguments, TrainingArguments), description=__doc__)  # type: ignore[arg-type]
    given, training = parser.parse_args_into_dataclasses(arguments)
    try:
        run(given, training)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
