"""The table of variants, and the only place that registers them with the Auto classes.

A row contains all facts about a variant. The README table, the gallery, the benchmark of all variants, the demo, the
cost tables and the tests are derived from it: a new variant needs its modeling file, a row here, a row in
`tests/helpers/zoo.py` and a test of its equation. `make pages` then updates the README and the gallery.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import ModuleType
from typing import Any, Literal

import transformers
from transformers.utils import is_vision_available

from . import mixer_costs, mixer_maps
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
from .models.base_configuration import EtConfig

Family = Literal["fixed patterns", "content-based patterns", "fewer keys", "feature maps", "no query-key products"]


def same_for_all(size: int, heads: int) -> Any:
    return size


def one_pattern_per_head(size: int, heads: int) -> list[str]:
    kinds = f"local:{size}", f"stride:{size}:3", "global:3", f"random:2:{size}"
    return [kinds[head % 4] for head in range(heads)]


@dataclass(frozen=True, eq=False)
class Variant:
    """One row of the table.

    Identity:
        slug: `et_<slug>` is the model type, `Et<Slug>…` the prefix of the class names.
        module: defines the config and the models. Its docstring has a headline, the formula (`.. math::`) and a
            description, which appear in the gallery and the model cards.
        title: name in tables and pictures.
        paper: `arXiv:<number>`.
        family: the way in which the n×n matrix is made cheaper; groups the plots of the benchmark.
    Descriptions:
        attends_to: completes "a token attends to …", as Markdown.
        cost: growth of time and memory in n tokens with d features per head; other letters are fields of the config.
    Facts, which the tests check:
        any_length: there are no per-position parameters besides the embeddings.
        chooses: the content determines which tokens a token attends to.
        normalised: the rows of `output_attentions` sum to one for every input.
    Arithmetic:
        flops: `(config, length)` → FLOPs of the mixers of all layers, see `mixer_costs`.
        state: `(config, layer, length)` → number of values in a decoder's cache; None if there is no decoder.
        linears_in_flops: parts of the names of linear layers that `flops` includes, because they do not apply to all
            tokens.
        matrices: `(mixer, hidden, sequence)` → the matrices to draw, see `mixer_maps`.
    Settings, as fields of the config:
        demo: for pictures of 32 or 64 tokens.
        benchmark: for layers of hidden size 256 and 4 heads on up to 65,536 tokens.
        knob: the field that the slider of the demo sets, if there is one.
        knob_value: `(slider, heads)` → the value of that field.
    """

    slug: str
    module: ModuleType
    _: KW_ONLY
    title: str
    paper: str
    family: Family
    attends_to: str
    cost: str
    any_length: bool = True
    chooses: bool = False
    normalised: bool = True
    flops: mixer_costs.Flops
    state: mixer_costs.State | None = None
    linears_in_flops: tuple[str, ...] = ()
    matrices: mixer_maps.Matrices = mixer_maps.default_matrices
    demo: Mapping[str, Any] = field(default_factory=dict)
    benchmark: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    knob_value: Callable[[int, int], Any] = same_for_all

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

    @property
    def causal(self) -> bool:
        """True if there is a CausalLM head."""
        return "CausalLM" in self.heads

    @property
    def attention(self) -> bool:
        """True if there are attention weights."""
        return self.config_class.attends

    def model_class(self, head: str | None = None) -> type[transformers.PreTrainedModel]:
        """The class with a head (`"MaskedLM"`, …), or the bare model."""
        return getattr(self.module, f"{self.stem}For{head}" if head else f"{self.stem}Model")

    def knob_fields(self, slider: int, heads: int) -> dict[str, Any]:
        """The config field set by a position of the demo's slider, or an empty dict."""
        return {} if self.knob is None else {self.knob: self.knob_value(slider, heads)}


