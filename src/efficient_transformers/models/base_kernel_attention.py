"""Multi-head attention through a feature map: what the four variants of (VK)Q share, their config and their cache."""

import torch
from torch import Tensor
from transformers import initialization as init
from transformers.cache_utils import CacheLayerMixin

from .attn_linear import (
    LinearState,
    attention_matrix,
    causal_linear_attention,
    linear_attention,
    linear_attention_step,
)
from .base_attention import MultiHeadAttention
from .base_cache import SelectableRows
from .base_mixer import SequenceInfo
from .ops_checks import check_at_least
from .ops_feature_maps import FeatureMap, gaussian_projection, orthogonal_projection


class KernelConfig:
    """Mixin of the configs whose attention goes through a feature map."""

    @property
    def features(self) -> FeatureMap:
        raise NotImplementedError

    @property
    def features_per_head(self) -> int:
        """f, what the map makes of the d of a head."""
        return self.head_dim  # type: ignore[attr-defined]

    def validate_dropout(self):
        if self.attention_probs_dropout_prob:  # type: ignore[attr-defined]
            raise ValueError(
                f"attention_probs_dropout_prob ({self.attention_probs_dropout_prob}) must be 0: there is no matrix of "  # type: ignore[attr-defined]
                "attention weights to drop from; use hidden_dropout_prob."
            )


class RandomFeatureConfig(KernelConfig):
    """Mixin of those whose map is drawn at random. Adds no field: a strict config has to name its own.

    num_random_features: f, features per head.
    feature_seed: of the draw.
    feature_redraw_interval: forward passes in training after which the features are drawn again; None never does.
    """

    num_random_features: int
    feature_seed: int
    feature_redraw_interval: int | None
    orthogonal = False

    @property
    def features_per_head(self) -> int:
        return self.num_random_features * self.features.per_row

    def validate_features(self):
        check_at_least("num_random_features", self.num_random_features, 1, "they carry the keys and values")
        if self.feature_redraw_interval is not None:
            check_at_least("feature_redraw_interval", self.feature_redraw_interval, 1, "None never draws again")


class StateCacheLayer(SelectableRows, CacheLayerMixin):
    """The state of linear attention: sums over all tokens so far, of a size that does not grow with them."""

    kept = "sums over all tokens"

    def __init__(self):
        super().__init__()
        self.state: LinearState | None = None
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first state is made by the attention."""

    def update(self, state: LinearState, tokens: int, *args, **kwargs) -> None:  # type: ignore[override]
        """`state` takes the place of the last one, `tokens` further on."""
        self.state = state
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = None
        super().reset()

    @property
    def num_rows(self) -> int:
        return 0 if self.state is None else len(self.state.sums)

    def select(self, rows: Tensor) -> None:
        if self.state is not None:
            rows = rows.to(self.state.sums.device)
            self.state = LinearState(*(x if x is None else x[rows] for x in self.state))  # type: ignore[arg-type]


class KernelAttention(MultiHeadAttention):
    """Attention whose weights are φ(q)·φ(k) over their sum, by `config.features`.

    `attn_implementation="eager"` writes the weights out; otherwise nothing grows faster than the length. Behind a cache
    the past is a state of fixed size.
    """

    cache_class = StateCacheLayer
    projection: Tensor | None

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.register_buffer("projection", None)

    def attend(self, hidden: Tensor, sequence: SequenceInfo) -> tuple[Tensor, Tensor | None]:
        """Per-head output, (b, h, n, d), and the weights if requested and no past is cached."""
        q, k = self.scaled(*(self.split_heads(proj(hidden), sequence.rotary) for proj in (self.q_proj, self.k_proj)))
        v, decay = self.split_heads(self.v_proj(hidden)), self.log_decay(hidden, sequence.padding_mask)
        # another pass may draw new features before this one runs again
        how = self.config.features, sequence.cached_choice(self.layer, lambda: self.projection), sequence.padding_mask
        out = weights = None
        if sequence.cache is not None:
            memory: StateCacheLayer = sequence.cache.layers[self.layer]  # type: ignore[assignment]
            past, rule = memory.state, linear_attention_step if q.shape[2] == 1 else causal_linear_attention
            out, state = rule(q, k, v, *how, decay, past)
            memory.update(state, q.shape[2])
            if past is not None:
                return out, None
        if self.engine(hidden, sequence) == "dense":
            weights = attention_matrix(q, k, *how, self.config.is_decoder, decay).to(v.dtype)
            out = weights @ v
        if out is None and self.config.is_decoder:
            out, _ = causal_linear_attention(q, k, v, *how, decay)
        return linear_attention(q, k, v, *how) if out is None else out, weights

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the feature map wants them."""
        return q, k

    def log_decay(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """Logarithm of a recency gate, (b, h, n), 0 at padding; None has no gate."""
        return None

    def new_cache_layer(self) -> StateCacheLayer:
        return StateCacheLayer()


class RandomFeatureAttention(KernelAttention):
    """Features from a projection that is drawn from the seed in the config, and in training now and then drawn again.

    The draw is a function of (seed, layer, number of the draw); the number is a buffer, so a run that is continued goes
    on with the features it had.
    """

    projection: Tensor  # type: ignore[reportIncompatibleVariableOverride]
    passes: Tensor

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.register_drawn("projection", self.draw(0))  # instead of None
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))  # forward passes in training

    def draw(self, number: int) -> Tensor:
        """The projection after `number` redraws, (h, rows, d), float32, on the CPU."""
        config = self.config
        seed = (config.feature_seed + 0x10001 * self.layer + 0x9E3779B1 * number) % 2**63
        make = orthogonal_projection if config.orthogonal else gaussian_projection
        rows = config.num_random_features
        return make(self.num_heads, rows, self.head_dim, torch.Generator("cpu").manual_seed(seed))

    def count_pass(self) -> None:
        interval = self.config.feature_redraw_interval
        if interval is None or not self.learns:
            return
        self.passes += 1
        if int(self.passes) % interval == 0:
            # a new tensor: the old one may still be needed by a backward pass
            drawn = self.draw(int(self.passes) // interval)
            self.projection = drawn.to(self.projection.device, self.projection.dtype)

    def reset_parameters(self) -> None:
        init.copy_(self.projection, self.draw(0))
        init.zeros_(self.passes)
