"""Reading and checking a source: its config, head, model and tokenizer."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..folders import check_folder
from ..models.base_configuration import TEXT_HEADS
from ..registry import VARIANTS, Variant
from ..trust import UntrustedCodeError, refusing_code
from .layouts import SOURCES, UNSUPPORTED
from .report import Report


def read_config(source: str | Path) -> PreTrainedConfig:
    """Raises ValueError for a folder with damaged files, OSError for a name that cannot be loaded from the Hub."""
    if is_local := Path(source).is_dir():
        check_folder(source)
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, local_files_only=is_local)
    except OSError as error:
        if is_local:
            raise
        raise OSError(
            f"source ({str(source)!r}) is no folder, and no model of that name could be loaded from the Hub: check the "
            f"name, the network and HF_HUB_OFFLINE ({error})"
        ) from error
    check_type(values.get("model_type"))
    # these types are installed: no code of the source is needed
    return AutoConfig.from_pretrained(source, local_files_only=is_local, trust_remote_code=False)


def check_type(model_type: Any) -> None:
    if model_type in UNSUPPORTED:
        raise ValueError(
            f"the source's model_type ({model_type!r}) cannot be converted: {UNSUPPORTED[model_type]}. Use one of "
            f"{', '.join(SOURCES)}."
        )
    if model_type not in SOURCES:
        raise ValueError(f"the source's model_type ({model_type!r}) must be one of {', '.join(SOURCES)}.")


def check_source(config: PreTrainedConfig) -> None:
    """Refuse what no variant computes."""
    check_type(config.model_type)
    source = SOURCES[config.model_type]
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"the source has {name}=True: only encoders can be converted.")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"the source's position_embedding_type ({kind!r}) must be 'absolute': no variant has weights for another."
        )
    if source.offset_positions and config.pad_token_id is None:
        raise ValueError("the source's pad_token_id (None) must be a number: its positions are counted from there.")


def stem(config: PreTrainedConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def head_of(source: str | Path | PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """The source's head under our name, or what its class is called if it has no counterpart; None: the bare body."""
    if isinstance(source, PreTrainedModel):
        known = (c.__name__ for c in type(source).__mro__ if c.__module__.startswith("transformers."))
        class_name = next(known)
    else:
        class_name = (config.architectures or [f"{stem(config)}Model"])[0]
    suffix = class_name.removeprefix(stem(config))
    return None if suffix == "Model" else SOURCES[config.model_type].suffixes.get(suffix, suffix.removeprefix("For"))


def choose_head(head: str | None, source_head: str | None, config: PreTrainedConfig, variant: Variant) -> str | None:
    wanted = source_head if head is None else None if head == "Model" else head
    known = [name for name in variant.heads if name in TEXT_HEADS]
    if SOURCES[config.model_type].is_decoder:
        if not variant.causal:
            causal = ", ".join(entry.slug for entry in VARIANTS.values() if entry.causal)
            raise ValueError(
                f"the source ({config.model_type}) is a decoder, and {variant.model_type} has no causal form: choose "
                f"one of {causal}."
            )
        known = [*(name for name in known if name != "MaskedLM"), "CausalLM"]
    if wanted is not None and wanted not in known:
        whose = "the source's" if head is None else "the"
        raise ValueError(
            f"{whose} head ({wanted!r}) must be one of {', '.join(known)} to become {variant.model_type}: "
            "name one of them, or 'Model' for the bare body."
        )
    return wanted


def name_of(source: str | Path | PreTrainedModel) -> str:
    """What the source may be called in public: no path of this machine."""
    if isinstance(source, PreTrainedModel):
        return type(source).__name__
    return Path(source).resolve().name if Path(source).is_dir() else str(source)


@contextmanager
def quiet():
    """transformers warns of weights without a place; the report names them."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def class_of(config: PreTrainedConfig, head: str | None) -> Any:
    """The class of transformers with this head, or the bare body's if there is none."""
    suffixes = [f"For{head}", *(end for end, name in SOURCES[config.model_type].suffixes.items() if name == head)]
    names = [f"{stem(config)}{suffix}" for suffix in (suffixes if head else ()) if suffix != "ForPreTraining"]
    name = next((name for name in names if hasattr(transformers, name)), f"{stem(config)}Model")
    return getattr(transformers, name)


def load_source(
    source: str | Path | PreTrainedModel, config: PreTrainedConfig, head: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The source as a model of transformers with the wanted head, and what its files lacked or had too much of.

    The wanted head and not the saved one: `bert-base-uncased` is saved as a masked language model and holds the
    pooler that a classifier begins with.
    """
    if isinstance(source, PreTrainedModel):
        return source, {}
    model_class = class_of(config, head)
    with quiet():
        return model_class.from_pretrained(
            source,
            dtype="auto",
            use_safetensors=True,
            local_files_only=Path(source).is_dir(),
            ignore_mismatched_sizes=True,  # reported among the missing ones
            output_loading_info=True,
        )


def read_tokenizer(source: str | Path, report: Report, trust_remote_code: bool = False) -> Any:
    try:
        with quiet(), refusing_code(source):
            tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=Path(source).is_dir(), trust_remote_code=trust_remote_code
            )
    except UntrustedCodeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        report.notes.append(f"no tokenizer: {type(error).__name__} while reading the source's")
        return None
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # what transformers makes of no files at all
        report.notes.append("no tokenizer: the source has none")
        return None
    return tokenizer
