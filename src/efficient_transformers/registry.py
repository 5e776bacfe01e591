"""The one table of variants, and the one place that talks to the Auto classes."""

from dataclasses import dataclass
from types import ModuleType

import transformers
from transformers.utils import is_vision_available

from .models import (
    modeling_big_bird,
    modeling_compressed,
    modeling_efficient,
    modeling_fnet,
    modeling_full,
    modeling_global,
    modeling_gmlp,
    modeling_linear,
    modeling_linformer,
    modeling_local,
    modeling_longformer,
    modeling_mixed,
    modeling_mlp_mixer,
    modeling_performer,
    modeling_reformer,
    modeling_rfa,
    modeling_routing,
    modeling_sinkhorn,
    modeling_stride,
    modeling_synthesizer,
)
from .models.configuration import EtConfig


@dataclass(frozen=True)
class Variant:
    """One row: what a variant is and what it can do.

    slug: `et_<slug>` is its model type.
    cost: law of its time and memory in n tokens of d features per head; the other letters are its config fields.
    causal: is there a CausalLM head? any_length: is it free of per-position parameters besides the embeddings?
    chooses: does it depend on the data which tokens a token reads? attention: are there weights of attention?
    normalised: do the rows of `output_attentions`, the matrix in front of the values, sum to one, whatever the input?
    """

    slug: str
    module: ModuleType
    title: str
    paper: str
    cost: str
    causal: bool = True
    any_length: bool = True
    chooses: bool = False
    attention: bool = True
    normalised: bool = True

    @property
    def model_type(self) -> str:
        return f"et_{self.slug}"

    @property
    def stem(self) -> str:
        return "Et" + "".join(word.capitalize() for word in self.slug.split("_"))

    @property
    def config_class(self) -> type[EtConfig]:
        return getattr(self.module, f"{self.stem}Config")

    @property
    def heads(self) -> tuple[str, ...]:
        return self.config_class.heads

    def model_class(self, head: str | None = None) -> type[transformers.PreTrainedModel]:
        """The class with a head (`"MaskedLM"`, …), or the bare model."""
        return getattr(self.module, f"{self.stem}For{head}" if head else f"{self.stem}Model")


VARIANTS = {
    variant.slug: variant
    for variant in (
        Variant("full", modeling_full, "full attention", "arXiv:1706.03762", "n²·d"),
        Variant("local", modeling_local, "local (sliding window)", "arXiv:2004.05150", "n·window_size·d"),
        Variant("stride", modeling_stride, "strided", "arXiv:1904.10509", "n·hops·d, or n²/stride·d"),
        Variant("global", modeling_global, "global tokens", "arXiv:2004.08483", "n·num_global_tokens·d"),
        Variant("mixed", modeling_mixed, "a pattern per head", "arXiv:1904.10509", "mean of the heads"),
        Variant("longformer", modeling_longformer, "Longformer", "arXiv:2004.05150", "n·attention_window·d"),
        Variant("big_bird", modeling_big_bird, "BigBird", "arXiv:2007.14062", "n·block_size·d", causal=False),
        Variant(
            "reformer",
            modeling_reformer,
            "Reformer",
            "arXiv:2001.04451",
            "n·num_hashes·lsh_chunk_length·d",
            chooses=True,
        ),
        Variant(
            "routing",
            modeling_routing,
            "Routing Transformer",
            "arXiv:2003.05997",
            "n·(num_clusters + n/num_clusters)·d",
            chooses=True,
        ),
        Variant(
            "sinkhorn",
            modeling_sinkhorn,
            "Sinkhorn sorting network",
            "arXiv:2002.11296",
            "n·(block_size + n/block_size)·d",
        ),
        Variant(
            "linformer",
            modeling_linformer,
            "Linformer",
            "arXiv:2006.04768",
            "n·projected_length·d",
            causal=False,
            any_length=False,
            normalised=False,
        ),
        Variant(
            "compressed",
            modeling_compressed,
            "memory-compressed attention",
            "arXiv:1801.10198",
            "n²/compression_factor·d, and n·block_size·d",
        ),
        Variant("synthesizer", modeling_synthesizer, "Synthesizer", "arXiv:2005.00743", "n²·d", any_length=False),
        Variant("efficient", modeling_efficient, "Efficient Attention", "arXiv:1812.01243", "n·d²"),
        Variant("linear", modeling_linear, "Linear Transformer", "arXiv:2006.16236", "n·d²"),
        Variant(
            "rfa",
            modeling_rfa,
            "Random Feature Attention",
            "arXiv:2103.02143",
            "n·num_random_features·d",
            normalised=False,
        ),
        Variant("performer", modeling_performer, "Performer", "arXiv:2009.14794", "n·num_random_features·d"),
        Variant("fnet", modeling_fnet, "FNet", "arXiv:2105.03824", "n·log(n)·d", causal=False, attention=False),
        Variant(
            "gmlp",
            modeling_gmlp,
            "gMLP",
            "arXiv:2105.08050",
            "n²·intermediate_size",
            any_length=False,
            attention=False,
        ),
        Variant(
            "mlp_mixer",
            modeling_mlp_mixer,
            "MLP-Mixer",
            "arXiv:2105.01601",
            "n·token_mixing_size·hidden_size",
            causal=False,
            any_length=False,
            attention=False,
        ),
    )
}


def register_all() -> None:
    """Make every variant known to AutoConfig, AutoModel and AutoModelFor…; harmless when repeated."""
    for variant in VARIANTS.values():
        config_class = variant.config_class
        transformers.AutoConfig.register(variant.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for head in (None, *variant.heads):
            auto_name = f"AutoModelFor{head}" if head else "AutoModel"
            getattr(transformers, auto_name).register(config_class, variant.model_class(head), exist_ok=True)
            variant.model_class(head).register_for_auto_class(auto_name)
        if is_vision_available():
            # transformers.AutoImageProcessor is a dummy without torchvision before transformers 5.18; this one never is
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            from .models.image_processing import EtImageProcessor  # imports Pillow

            # transformers looks for one with torchvision first, and warns where there is none
            processors: dict[str, type] = dict.fromkeys(("pil", "torchvision"), EtImageProcessor)
            AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)
            EtImageProcessor.register_for_auto_class()
