"""The Transformer around each variant's equation, written out for one sequence at a time in plain torch operations.

Nothing here or in the tests of this folder imports the package beyond the table that the models are built from: an
error in a shared feature map, mask or norm must not be able to enter both sides of a comparison. An equation is a
function `mix(w, x, config)` of the hidden states (n, e) of one sequence without padding; `agree` compares a model that
computes it with `encode` for padded rows, for every attention implementation, in training and, if causal, in pieces
with a cache.
"""

from collections.abc import Callable
from itertools import pairwise
from unittest.mock import patch

import torch
from torch import Tensor

from efficient_transformers import VARIANTS

DROPOUT = 0.25
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 38,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": DROPOUT,
    "layer_norm_eps": 0.01,  # large enough to be seen where it is missing
    "initializer_range": 0.3,
    "pad_token_id": None,
}
LENGTHS = 29, 17, 12, 1  # real tokens of each row of the batches; 12 fills blocks of 2, 3, 4 and 6
WIDTH = 33
PIECES = 0, 9, 10, 11, 19, 20, 33  # where a cached pass is cut: single tokens and longer pieces
EXACT = {"rtol": 1e-9, "atol": 1e-9}

Mix = Callable[["Weights", Tensor, object], Tensor]


class Weights:
    """Parameters and buffers of a model by name, from a module on. Calling it applies a linear layer.

    layer: number of the block that the module is in.
    """

    def __init__(self, values: dict[str, Tensor], prefix: str = "", layer: int = 0):
        self.values, self.prefix, self.layer = values, prefix, layer

    def at(self, name: str, layer: int = 0) -> "Weights":
        """The same weights as seen from the module `name`."""
        return Weights(self.values, f"{self.prefix}{name}.", layer)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.values

    def __call__(self, name: str, x: Tensor) -> Tensor:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Layer normalisation (Ba et al. 2016, eq. 4) over the features, epsilon inside the root."""
        centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
        variance = (centered * centered).sum(-1, keepdim=True) / x.shape[-1]
        return centered / (variance + eps) ** 0.5 * self[f"{name}.weight"] + self[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x·Φ(x) with the exact normal distribution (Hendrycks and Gimpel 2016)."""
    return x * (1 + torch.special.erf(x / 2**0.5)) / 2


def softmax(scores: Tensor, counts: Tensor | float = 1.0) -> Tensor:
    """counts·exp(scores) over their sum along the last axis; zeros where there is nothing to attend to."""
    weights = counts * (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, counts: Tensor | float = 1.0) -> Tensor:
    """softmax(qkᵀ/√d)v (Vaswani et al. 2017, eq. 1); `counts` says how often a query attends to a key."""
    return softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, counts) @ v


def split(x: Tensor, config) -> Tensor:
    """(n, e) -> (h, n, d)."""
    return torch.stack(x.chunk(config.num_attention_heads, -1))


def join(x: Tensor) -> Tensor:
    """(h, n, d) -> (n, e)."""
    return torch.cat(list(x), -1)


def turned(x: Tensor, config) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 14): feature pair i of position m turned by the angle m·θ^(-2i/d).

    The paper pairs the features (2i, 2i + 1), the models (i, i + d/2), as checkpoints of transformers do.
    """
    if config.position_embedding_type != "rotary":
        return x
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * config.rope_theta ** (-2 * torch.arange(half).double() / x.shape[-1])
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def heads(w: Weights, x: Tensor, config) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (h, n, d) each, the former two with rotary positions if the model has them."""
    q, k, v = (split(w(f"{name}_proj", x), config) for name in "qkv")
    return turned(q, config), turned(k, config), v


def past(length: int, config) -> Tensor:
    """(n, n), True where a query may attend to a key by their order."""
    everything = torch.ones(length, length, dtype=torch.bool)
    return everything.tril() if config.is_decoder else everything


def positions(length: int) -> tuple[Tensor, Tensor]:
    """Those of queries, (n, 1), and of keys, (1, n)."""
    position = torch.arange(length)
    return position[:, None], position[None]


