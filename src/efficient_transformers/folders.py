"""What every folder with a saved model needs: a tokenizer that knows the length, and weights that load as float32."""

import json
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import LARGE_INTEGER, PreTrainedTokenizerBase

from .models.base_configuration import EtConfig

# arguments of `from_pretrained` and of an earlier encoding, which transformers would save with the tokenizer
NOT_SAVED = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, max_length: int | None = None) -> None:
    """Set `model_max_length`, in tokens, to what the model of `config` takes, in place.

    Pipelines truncate and divide long texts by it. A variant takes `max_position_embeddings` tokens; for another model
    `max_length` is used if the tokenizer has no limit of its own. Arguments of earlier calls are not saved with it.
    """
    if isinstance(config, EtConfig):
        tokenizer.model_max_length = config.max_position_embeddings
    elif max_length is not None and tokenizer.model_max_length > LARGE_INTEGER:
        tokenizer.model_max_length = max_length
    for name in NOT_SAVED:
        tokenizer.init_kwargs.pop(name, None)


def load_as_float32(folder: str | Path) -> None:
    """Let a model saved in half precision load in float32, by the `dtype` in its config.json.

    transformers loads a model in the precision that its config names, and in bfloat16 weights most steps of
    fine-tuning are lost in rounding. `from_pretrained(…, dtype=torch.bfloat16)` loads the stored precision.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("dtype") in ("bfloat16", "float16"):
        text = json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True)  # as transformers writes it
        path.write_text(f"{text}\n", encoding="utf-8")
