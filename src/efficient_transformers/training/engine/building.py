"""Build the accelerator, tokenizer, config and model of a run from its settings."""

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...cards import costs_of  # the package registers the variants with the Auto classes
from ...errors import check_fields, did_you_mean, said
from ...folders import check_folder
from ...memory import (
    ADAM,
    FLOAT,
    PROCESS,
    Estimate,
    TooLargeError,
    activations_of,
    check_layers,
    parameters_by_sizes,
    parameters_of,
)
from ...trust import UntrustedCodeError, refusing_code
from ..data.classes import listed
from ..settings import InputError, Settings, find_path
from .outputs import LOGS
from .sharding import on_cpus, settle_sharding

# how a config class fails on values that a damaged or strange config.json may hold
LOADING = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def make_accelerator(settings: Settings) -> Accelerator:
    torch.set_float32_matmul_precision(settings.matmul_precision)
    folder = str(settings.folder)
    try:
        accelerator = Accelerator(
            cpu=on_cpus(),
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=str(settings.folder / LOGS)),
        )
    except ValueError as error:  # about the precision, or the settings of `accelerate launch`
        raise InputError(
            f"mixed_precision ({settings.mixed_precision!r}) cannot be used here: {error} Set it to no or bf16."
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision ('fp16') needs a GPU: set it to no or bf16.")
    settle_sharding(accelerator, settings)
    # tied weights are correctly saved once, but accelerate warns about it at every checkpoint
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if not (accelerator.is_main_process and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return accelerator


def local_or_hub(name: str) -> str | Path:
    return find_path(name) or name


@contextmanager
def opening(what: str, name: str) -> Iterator[str | Path]:
    """The folder or Hub name to load from, its files checked. Raises InputError if the body of the context fails."""
    source = local_or_hub(name)
    try:
        check_folder(source)
        with refusing_code(source):
            yield source
    except UntrustedCodeError as error:
        raise InputError(str(error)) from None
    except Exception as error:  # files may hold anything, and libraries then raise anything
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"The {what} {name!r} cannot be loaded: {kind}{said(error)}") from error


def load_tokenizer(settings: Settings, needs_padding: bool = True) -> PreTrainedTokenizerBase:
    name = settings.tokenizer or settings.model.get("checkpoint")
    if name is None:
        raise InputError("A new model needs a tokenizer: set tokenizer to a folder or a Hub name, e.g. data/tokenizer.")
    with opening("tokenizer", name) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    if needs_padding and tokenizer.pad_token_id is None:
        raise InputError(f"The tokenizer {name!r} has no padding token, so documents cannot be put in batches.")
    return tokenizer


def build_config(settings: Settings, tokenizer: PreTrainedTokenizerBase | None, **task_fields: Any) -> PreTrainedConfig:
    """The config of a new model or of a checkpoint; `task_fields` are set by the task, such as `id2label`.

    `tokenizer` is None for images.
    """
    fields = dict(settings.model)
    checkpoint, model_type = fields.pop("checkpoint", None), fields.pop("model_type", None)
    try:
        if checkpoint is not None:
            with opening("checkpoint", checkpoint) as source:
                config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
            _check_fields(type(config), fields)
            # call the constructor again, so that the class validates the changed fields
            config = type(config).from_dict({**config.to_dict(), **fields, **task_fields})
        else:
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"there is no model_type {model_type!r}{did_you_mean(str(model_type), CONFIG_MAPPING)}"
                )
            config_class = type(AutoConfig.for_model(model_type))
            _check_fields(config_class, fields)
            from_tokenizer = {}
            if tokenizer is not None:
                from_tokenizer["vocab_size"] = len(tokenizer)
                for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                    from_tokenizer[name] = getattr(tokenizer, name)
            config = config_class(**{**from_tokenizer, **fields, **task_fields})
    except InputError:
        raise
    except (*LOADING, StrictDataclassError) as error:
        is_damaged = checkpoint is not None and not fields
        what = f"The checkpoint {checkpoint!r} cannot be loaded" if is_damaged else "The model section cannot be used"
        raise InputError(f"{what}: {said(error)}") from error
    if tokenizer is not None:
        _check_sizes(config, settings, tokenizer)
    return config


