"""Image processor for models of the zoo: converts pictures to `pixel_values`."""

from typing import Any

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .base_configuration import EtConfig
from .base_images import image_sides

RED_GREEN_BLUE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's mode "L"


class EtImagesKwargs(ImagesKwargs, total=False):
    """do_grayscale: one channel of brightness instead of three of colour."""

    do_grayscale: bool


class EtImageProcessor(PilBackend):
    """Resizes, rescales to [0, 1] and normalises to [-1, 1] by default; colour or brightness alone.

    A pipeline hands on every image in three colours, that of a model of one channel too.
    """

    valid_kwargs = EtImagesKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    image_mean = 0.5
    image_std = 0.5
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_grayscale = False

    @classmethod
    def for_model(cls, config: EtConfig, **changes) -> "EtImageProcessor":
        """The processor of images as the model with `config` reads them; `changes` are fields of its own."""
        height, width = image_sides(config.check_image_size())
        fields = {"size": {"height": height, "width": width}, "do_grayscale": config.num_channels == 1}
        return cls(**{**fields, **changes})

    def _preprocess(self, images: list[np.ndarray], *args, do_grayscale: bool = False, **kwargs) -> BatchFeature:
        if do_grayscale:
            images = [to_grayscale(image) for image in images]
        return super()._preprocess(images, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        name = fields.get("auto_map", {}).get("AutoImageProcessor")
        if isinstance(name, str):
            # from plain text transformers derives a video processor, too, and asks whether to run its code
            fields["auto_map"] = {"AutoImageProcessor": [name, None]}
        return fields


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """(3, height, width) -> (1, height, width) in the same dtype; one channel is left as it is."""
    if len(image) == 1:
        return image
    grey = np.tensordot(RED_GREEN_BLUE, image[:3], 1)[None]
    return (grey.round() if image.dtype == np.uint8 else grey).astype(image.dtype)