def embed(w: Weights, x: Tensor, config, types: Tensor | None = None, drop=lambda x: x) -> Tensor:
    """The sum of the embeddings (n, e) of tokens, positions and types; BERT's norm, FNet's projection, dropout."""
    length, size = x.shape
    if config.position_embedding_type == "learned":
        x = x + w["position_embeddings.weight"][:length]
    if config.position_embedding_type == "sinusoidal":
        # Vaswani et al. 2017, section 3.5: pos / 10000^(2i/d); here all sines stand before all cosines
        angle = torch.arange(length)[:, None] / 10000 ** (2 * torch.arange(size // 2).double() / size)
        x = x + torch.cat([angle.sin(), angle.cos()], -1)
    if config.type_vocab_size:
        x = x + w["token_type_embeddings.weight"][torch.zeros(length, dtype=torch.long) if types is None else types]
    if not config.norm_first:
        x = w.norm("norm", x, config.layer_norm_eps)
    return drop(w("projection", x) if "projection.weight" in w else x)


def encode(model, ids: Tensor, mix: Mix, types: Tensor | None = None, activation=gelu, drop=lambda x: x) -> Tensor:
    """Hidden states (n, e) of one sequence of token ids (n,) or of embeddings (n, e)."""
    w, config = Weights(model.state_dict()), model.config
    x = w["embeddings.word_embeddings.weight"][ids] if ids.dim() == 1 else ids
    x = embed(w.at("embeddings"), x, config, types, drop)
    external = w["external_tokens.weight"] if "external_tokens.weight" in w else x[:0]
    x = other = torch.cat([external, x])
    eps = config.layer_norm_eps
    for layer in range(config.num_hidden_layers):
        block = w.at(f"layers.{layer}")
        mixer = block.at("mixer", layer)

        def mixed(x: Tensor, block=block, mixer=mixer) -> Tensor:
            return drop(mix(mixer, block.norm("mixer_norm", x, eps) if config.norm_first else x, config))

        def fed(x: Tensor, block=block) -> Tensor:
            x = block.norm("mlp_norm", x, eps) if config.norm_first else x
            return drop(block("mlp.down_proj", activation(block("mlp.up_proj", x))))

        has_mlp = "mlp.up_proj.weight" in block
        if config.reversible:  # Gomez et al. 2017, section 3.1
            x = x + mixed(other)
            other = other + fed(x)
        elif config.norm_first:
            x = x + mixed(x)
            x = x + fed(x) if has_mlp else x
        else:  # Vaswani et al. 2017, section 3.1: LayerNorm(x + Sublayer(x))
            x = block.norm("mixer_norm", x + mixed(x), eps)
            x = block.norm("mlp_norm", x + fed(x), eps) if has_mlp else x
    if config.reversible:
        x = (x + other) / 2
    if config.norm_first:
        x = w.norm("norm", x, eps)
    return x[len(external) :]


def build(slug: str, head: str | None = None, noise: float = 0.2, **fields):
    """A small model in eval mode and float64, no weight of which is still the zero, one or mean that it started as."""
    torch.manual_seed(3)
    variant = VARIANTS[slug]
    implementation = fields.pop("attn_implementation", "eager")
    config = variant.config_class(**{**SMALL, **fields})
    config._attn_implementation = implementation
    model = variant.model_class(head)(config).double().eval()
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def rows(lengths=LENGTHS, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Token ids and mask (b, width), with real tokens anywhere in the rows. No token repeats: equal ones would tie."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(SMALL["vocab_size"], generator=generator)[:width] for _ in lengths])
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(width, generator=generator)[:length]] = 1
    return ids, mask


def scaling_dropout():
    """Within it, dropout with rate p multiplies by 1 - p instead of drawing: its places can be written out."""

    def scale(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (1 - p) if training else x

    return patch("torch.nn.functional.dropout", scale)


def dropped(x: Tensor) -> Tensor:
    """What `scaling_dropout` makes of x."""
    return (1 - DROPOUT) * x


def agree(slug: str, mix: Mix, activation=gelu, **fields) -> None:
    """Assert that a model computes what `encode` does: alone, padded, in training and in pieces with a cache."""
    for implementation in ("eager", "sdpa"):
        model = build(slug, attn_implementation=implementation, **fields)
        ids, mask = rows()
        expected = torch.zeros(*ids.shape, model.config.hidden_size, dtype=torch.double)
        with torch.no_grad():
            for row, real in enumerate(mask.bool()):
                expected[row, real] = encode(model, ids[row, real], mix, activation=activation)
                alone = model(ids[row : row + 1, real]).last_hidden_state[0]
                torch.testing.assert_close(alone, expected[row, real], **EXACT)
            padded = model(ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(padded, expected, **EXACT)
            if model.config.is_decoder:
                torch.testing.assert_close(in_pieces(model, ids, mask), expected, **EXACT)
        trained = encode(model, ids[0], mix, activation=activation, drop=dropped)
        with scaling_dropout():
            torch.testing.assert_close(model.train()(ids[:1]).last_hidden_state[0], trained, **EXACT)


def in_pieces(model, ids: Tensor, mask: Tensor | None = None, cache=None) -> Tensor:
    """Hidden states (b, n, e) of a causal model that is given `PIECES` of its input one after another."""
    parts = []
    for start, stop in pairwise(PIECES):
        seen = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.last_hidden_state)
    return torch.cat(parts, 1)