VARIANTS = {
    variant.slug: variant
    for variant in (
        Variant(
            "full",
            modeling_full,
            title="full attention",
            paper="arXiv:1706.03762",
            family="fixed patterns",
            attends_to="every token: the reference",
            cost="n²·d",
            flops=mixer_costs.pattern_flops,
            state=mixer_costs.pattern_state,
            matrices=mixer_maps.pattern_matrices,
        ),
        Variant(
            "local",
            modeling_local,
            title="local (sliding window)",
            paper="arXiv:2004.05150",
            family="fixed patterns",
            attends_to="`window_size` neighbours on each side",
            cost="n·window_size·d",
            flops=mixer_costs.pattern_flops,
            state=mixer_costs.pattern_state,
            matrices=mixer_maps.pattern_matrices,
            demo={"window_size": 6},
            benchmark={"window_size": 128},
            knob="window_size",
        ),
        Variant(
            "stride",
            modeling_stride,
            title="strided",
            paper="arXiv:1904.10509",
            family="fixed patterns",
            attends_to="every `stride`-th token, `hops` of them on each side or all",
            cost="n·hops·d, or n²/stride·d",
            flops=mixer_costs.pattern_flops,
            state=mixer_costs.pattern_state,
            matrices=mixer_maps.pattern_matrices,
            demo={"stride": 8, "hops": 3},
            benchmark={"stride": 64, "hops": 2},
            knob="stride",
        ),
        Variant(
            "global",
            modeling_global,
            title="global tokens",
            paper="arXiv:2004.08483",
            family="fixed patterns",
            attends_to="a few global tokens, which attend to every token: the first, marked, or learned ones",
            cost="n·num_global_tokens·d",
            flops=mixer_costs.pattern_flops,
            state=mixer_costs.pattern_state,
            matrices=mixer_maps.pattern_matrices,
            demo={"num_global_tokens": 3},
            benchmark={"num_global_tokens": 2},
            knob="num_global_tokens",
        ),
        Variant(
            "mixed",
            modeling_mixed,
            title="a pattern per head",
            paper="arXiv:1904.10509",
            family="fixed patterns",
            attends_to="a pattern per head: `local:128`, `stride:64:2`, `global:2`, `random:3`, or a union by `|`",
            cost="mean of the heads",
            flops=mixer_costs.pattern_flops,
            state=mixer_costs.pattern_state,
            matrices=mixer_maps.pattern_matrices,
            demo={"num_attention_heads": 4, "head_patterns": ["local:6", "stride:8:3", "global:3", "random:2:4"]},
            benchmark={"head_patterns": ["local:128", "stride:64:2", "global:2", "random:3"]},
            knob="head_patterns",
            knob_value=one_pattern_per_head,
        ),
        Variant(
            "longformer",
            modeling_longformer,
            title="Longformer",
            paper="arXiv:2004.05150",
            family="fixed patterns",
            attends_to="a window and global tokens, whose rows have their own projections; or one pattern per head",
            cost="n·attention_window·d",
            flops=mixer_costs.longformer_flops,
            state=mixer_costs.pattern_state,
            linears_in_flops=(".global_",),
            matrices=mixer_maps.pattern_matrices,
            demo={"attention_window": 12, "num_global_tokens": 3},
            benchmark={"attention_window": 256, "num_global_tokens": 1},
            knob="attention_window",
            knob_value=lambda slider, heads: 2 * slider,  # both sides together
        ),
        Variant(
            "big_bird",
            modeling_big_bird,
            title="BigBird",
            paper="arXiv:2007.14062",
            family="fixed patterns",
            attends_to="a window of blocks, the first, the last and random blocks; or one pattern per head",
            cost="n·block_size·d",
            flops=mixer_costs.pattern_flops,
            matrices=mixer_maps.pattern_matrices,
            demo={"block_size": 4, "num_random_blocks": 2},
            benchmark={"block_size": 64, "num_random_blocks": 3},
            knob="block_size",
        ),
        Variant(
            "reformer",
            modeling_reformer,
            title="Reformer",
            paper="arXiv:2001.04451",
            family="content-based patterns",
            attends_to="tokens whose vectors point in a similar direction, found by several rounds of hashing",
            cost="n·num_hashes·lsh_chunk_length·d",
            chooses=True,
            flops=mixer_costs.reformer_flops,
            state=mixer_costs.keys_and_values,
            demo={"lsh_chunk_length": 8, "num_hashes": 2, "position_embedding_type": "none"},
            knob="lsh_chunk_length",
        ),
        Variant(
            "routing",
            modeling_routing,
            title="Routing Transformer",
            paper="arXiv:2003.05997",
            family="content-based patterns",
            attends_to="the tokens of its cluster, found by online k-means; in half of the heads, a window",
            cost="n·(num_clusters + n/num_clusters)·d",
            chooses=True,
            flops=mixer_costs.routing_flops,
            state=mixer_costs.keys_and_values,
            matrices=mixer_maps.routing_matrices,
            demo={"num_clusters": 8, "window_size": 6, "position_embedding_type": "none"},
            knob="window_size",
        ),
        Variant(
            "sinkhorn",
            modeling_sinkhorn,
            title="Sinkhorn sorting network",
            paper="arXiv:2002.11296",
            family="content-based patterns",
            attends_to="its own block and one mixed from all blocks by a learned sorting; or the first sorted ones",
            cost="n·(block_size + n/block_size)·d",
            flops=mixer_costs.sinkhorn_flops,
            state=mixer_costs.sinkhorn_state,
            linears_in_flops=(".sorting_network.",),
            demo={"block_size": 8, "sinkhorn_temperature": 0.005},
            knob="block_size",
        ),
        Variant(
            "linformer",
            modeling_linformer,
            title="Linformer",
            paper="arXiv:2006.04768",
            family="fewer keys",
            attends_to="`projected_length` learned sums over all positions",
            cost="n·projected_length·d",
            any_length=False,
            normalised=False,
            flops=mixer_costs.linformer_flops,
            linears_in_flops=(".k_proj", ".v_proj"),
            matrices=mixer_maps.linformer_matrices,
            demo={"projected_length": 16},
            knob="projected_length",
        ),
        Variant(
            "compressed",
            modeling_compressed,
            title="memory-compressed attention",
            paper="arXiv:1801.10198",
            family="fewer keys",
            attends_to="in turn its block of `block_size` tokens, and a key for every `compression_factor` tokens",
            cost="n²/compression_factor·d, and n·block_size·d",
            flops=mixer_costs.compressed_flops,
            state=mixer_costs.compressed_state,
            matrices=mixer_maps.compressed_matrices,
            demo={"num_hidden_layers": 2, "compression_factor": 4, "block_size": 16},
            benchmark={"attention_layers": ["compressed"]},
            knob="block_size",
        ),
        Variant(
            "synthesizer",
            modeling_synthesizer,
            title="Synthesizer",
            paper="arXiv:2005.00743",
            family="no query-key products",
            attends_to="every token, by weights that compare no tokens: trained, low-rank, or made from the token",
            cost="n²·d",
            any_length=False,
            flops=mixer_costs.synthesizer_flops,
            state=mixer_costs.synthesizer_state,
            demo={"synthesizer_type": "factorized_random", "factor_rank": 4},
            knob="factor_rank",
        ),
        Variant(
            "efficient",
            modeling_efficient,
            title="Efficient Attention",
            paper="arXiv:1812.01243",
            family="feature maps",
            attends_to="every token, through sums: softmax over a query's features and over the keys' positions",
            cost="n·d²",
            flops=mixer_costs.kernel_flops,
            state=mixer_costs.kernel_state,
            matrices=mixer_maps.kernel_matrices,
        ),
        Variant(
            "linear",
            modeling_linear,
            title="Linear Transformer",
            paper="arXiv:2006.16236",
            family="feature maps",
            attends_to="every token, through sums: elu + 1 of queries and keys instead of exp",
            cost="n·d²",
            flops=mixer_costs.kernel_flops,
            state=mixer_costs.kernel_state,
            matrices=mixer_maps.kernel_matrices,
        ),
        Variant(
            "rfa",
            modeling_rfa,
            title="Random Feature Attention",
            paper="arXiv:2103.02143",
            family="feature maps",
            attends_to="every token, through sums: the Gaussian kernel by random features, with an optional gate",
            cost="n·num_random_features·d",
            normalised=False,
            flops=mixer_costs.kernel_flops,
            state=mixer_costs.kernel_state,
            matrices=mixer_maps.kernel_matrices,
            demo={"num_random_features": 64},
            benchmark={"num_random_features": 128},
            knob="num_random_features",
        ),
        Variant(
            "performer",
            modeling_performer,
            title="Performer",
            paper="arXiv:2009.14794",
            family="feature maps",
            attends_to="every token, through sums: softmax attention estimated with positive random features",
            cost="n·num_random_features·d",
            flops=mixer_costs.kernel_flops,
            state=mixer_costs.kernel_state,
            matrices=mixer_maps.kernel_matrices,
            demo={"num_random_features": 64},
            benchmark={"num_random_features": 256},
            knob="num_random_features",
        ),
        Variant(
            "fnet",
            modeling_fnet,
            title="FNet",
            paper="arXiv:2105.03824",
            family="no query-key products",
            attends_to="every token, by a Fourier transform over tokens and features, without parameters",
            cost="n·log(n)·d",
            flops=mixer_costs.no_flops,
            matrices=mixer_maps.fourier_matrices,
        ),
        Variant(
            "gmlp",
            modeling_gmlp,
            title="gMLP",
            paper="arXiv:2105.08050",
            family="no query-key products",
            attends_to="every token, by a trained matrix that gates an MLP; optionally also with a tiny attention",
            cost="n²·intermediate_size",
            any_length=False,
            flops=mixer_costs.gmlp_flops,
            state=mixer_costs.gmlp_state,
            matrices=mixer_maps.gate_matrices,
        ),
        Variant(
            "mlp_mixer",
            modeling_mlp_mixer,
            title="MLP-Mixer",
            paper="arXiv:2105.01601",
            family="no query-key products",
            attends_to="every token, by an MLP over the positions, shared by all features",
            cost="n·token_mixing_size·hidden_size",
            any_length=False,
            flops=mixer_costs.mlp_mixer_flops,
            matrices=mixer_maps.token_mlp_matrices,
            demo={"token_mixing_size": 32},
            knob="token_mixing_size",
        ),
    )
}


