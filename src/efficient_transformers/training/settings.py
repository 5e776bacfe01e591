"""Settings of a run: a dataclass filled from composed YAML files and from options such as `--learning_rate 1e-3`.

jsonargparse parses the values and checks their types; further checks are in `Settings.check`.
"""

import copy
import dataclasses
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader

from ..errors import did_you_mean

REPOSITORY = Path(__file__).resolve().parents[3]  # if this is a checkout
CONFIGS = REPOSITORY / "configs"
TRUST = "trust_remote_code"  # a setting that no file can set
VARIANTS, VARIANT = "variants", "{variant}"  # the section and folder of variants; placeholder for a variant's name
# settings that change neither the data nor the weights, and so may differ when a run is resumed
FREE_TO_CHANGE = {
    "out", "overwrite", "resume", "checkpoint_steps", "keep_checkpoints", "keep_checkpoints_at_end", "log_steps",
    "tracker", "eval_batch_size", "license", "language", "card_notes", "config", "task",
    "cache_tokens", "num_workers", "dataloader_num_workers", "trust_remote_code", "ignore_memory",
}  # fmt: skip
# sources of the data: `license` and `language` in a YAML file are those of its own data
DATA = ("data", "data_config", "validation_data", "test_data", "more_data")
SettingsType = TypeVar("SettingsType", bound="Settings")


class InputError(ValueError):
    """Invalid user input; shown as one line, without a traceback."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a numeric setting. `least` and `most` are inclusive, `above` and `below` are exclusive."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    why: str = ""

    def check(self, name: str, value: float) -> None:
        """Raise InputError with the range if `value` is outside of it or not finite."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        inside = (low is None or value > low or (value == low and self.above is None)) and (
            high is None or value < high or (value == high and self.below is None)
        )
        if inside and math.isfinite(value):
            return
        if math.isinf(value) and inside:
            rule = "be a finite number"
        elif self.least is not None and self.most is not None:
            rule = f"lie between {self.least} and {self.most}"
        else:
            rules = (
                ("at least", self.least),
                ("more than", self.above),
                ("at most", self.most),
                ("less than", self.below),
            )
            rule = "be " + " and ".join(f"{words} {limit}" for words, limit in rules if limit is not None)
        raise InputError(f"{name} ({value}) must {rule}{f': {self.why}' if self.why else ''}.")


def ranged(default: Any, **limits: Any) -> Any:
    """A dataclass field for a setting, with its default and `Range`."""
    return dataclasses.field(default=default, metadata={"range": Range(**limits)})


