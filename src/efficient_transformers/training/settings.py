"""Settings of a run: a dataclass filled from YAML and from `key=value` overrides, every value checked.

`configs/<task>/base.yaml` beside a YAML is its base, so that a variant's file holds only what differs.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

REPOSITORY = Path(__file__).resolve().parents[3]  # of a checkout
SettingsType = TypeVar("SettingsType", bound="Settings")


class InputError(ValueError):
    """Something the user gave cannot be used; shown as one line, without a traceback."""


@dataclasses.dataclass
class Settings:
    """What every training script has in common. A script adds its own by subclassing."""

    # data
    data: str  # a bundled corpus, a .jsonl/.csv/.parquet file, a folder of train/validation/test files, or a Hub name
    data_config: str | None = None  # configuration of a Hub data set
    validation_data: str | None = None  # files of their own; what is missing is cut from the training data
    test_data: str | None = None
    split_seed: int = 0  # of that cut; apart from `seed`, so that runs with several seeds see the same splits
    max_length: int | None = None  # tokens that the model sees of each example; default: as many as it can
    # model
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # `model_type` or `checkpoint`, and config fields
    tokenizer: str | None = None  # folder or Hub name; default: the checkpoint's own
    trust_remote_code: bool = False
    # optimisation
    epochs: int = 3
    max_steps: int | None = None  # optimiser steps; takes the place of `epochs`
    batch_size: int = 8  # examples of one process in one forward pass
    eval_batch_size: int = 16
    gradient_accumulation: int = 1
    global_batch_size: int | None = None  # examples of a step of all processes; default: batch_size x processes x
    # gradient_accumulation. With it a run takes the same steps on any number of processes, in as many batches of at
    # most batch_size as they need
    sort_by_length: bool = True  # batches of similar length, which pad less
    dataloader_num_workers: int = 0  # processes that make the batches of training; 0: the one that trains
    learning_rate: float = 5e-5
    head_learning_rate: float | None = None  # of weights that the checkpoint does not bring; default: learning_rate
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # default: what `accelerate launch` was told
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    # watching
    eval_first: bool = False  # evaluate before training, too: where a converted or trained checkpoint starts from
    eval_steps: int | None = None  # default: at the end of every epoch
    best_metric: str = "loss"
    patience: int | None = None  # evaluations without a gain after which training stops
    log_steps: int = 10
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    # output
    config: str | None = None  # <folder>/<name> of the YAML, which sets it by itself
    out: str | None = None  # default: runs/<folder of the YAML>-<name of the YAML>
    overwrite: bool = False
    resume: bool = False
    checkpoint_steps: int | None = None  # default: after every evaluation
    keep_checkpoints: int = 2
    keep_checkpoints_at_end: bool = False
    license: str | None = None  # these three go into the model card
    language: str | None = None
    card_notes: str | None = None  # Markdown: what was measured beyond this run

    @classmethod
    def from_yaml(cls: type[SettingsType], path: str | Path, overrides: Iterable[str] = ()) -> SettingsType:
        """Base, then the file, then `key=value` overrides; `model.<field>=value` sets one field of the model."""
        path = Path(path)
        base = path.with_name("base.yaml")
        values = read_yaml(base) if base.exists() and base != path else {}
        values = merge(values, read_yaml(path))
        for override in overrides:
            values = merge(values, parse_override(override))
        if values.get("config") is None:
            values["config"] = f"{path.resolve().parent.name}/{path.stem}"
        if values.get("out") is None:
            values["out"] = str(Path("runs", f"{path.parent.name}-{path.stem}"))
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls: type[SettingsType], values: Mapping[str, Any]) -> SettingsType:
        hints = get_type_hints(cls)
        for key in values:
            if key not in hints:
                raise InputError(f"There is no setting {key!r}{did_you_mean(key, hints)}")
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                raise InputError(f"The setting {field.name!r} is missing: give it in the YAML or as {field.name}=….")
        settings = cls(**{key: checked(key, value, hints[key]) for key, value in values.items()})
        settings.check()
        return settings

    def check(self) -> None:
        """Values that have the right type and cannot work all the same."""
        for name in ("epochs", "max_steps", "batch_size", "global_batch_size", "eval_batch_size",
                     "gradient_accumulation", "max_length",
                     "eval_steps", "patience", "log_steps", "checkpoint_steps", "keep_checkpoints"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} ({value}) must be at least 1.")
        if self.global_batch_size is not None and self.gradient_accumulation > 1:
            raise InputError(
                f"gradient_accumulation ({self.gradient_accumulation}) follows from global_batch_size "
                f"({self.global_batch_size}): leave out one of them."
            )
        for name in ("seed", "split_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name} ({getattr(self, name)}) must lie between 0 and {2**32 - 1}.")
        if self.dataloader_num_workers < 0:
            raise InputError(f"dataloader_num_workers ({self.dataloader_num_workers}) must not be negative.")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(
                f"warmup_ratio ({self.warmup_ratio}) must lie between 0 and 1: it is a share of the steps."
            )
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} ({value}) must be positive.")
        if bool(self.model.get("model_type")) == bool(self.model.get("checkpoint")):
            raise InputError("model must name either model_type (a new model) or checkpoint (one to go on from).")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: give one of them.")

    @property
    def folder(self) -> Path:
        return Path(self.out or "runs")

    def step_size(self, processes: int) -> int:
        """Examples of one optimiser step."""
        return self.global_batch_size or self.batch_size * processes * self.gradient_accumulation

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    close = get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
        hint = f"; beside it are {', '.join(beside)}" if beside else ""
        raise InputError(f"There is no settings file {path}{hint}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `key: value` lines, not a {type(values).__name__}.")
    return values


def parse_override(override: str) -> dict[str, Any]:
    """`model.window_size=64` → {"model": {"window_size": 64}}."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"The override {override!r} must have the form key=value, e.g. model.hidden_size=64.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"The value of the override {override!r} cannot be read as YAML: {error}") from error
    section, dot, field = key.partition(".")
    return {section: {field: number(value)}} if dot else {key: value}


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; the fields of `model` are merged one by one."""
    merged = {**below, **above}
    lower, upper = below.get("model"), above.get("model")
    if isinstance(lower, dict) and isinstance(upper, dict):
        # the fields of a model to be made say nothing of a checkpoint, which brings its own
        made_anew = "checkpoint" in upper and "checkpoint" not in lower
        merged["model"] = upper if made_anew else {**lower, **upper}
    return merged


def number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4`, which has no point, as text; whoever writes it means a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def checked(name: str, value: Any, annotation: Any) -> Any:
    """`value`, converted where nothing is lost, or an InputError that names the type wanted."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        options = get_args(annotation)
        if value is None and type(None) in options:
            return None
        (annotation,) = (option for option in options if option is not type(None))
        return checked(name, value, annotation)
    if origin is Literal:
        if value is False and "no" in get_args(annotation):
            value = "no"  # YAML 1.1 reads the bare word as a truth value
        if value not in get_args(annotation):
            allowed = ", ".join(map(str, get_args(annotation)))
            raise InputError(f"{name} ({value!r}) must be one of {allowed}.")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{name} ({value!r}) must be a section of `field: value` lines.")
        return {key: number(item) for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise InputError(f"{name} ({value!r}) must be a list, e.g. [a, b].")
        return [checked(f"{name}[{i}]", item, *get_args(annotation)) for i, item in enumerate(value)]
    if annotation is float:
        value = number(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
    if not isinstance(value, annotation) or (annotation is not bool and isinstance(value, bool)):
        raise InputError(f"{name} ({value!r}) must be {annotation.__name__}, not {type(value).__name__}.")
    return value


def find_path(name: str) -> Path | None:
    """A file or folder by its path from here, or from the repository, so that configs work from any folder."""
    for path in (Path(name), REPOSITORY / name):
        if path.exists():
            return path
    return None
