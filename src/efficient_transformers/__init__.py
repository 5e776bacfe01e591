"""A Hugging Face-compatible zoo of efficient self-attention.

Importing the package registers every variant with transformers' Auto classes:

    import efficient_transformers
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("et_local", window_size=128))
"""

from transformers.utils import is_vision_available

from .any_model.cache import BoundedCache
from .any_model.configure import register, set_attention
from .any_model.positions import resize_positions
from .conversion import convert
from .models.ops_patterns import AttentionPattern, parse_pattern
from .registry import VARIANTS, Variant, register_all

__version__ = "0.2.0"
__all__ = [
    "VARIANTS",
    "AttentionPattern",
    "BoundedCache",
    "Variant",
    "convert",
    "parse_pattern",
    "register_all",
    "resize_positions",
    "set_attention",
]

register_all()
register()
if is_vision_available():
    from .models.base_image_processing import EtImageProcessor

    __all__ += ["EtImageProcessor"]
for _variant in VARIANTS.values():
    for _class in (_variant.config_class, *(_variant.model_class(head) for head in (None, *_variant.heads))):
        globals()[_class.__name__] = _class
        __all__.append(_class.__name__)
del _variant, _class