@dataclasses.dataclass
class Settings:
    """Settings shared by all tasks. A task adds its own in a subclass."""

    # data
    # a bundled corpus, a .jsonl/.csv/.parquet/.txt file, a folder of train/validation/test or .txt files, or a Hub name
    data: str
    data_config: str | None = None  # configuration of a dataset on the Hub
    validation_data: str | None = None  # separate files; missing splits are cut from the training data
    test_data: str | None = None
    # seed of that cut; separate from `seed`, so that runs with several seeds have the same splits
    split_seed: int = ranged(0, least=0, most=2**32 - 1)
    # tokens per example that the model processes; default: the model's maximum
    max_length: int | None = ranged(None, least=3, why="fewer hold no text")
    # model
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # `model_type` or `checkpoint`, and config fields
    tokenizer: str | None = None  # folder or Hub name; default: that of the checkpoint
    trust_remote_code: bool = False  # run code that comes with a checkpoint, tokenizer or metric; an option only
    reinitialize: bool = False  # train although tensors of the checkpoint's body are missing or have another shape
    # optimisation
    epochs: int = ranged(3, least=1)
    max_steps: int | None = ranged(None, least=1)  # optimizer steps; replaces `epochs`
    batch_size: int = ranged(8, least=1)  # examples per process in one forward pass
    eval_batch_size: int = ranged(16, least=1)
    gradient_accumulation: int = ranged(1, least=1)
    # examples per step over all processes; default: batch_size x processes x gradient_accumulation. If set, a run takes
    # the same steps on any number of processes, in as many batches of at most batch_size as needed
    global_batch_size: int | None = ranged(None, least=1)
    sort_by_length: bool = True  # batches of similar lengths, which need less padding
    # processes that build the training batches; 0: the training process itself
    dataloader_num_workers: int = ranged(0, least=0)
    learning_rate: float = ranged(5e-5, above=0, most=1)
    # for weights that are not in the checkpoint; default: learning_rate
    head_learning_rate: float | None = ranged(None, above=0, most=1)
    weight_decay: float = ranged(0.01, least=0, most=10)
    warmup_ratio: float = ranged(0.1, least=0, most=1, why="it is a share of the steps")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float = ranged(1.0, above=0)
    seed: int = ranged(0, least=0, most=2**32 - 1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # default: the setting of `accelerate launch`
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    ignore_memory: bool = False  # start even if the estimated memory exceeds what is available
    # evaluation and logging
    eval_first: bool = False  # also evaluate before training, to measure a converted or trained checkpoint
    eval_steps: int | None = ranged(None, least=1)  # default: at the end of every epoch
    best_metric: str = "loss"
    patience: int | None = ranged(None, least=1)  # stop training after this number of evaluations without improvement
    log_steps: int = ranged(10, least=1)
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    # output
    task: str | None = None  # name of the task in `tasks.TASKS`
    config: str | None = None  # <name of the YAML>/<variant>, set automatically
    out: str | None = None  # default: runs/<name of the YAML>-<variant>
    overwrite: bool = False
    resume: bool = False
    checkpoint_steps: int | None = ranged(None, least=1)  # default: after every evaluation
    keep_checkpoints: int = ranged(2, least=1)
    keep_checkpoints_at_end: bool = False
    # for the model card; values from a YAML are used only if options do not change its data and model
    license: str | None = None
    language: str | None = None
    card_notes: str | None = None  # Markdown: further measurements

    @classmethod
    def from_yaml(
        cls: type[SettingsType], path: str | Path, options: Iterable[str] = (), variant: str | None = None
    ) -> SettingsType:
        """Compose a YAML file and a variant (`compose`), and apply `options`, e.g. `["--model.hidden_size", "64"]`."""
        return cls.from_options(compose(Path(path), variant), options)

    @classmethod
    def from_options(cls: type[SettingsType], values: Mapping[str, Any], options: Iterable[str]) -> SettingsType:
        """Build settings from `values`, as in YAML files, and from command-line options, which take precedence.

        Only an option can grant trust, because files may come from elsewhere, like the folder of a run.
        """
        options = list(options)
        for option in options:
            if option.startswith("--") and (name := re.split("[=.+]", option[2:])[0]) != "help":
                cls._check_name(name)
        try:
            given = cls.parser().parse_args(options, defaults=False).as_dict()
        except ArgumentError as error:
            raise InputError(cls._explain(error)) from error
        values = {name: value for name, value in values.items() if name != TRUST}
        return cls.from_dict(without_claims(values, merge(values, given), given))

    @classmethod
    def from_dict(cls: type[SettingsType], values: Mapping[str, Any]) -> SettingsType:
        for key in values:
            cls._check_name(key)
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and values.get(field.name) is None:
                raise InputError(f"The setting {field.name!r} is missing: set it in the YAML or with --{field.name}.")
        given = copy.deepcopy(dict(values))  # the parser modifies it
        if given.get("mixed_precision") is False:
            given["mixed_precision"] = "no"  # YAML 1.1 parses the bare word as a boolean
        try:
            settings = cls(**cls.parser().parse_object(given, defaults=False).as_dict())
        except ArgumentError as error:
            raise InputError(cls._explain(error, values)) from error
        settings.check()
        return settings

    @classmethod
    @functools.cache
    def parser(cls) -> ArgumentParser:
        """A parser with an option for every setting; booleans need no value: `--resume` means `--resume true`."""
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, usage="%(prog)s [options]")
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            flag = {"nargs": "?", "const": True} if hints[field.name] is bool else {}
            default = None if field.default is dataclasses.MISSING else field.default
            parser.add_argument(f"--{field.name}", type=hints[field.name], default=default, **flag)
        return parser

    @classmethod
    def _check_name(cls, name: str) -> None:
        if name not in (known := get_type_hints(cls)):
            raise InputError(f"There is no setting {name!r}{did_you_mean(name, known)}")

    @classmethod
    def _explain(cls, error: ArgumentError, values: Mapping[str, Any] | None = None) -> str:
        """Summarise the parser's message in one line: the setting, its value and the allowed values."""
        said = " ".join(str(error).split())
        if found := re.search(r'Parser key "(\w+)[^"]*": .*(?:Got|Given) value: (.*)', said):
            key, text = found.groups()
            return f"{key} ({text if values is None else values[key]!r}) must be {wanted(get_type_hints(cls)[key])}."
        if said.startswith("unrecognized"):
            return f"{said}: settings are given as --name value, e.g. --model.hidden_size 64."
        return said

    def check(self) -> None:
        """Check values of the right type that are out of their `Range` or contradict each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (limits := field.metadata.get("range")) is not None:
                limits.check(field.name, value)
        if self.global_batch_size is not None and self.gradient_accumulation > 1:
            raise InputError(
                f"gradient_accumulation ({self.gradient_accumulation}) follows from global_batch_size "
                f"({self.global_batch_size}): omit one of them."
            )
        if bool(self.model.get("model_type")) == bool(self.model.get("checkpoint")):
            raise InputError(
                "model must name either model_type (a new model) or checkpoint (one to start from): pass --variant, "
                "--model.model_type or --model.checkpoint."
            )
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: pass only one of them.")

    @property
    def folder(self) -> Path:
        return Path(self.out or "runs")

    def step_size(self, processes: int) -> int:
        """Number of examples in one optimizer step."""
        return self.global_batch_size or self.batch_size * processes * self.gradient_accumulation

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = get_loader("yaml")(path.read_text(encoding="utf-8"))
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


def compose(path: Path, variant: str | None = None) -> dict[str, Any]:
    """Merge the settings of a YAML file, those of a variant, and the file's section for the variant; later ones win.

    `variants/<variant>.yaml`, next to the file or in the configs of this repository, defines a new model; it is ignored
    if the file starts from a checkpoint, whose name may contain `{variant}`. A section under `variants:` does not need
    a variant file. Raises InputError if there is neither.
    """
    values = read_yaml(path)
    sections = values.pop(VARIANTS, None) or {}
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise InputError(f"{VARIANTS} in {path} must hold a section of settings for each variant it names.")
    model = values.get("model")
    checkpoint = str(model.get("checkpoint", "")) if isinstance(model, dict) else ""
    name = path.stem if variant is None else f"{path.stem}/{variant}"
    if variant is not None:
        files = {file.stem: file for folder in (CONFIGS, path.parent) for file in (folder / VARIANTS).glob("*.yaml")}
        if variant not in (known := [*files, *sections]):
            raise InputError(f"{path} has no variant {variant!r}{did_you_mean(variant, known)}")
        if checkpoint:
            values = merge(values, {"model": {"checkpoint": checkpoint.replace(VARIANT, variant)}})
        elif variant in files:
            values = merge(values, read_yaml(files[variant]))
        values = merge(values, sections.get(variant, {}))
    elif VARIANT in checkpoint:
        raise InputError(f"{path} starts from the checkpoint {checkpoint} of a variant: give --variant.")
    own = {"config": name, "out": f"runs/{name.replace('/', '-')}"}
    return own | {key: value for key, value in values.items() if value is not None or key not in own}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; `above` takes precedence, and the fields of `model` are merged individually."""
    merged = {**below, **above}
    lower, upper = below.get("model"), above.get("model")
    if isinstance(lower, dict) and isinstance(upper, dict):
        # a checkpoint has its own config, to which the fields of a new model do not apply
        replaced = "checkpoint" in upper and "checkpoint" not in lower
        merged["model"] = upper if replaced else {**lower, **upper}
    return merged


