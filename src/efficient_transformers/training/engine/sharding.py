"""Models whose weights are divided among processes (FSDP2, DeepSpeed ZeRO): what to divide, and to have it whole."""

import math
import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from ..settings import InputError, Settings

SHARDS = ("true", "1")


def on_cpus() -> bool:
    """Whether accelerate is to be told so, which else takes several processes without a GPU for as many runs of one.

    accelerate divides weights where there is an accelerator; torch and DeepSpeed do so over gloo as well, which tests
    need. Told of CPUs, accelerate leaves DeepSpeed out without a word, and every process holds all weights.
    """
    if torch.accelerator.is_available():
        return False
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in SHARDS:
        PartialState(backend="gloo")
        return False
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in SHARDS
    if asked and PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return True


def settle_sharding(accelerator: Accelerator, settings: Settings) -> None:
    """Refuses FSDP1, and tells DeepSpeed, which accumulates by itself, what accelerate would learn from a loader."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        of_process = settings.step_size(accelerator.num_processes) / accelerator.num_processes
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": math.ceil(of_process / settings.batch_size),
        }
        # transformers would divide a model while it is made, whatever zero3_init_flag says: nothing could be counted in
        # it, and no checkpoint be read into it, until it is prepared
        plugin.dschf = None
        unset_hf_deepspeed_config()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "fsdp_version (1) cannot be trained here, its checkpoints hold other names: set fsdp_version: 2 in the "
            "config of accelerate, as in configs/accelerate/fsdp2.yaml."
        )


def name_blocks(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Says which modules FSDP is to divide each for itself, unless accelerate's config does: the blocks of the model.

    `_no_split_modules` also names what this model has none of, and embeddings, which may share weights with a head
    outside. The layers of a reversible stack run in parts, which FSDP cannot see: there the model is one piece.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    reversible = getattr(model.config, "reversible", False)
    inputs = model.get_input_embeddings()
    plugin.transformer_cls_names_to_wrap = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if type(module).__name__ in (model._no_split_modules or ())
            and not reversible
            and not any(inner is inputs for inner in module.modules())
        }
    )


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """All weights, of tied ones one, on every process or the main one: to be called on each."""
    if not is_divided(accelerator):
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return clean_state_dict_for_safetensors(dict(model.state_dict()))
    state = dict(accelerator.get_state_dict(model) or {})  # the main process alone has it
    for tied, source in getattr(accelerator.unwrap_model(model), "all_tied_weights_keys", {}).items():
        if source in state:  # gathered twice, they no longer share their memory
            state.pop(tied, None)
    return clean_state_dict_for_safetensors(state)


def load_whole(accelerator: Accelerator, model: nn.Module, path: Any) -> None:
    """Weights that `whole_state` gave, read back on every process."""
    if accelerator.is_fsdp2:
        state: Any = load_file(path)
        # strict would miss tied weights, which stand there once
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    elif is_divided(accelerator):
        import deepspeed  # type: ignore[import-not-found]

        unwrapped = accelerator.unwrap_model(model)
        with deepspeed.zero.GatheredParameters(list(unwrapped.parameters()), modifier_rank=0):
            if accelerator.is_main_process:
                load_model(unwrapped, path)
    else:
        load_model(accelerator.unwrap_model(model), path)


def is_divided(accelerator: Accelerator) -> bool:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        return plugin.zero_stage == 3
    return accelerator.is_fsdp2