def _check_fields(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> None:
    known = {*getattr(config_class, "__dataclass_fields__", {}), *config_class.attribute_map}
    check_fields(fields, known | set(inspect.signature(config_class.__init__).parameters), config_class.__name__)


def _check_sizes(config: PreTrainedConfig, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions and settings.max_length and settings.max_length > positions:
        raise InputError(
            f"max_length ({settings.max_length}) must not exceed the model's max_position_embeddings ({positions}): "
            "reduce the first or increase model.max_position_embeddings."
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"vocab_size ({config.vocab_size}) must be at least the tokenizer's size ({len(tokenizer)}): "
            "increase model.vocab_size or omit it."
        )


def visible_length(settings: Settings, config: PreTrainedConfig, default: int | None = None) -> int:
    """Maximum input length in tokens: `max_length`, or `default`, or the number of positions of the model."""
    length = settings.max_length or default or getattr(config, "max_position_embeddings", None)
    if not length:
        raise InputError(f"A {config.model_type} model has no maximum length: set max_length.")
    positions = getattr(config, "max_position_embeddings", None)
    return min(length, positions) if positions else length


def build_model(
    settings: Settings, config: PreTrainedConfig, auto_class: Any, *, complete: bool = False
) -> PreTrainedModel:
    """Build a new model, initialised from the current seed, or load the checkpoint with a head of the right size.

    Parameters that are not in the checkpoint are marked as `newly_initialized`, because they may have their own
    learning rate. With `complete`, the checkpoint must also contain the head. Raises InputError, which lists the
    tensors, if it does not fit.
    """
    if "checkpoint" not in settings.model:
        try:
            return auto_class.from_config(config)
        except ValueError as error:
            raise InputError(f"The model section cannot be used: {error}") from error
    name = settings.model["checkpoint"]
    with opening("checkpoint", name) as source:
        model, loading = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,  # small updates would be lost in the half precision of some checkpoints
            ignore_mismatched_sizes=True,  # without it, the first tensor that does not fit hides the others
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    newly_initialized = check_fit(model, loading, settings, complete)
    for key, parameter in model.named_parameters():
        parameter.newly_initialized = key in newly_initialized
    return model


def check_fit(model: PreTrainedModel, loading: Mapping[str, Any], settings: Settings, complete: bool) -> set[str]:
    """Return the names of newly initialised tensors, which are not in the checkpoint; those of a head are reported.

    Raises InputError for tensors of the body, or with `complete` of the head, that are missing, have another shape or
    are not used, unless `reinitialize` allows it.
    """
    shapes = {key: f"{key}, {tuple(saved)} instead of {tuple(own)}" for key, saved, own in loading["mismatched_keys"]}
    kinds = {
        "missing": {key: key for key in loading["missing_keys"]},
        "of another shape": shapes,
        "not used": {key: key for key in loading["unexpected_keys"]},
    }
    newly_initialized = {*kinds["missing"], *shapes}
    parts, prefix = dict(model.base_model.named_children()), f"{model.base_model_prefix}."

    def of_head(key: str) -> bool:
        # the pooler is absent in checkpoints whose head does not use it
        return "pooler." in key or not (key.startswith(prefix) or key.partition(".")[0] in parts)

    must_fit = {kind: [text for key, text in keys.items() if not of_head(key)] for kind, keys in kinds.items()}
    if complete:
        must_fit |= {kind: list(kinds[kind].values()) for kind in ("missing", "of another shape")}
    found = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in must_fit.items() if keys)
    name = settings.model["checkpoint"]
    if found and complete:
        raise InputError(
            f"The checkpoint {name!r} lacks weights of the trained model ({found}): copy the folder again."
        )
    if found and not settings.reinitialize:
        raise InputError(
            f"The checkpoint {name!r} does not fit the model ({found}). Correct the fields of the model section, or "
            "set reinitialize to true to initialise the first two kinds randomly and ignore the third."
        )
    if newly_initialized:
        note = f"New weights, which are not in {name}: {listed(sorted(newly_initialized))}."
        PartialState().print(note)
    return newly_initialized


def check_memory(
    settings: Settings, config: PreTrainedConfig, lengths: Mapping[str, Sequence[int]], device: torch.device | None
) -> None:
    """Raise InputError if a rough estimate of the memory exceeds what is available, unless `ignore_memory` is set.

    `lengths` are the lengths of the examples of each split, in tokens; without `train`, the model is only evaluated.
    `device` is the device whose memory is needed; None is the machine.
    """
    if settings.ignore_memory:
        return
    remedy = " Reduce the sizes in the settings, or set ignore_memory to true if the estimate is wrong."
    try:
        check_layers(config, remedy)
        estimate = Estimate(workers=PROCESS * settings.dataloader_num_workers)
        for split, tokens in lengths.items():
            is_training = split == "train"
            batch = min(settings.batch_size if is_training else settings.eval_batch_size, len(tokens))
            needed = activations_of(config, batch, max(tokens, default=0), training=is_training)
            estimate.activations = max(estimate.activations, needed)
        copies = ADAM if "train" in lengths else 1
        for parameters in (parameters_by_sizes, parameters_of):  # the second builds the buffers of a model
            estimate.weights = FLOAT * copies * parameters(config)
            estimate.check(device, remedy)
    except TooLargeError as error:
        raise InputError(str(error)) from None


def model_facts(model: PreTrainedModel, max_length: int) -> dict[str, Any]:
    """Facts about the model; computed before training, which may shard the parameters across processes."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    costs = costs_of(model.config, max_length)
    return {"model_type": model.config.model_type, "parameters": parameters, "max_length": max_length, "costs": costs}
