"""Folders with a saved model: adjustments after saving, and checks of folders that come from elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import LARGE_INTEGER, PreTrainedTokenizerBase

from .models.base_configuration import EtConfig

CONFIG, INDEX, TOKENIZER = "config.json", "model.safetensors.index.json", "tokenizer.json"

# arguments of `from_pretrained` and of earlier calls, which transformers would save with the tokenizer
NOT_SAVED = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_length: int | None = None) -> None:
    """Set `model_max_length`, in tokens, to the maximum input length of the model of `config`, in place.

    Pipelines truncate or split long texts by it. A variant accepts `max_position_embeddings` tokens; for other models,
    `max_length` is used if the tokenizer has no limit. Arguments of earlier calls are not saved with the tokenizer.
    """
    if isinstance(config, EtConfig):
        tokenizer.model_max_length = config.max_position_embeddings
    elif max_length is not None and tokenizer.model_max_length > LARGE_INTEGER:
        tokenizer.model_max_length = max_length
    for name in NOT_SAVED:
        tokenizer.init_kwargs.pop(name, None)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # set by each call that truncates or pads, or by the tokenizer's source, and saved in tokenizer.json: it would
        # depend on whether texts had to be tokenized, and sentence-transformers' ends at the old positions
        backend.no_truncation()
        backend.no_padding()


def load_as_float32(folder: str | Path) -> None:
    """Make a model that is saved in half precision load in float32, by setting the `dtype` in its config.json.

    transformers loads a model in the precision that its config names, and most updates of fine-tuning would be lost to
    rounding in bfloat16 weights. `from_pretrained(…, dtype=torch.bfloat16)` loads the stored precision.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if config.get("dtype") in ("bfloat16", "float16"):
        text = json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True)  # as transformers writes it
        path.write_text(f"{text}\n", encoding="utf-8")


def parse_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises ValueError with the file name and the position if it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} cannot be read as JSON ({error}): save it again, or copy the file again.") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises ValueError with the file name if it holds anything else."""
    value = parse_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def parse_yaml(path: str | Path) -> Any:
    """Parse a YAML file. Raises ValueError with the file name and the position if it is not valid YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error}): correct it, or copy the file again.") from None


def load_card(path: str | Path, **arguments: Any) -> ModelCard:
    """Load a model card. Raises ValueError with the file name if its metadata cannot be read."""
    try:
        return ModelCard.load(path, **arguments)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of its model card {path} cannot be read ({error}): correct them.") from None


def check_weights(folder: str | Path) -> None:
    """Raise ValueError with the file name if any file of weights in `folder` is incomplete.

    Opening a file reads its header and compares the size stated there with that of the file; no tensor is loaded.
    """
    root = Path(folder)
    tensors: dict[str, set[str]] = {}
    for path in sorted(root.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors[path.name] = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size:,} bytes) is not a complete safetensors file: {error}. Copy or download "
                "it again."
            ) from None
    if not (root / INDEX).exists():
        return
    index = read_json(root / INDEX).get("weight_map")
    if not isinstance(index, Mapping):
        raise ValueError(f"{root / INDEX} has no weight_map: save the model again.")
    for name, shard in index.items():
        if name not in tensors.get(shard, ()):
            raise ValueError(f"{root / INDEX} lists {name} in {shard}, which does not have it: copy that file again.")


def check_folder(folder: str | Path) -> None:
    """Raise ValueError with the file name if any JSON, YAML, tokenizer or weights file in `folder` cannot be read."""
    for path in sorted(Path(folder).glob("*.json")):
        (read_json if path.name == CONFIG else parse_json)(path)
    for path in sorted(Path(folder).glob("*.yaml")):
        parse_yaml(path)
    if (path := Path(folder) / TOKENIZER).exists():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own for them
            raise ValueError(
                f"{path} does not hold a tokenizer ({error}): save it again, or copy the file again."
            ) from None
    check_weights(folder)
