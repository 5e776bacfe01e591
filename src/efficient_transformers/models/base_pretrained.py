"""The base of all pretrained models: initialisation and resizing of positions."""

from copy import deepcopy
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .base_configuration import EtConfig
from .base_embeddings import ExternalTokens
from .base_mixer import OwnValues
from .base_resizing import Stretch, resize_table
from .ops_checks import check_at_least


class EtPreTrainedModel(PreTrainedModel):
    """Base of all models of the zoo. A variant subclasses it, annotates `config` and names its mixer."""

    config: EtConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EtBlock", "EtReversibleBlock", "EtEmbeddings"]
    _keep_in_fp32_modules_strict = ["pooler.norm"]  # a mean in half precision is off by what tells two texts apart
    _supports_sdpa = True
    _supports_flex_attn = True
    mixer_class: ClassVar[type[nn.Module]]
    model_class: ClassVar[type[PreTrainedModel]]  # the variant's bare model, which its heads build

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True; transformers searches the source file for a class named …Attention(nn.Module), and gMLP has one."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OwnValues):
            module.reset_parameters()
        elif isinstance(module, ExternalTokens):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    def resize_positions(self, new_length: int, how: Stretch = "interpolate") -> None:
        """Set the maximum length to `new_length` tokens and resize all learned tables of positions in place.

        `tile` repeats the tables: outputs for inputs up to the old length do not change. `interpolate` moves position i
        to i·(new-1)/(old-1), interpolates linearly between them, and divides entries that are summed over positions by
        new/old; all outputs change and need some training. A smaller `new_length` cuts the tables. Hashes of Reformer
        whose `num_buckets` follow the length are drawn for the new one.

        Parameters with positions are new ones: make the optimiser afterwards. Raises ValueError for a length below 1
        or another `how`.
        """
        if self.config.image_size is not None:
            raise ValueError(
                f"new_length ({new_length}) cannot be set for a model of images: its positions are the patches of "
                f"image_size ({self.config.image_size})."
            )
        if how not in ("tile", "interpolate"):
            raise ValueError(f"how ({how!r}) must be 'tile' or 'interpolate'.")
        check_at_least("new_length", new_length, 1, "it is the longest input in tokens")
        config = deepcopy(self.config)
        config.max_position_embeddings = new_length
        with torch.device("meta"):
            sizes = {name: tensor.shape for name, tensor in type(self)(config).state_dict().items()}
        owners = [(prefix, module) for prefix, module in self.named_modules() if isinstance(module, OwnValues)]
        for prefix, module in owners:
            for name, axes in module.position_axes.items():
                if size := sizes.get(f"{prefix}.{name}"):
                    lengths = {axis: size[axis] for axis in axes}
                    resize_table(module, name, lengths, module.summed_axes.get(name, ()), how)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), EtConfig):
                module.config.max_position_embeddings = new_length  # type: ignore[union-attr]
        for _, module in owners:
            module.resized()