def variant_of(config: transformers.PreTrainedConfig) -> Variant:
    """The row of a config. Raises ValueError if its model type is not a variant."""
    variant = VARIANTS.get(config.model_type.removeprefix("et_"))
    if variant is None:
        known = ", ".join(variant.model_type for variant in VARIANTS.values())
        raise ValueError(f"the config's model_type ({config.model_type!r}) must be a variant of the zoo: {known}.")
    return variant


def register_all() -> None:
    """Register every variant with AutoConfig, AutoModel and AutoModelFor…; can be called repeatedly."""
    for variant in VARIANTS.values():
        config_class = variant.config_class
        transformers.AutoConfig.register(variant.model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for head in (None, *variant.heads):
            auto_name = f"AutoModelFor{head}" if head else "AutoModel"
            getattr(transformers, auto_name).register(config_class, variant.model_class(head), exist_ok=True)
            variant.model_class(head).register_for_auto_class(auto_name)
        if is_vision_available():
            # before transformers 5.18, transformers.AutoImageProcessor is a dummy without torchvision; this one is not
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            from .models.base_image_processing import EtImageProcessor  # imports Pillow

            # transformers first looks for a processor with torchvision, and warns if there is none
            processors: dict[str, type] = dict.fromkeys(("pil", "torchvision"), EtImageProcessor)
            AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)
            EtImageProcessor.register_for_auto_class()
