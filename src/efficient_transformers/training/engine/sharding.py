"""Models with weights sharded across processes (FSDP2, DeepSpeed ZeRO): what to shard, and how to gather it."""

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
    """Return True if accelerate should be created with `cpu=True`; prepare sharding on CPUs if it was requested.

    Without `cpu=True`, accelerate treats several processes without a GPU as independent runs. accelerate shards weights
    only on accelerators, but torch and DeepSpeed also shard over gloo, which the tests need. With `cpu=True`,
    accelerate silently disables DeepSpeed, and every process holds all weights.
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
    """Refuse FSDP1, and set the batch sizes of DeepSpeed, which accumulates gradients itself and has no loader here."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        of_process = settings.step_size(accelerator.num_processes) / accelerator.num_processes
        plugin: Any = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_accumulation_steps": math.ceil(of_process / settings.batch_size),
        }
        # transformers would shard a model during construction, regardless of zero3_init_flag: until it is prepared,
        # parameters could not be counted and no checkpoint could be loaded into it
        plugin.dschf = None
        unset_hf_deepspeed_config()
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "fsdp_version (1) is not supported, because its checkpoints use other names: set fsdp_version: 2 in the "
            "config of accelerate, as in configs/accelerate/fsdp2.yaml."
        )


def name_blocks(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Set the modules that FSDP wraps separately, the blocks of the model, unless accelerate's config sets them.

    `_no_split_modules` also lists classes that this model does not contain, and embeddings, which may share weights
    with a head outside. The layers of a reversible stack run in parts, which FSDP cannot see, so it is wrapped as a
    whole.
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
    """Full state dict, tied weights once, on every process or only the main one. Collective: call it on every rank."""
    if not is_divided(accelerator):
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return clean_state_dict_for_safetensors(dict(model.state_dict()))
    state = dict(accelerator.get_state_dict(model) or {})  # only the main process has it
    for tied, source in getattr(accelerator.unwrap_model(model), "all_tied_weights_keys", {}).items():
        if source in state:  # tied weights are gathered separately and no longer share memory
            state.pop(tied, None)
    return clean_state_dict_for_safetensors(state)


def load_whole(accelerator: Accelerator, model: nn.Module, path: Any) -> None:
    """Load weights returned by `whole_state`. Collective: call it on every rank."""
    if accelerator.is_fsdp2:
        state: Any = load_file(path)
        # strict would report tied weights as missing, since they are stored once
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