def without_claims(values: Mapping[str, Any], merged: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`merged` without the card settings in the YAML's `values` that options (`given`) make untrue.

    `license` and `language` describe the data of the YAML, and `license` also its checkpoint. `card_notes` describe the
    model that the YAML trains, with any seed.
    """
    changed = {name for name, value in given.items() if merged[name] != values.get(name)}
    of_data = bool(changed & set(DATA))
    models = [settings.get("model") for settings in (values, merged)]
    checkpoints = [model.get("checkpoint") if isinstance(model, dict) else None for model in models]
    untrue = {
        "license": of_data or checkpoints[0] != checkpoints[1],
        "language": of_data,
        "card_notes": bool(changed - FREE_TO_CHANGE - {"seed"}),
    }
    return {**merged, **{name: None for name, is_untrue in untrue.items() if is_untrue and name not in given}}


def wanted(annotation: Any) -> str:
    """A type, described for an error message."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(wanted(option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list, e.g. [a, b]",
        dict: "a section of `field: value` lines",
        types.NoneType: "null",
    }
    return names[get_origin(annotation) or annotation]


def find_path(name: str) -> Path | None:
    """Find a file or folder relative to the working directory, or to the repository, so that configs work anywhere."""
    for path in (Path(name), REPOSITORY / name):
        if path.exists():
            return path
    return None
