"""The matrices by which a model mixes positions, read from the model while it runs on an input.

Nothing here knows the formula of a variant: weights are those that its mixer returns, parameters those that it
multiplies by, found by giving it the identity.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .models.attention import SequenceInfo, group_heads
from .models.configuration import EtConfig, PatternConfig
from .models.kernel_attention import KernelConfig
from .models.modeling_compressed import EtCompressedAttention
from .models.modeling_fnet import FourierMixer
from .models.modeling_full import EtFullConfig, EtFullModel
from .models.modeling_gmlp import SpatialGatingMixer
from .models.modeling_linformer import EtLinformerAttention
from .models.modeling_mlp_mixer import TokenMixer
from .models.modeling_routing import EtRoutingAttention
from .models.patterns import AttentionPattern

KINDS = ("nothing", "local", "stride", "global", "random")  # why a query reads a key, by number


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer.

    name: which head, and what it is.
    values: (rows, columns), float64, in front of the values or, of parameters, of the hidden states.
    kinds: (rows, columns) int64, the number in KINDS of why a query reads a key, where a pattern says so; else None.
    rows, columns: what they count.
    """

    name: str
    values: Tensor
    kinds: Tensor | None = None
    rows: str = "query"
    columns: str = "key"


@torch.no_grad()
def read_matrices(model: PreTrainedModel, input_ids: Tensor, layer: int | None = None) -> list[Matrix]:
    """The matrices of a bare model on one input (1, n), head by head; heads with the same pattern are one matrix.

    layer: None takes the first layer and those whose patterns differ from all before them. Weights are computed in
    float64, in which none vanishes by rounding that the formula does not. External tokens stand in front, as in the
    model. Raises ValueError for a layer that the model does not have.
    """
    config: EtConfig = model.config  # type: ignore[reportAssignmentType]
    layers = different_layers(config) if layer is None else [layer]
    if not all(0 <= number < config.num_hidden_layers for number in layers) or not layers:
        raise ValueError(f"layer ({layer}) must lie between 0 and num_hidden_layers ({config.num_hidden_layers}) - 1.")
    seen: dict[int, tuple[Tensor, SequenceInfo]] = {}
    mixers: list[Any] = [block.mixer for block in model.layers]  # type: ignore[union-attr]
    hooks = [
        mixers[number].register_forward_pre_hook(lambda _, given, number=number: seen.__setitem__(number, given))
        for number in layers
    ]
    dtype, training = model.dtype, model.training
    model.eval().double()
    try:
        # without a cache, which would hold this pass when the mixer is asked for its weights
        model(input_ids.to(model.device), use_cache=False)
        found = []
        for number in layers:
            hidden, sequence = seen[number]
            parts = list(matrices_of(mixers[number], hidden, replace(sequence, output_attentions=True)))
            where = f"layer {number}, " if len(layers) > 1 else ""
            found += [
                replace(part, name=where + part.name, values=part.values.detach().double().cpu()) for part in parts
            ]
    finally:
        for hook in hooks:
            hook.remove()
        model.to(dtype).train(training)  # type: ignore[reportArgumentType] — typed as if it were a function
    return found


def different_layers(config: EtConfig) -> list[int]:
    """The first layer, and those with patterns that no layer before has; seeds do not count."""
    if not isinstance(config, PatternConfig):
        return [0]
    first: dict[tuple, int] = {}
    for layer in range(config.num_hidden_layers):
        first.setdefault(tuple(replace(pattern, seed=0) for pattern in config.attention_patterns(layer)), layer)
    return list(first.values())


def matrices_of(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """Those of one mixer for what came into it: (1, n, e)."""
    length = hidden.shape[1]
    match mixer:
        case FourierMixer():
            yield from fourier_matrices(mixer, hidden, sequence)
            return
        case SpatialGatingMixer():
            eye = torch.eye(length, dtype=hidden.dtype, device=hidden.device)[None]
            yield Matrix("spatial weight W", (mixer.mix(eye) - mixer.mix(0 * eye))[0], rows="token", columns="reads")
            return
        case TokenMixer():
            size = "hidden unit"
            yield Matrix("W₁, reading", mixer.reading_weight[:, :length], rows=size, columns="token")
            yield Matrix("W₂, writing", mixer.writing_weight[:length], rows="token", columns=size)
            return
    weights = mixer(hidden, sequence)[1][0]  # (h, n, n)
    match mixer:
        case EtLinformerAttention():
            projections: list[Any] = [*mixer.projections] or [sequence.shared]
            matrix = projections[-1].matrix(length).expand(len(weights), -1, -1).to(weights)  # (h, k, n)
            # what is returned are the n×k weights times F: they are its factor, alone where F has full rank
            reads = torch.linalg.lstsq(matrix.mT, weights.mT, driver="gelsd").solution.mT
            yield Matrix("F, the projection of the values", matrix[0], rows="projected value", columns="token")
            for head, some in enumerate(reads):
                yield Matrix(f"head {head}: weights of the projected", some, columns="projected key")
        case EtCompressedAttention(is_local=False):
            factor = mixer.config.compression_factor
            padded = nn.functional.pad(weights, (0, -length % factor))
            reads = padded.unflatten(-1, (-1, factor)).sum(-1)  # parts of a segment's weight stand at its tokens
            yield from (Matrix(f"head {head}: segments", some, columns="segment") for head, some in enumerate(reads))
        case EtRoutingAttention():
            groups = group_heads([mixer.window], mixer.sides[0])
            yield from pattern_matrices(groups, weights)
            for head in range(mixer.sides[0], len(weights)):
                yield Matrix(f"head {head}: its cluster", weights[head])
        case _ if isinstance(mixer.config, PatternConfig):
            yield from pattern_matrices(mixer.groups, weights)
        case _ if isinstance(mixer.config, KernelConfig):
            softmax = full_attention_like(mixer)(hidden, sequence)[1][0]
            for head, (some, others) in enumerate(zip(weights, softmax, strict=True)):
                yield Matrix(f"head {head}: implied weights", some)
                yield Matrix(f"head {head}: softmax's", others)
        case _:
            yield from (Matrix(f"head {head}", some) for head, some in enumerate(weights))


def pattern_matrices(groups: tuple, weights: Tensor) -> Iterator[Matrix]:
    """Where heads read, and by which part of their pattern; heads that read the same are one."""
    for pattern, heads in groups:
        if pattern.is_full:  # there is no pattern to see, but what the heads make of the input
            yield from (Matrix(f"head {head}: full", weights[head]) for head in heads)
            continue
        same: list[list[int]] = []
        for head in heads:
            twin = next((other for other in same if (weights[other[0]] > 0).equal(weights[head] > 0)), None)
            same.append([head]) if twin is None else twin.append(head)
        for some in same:
            name = "all heads" if len(some) == len(weights) else f"head{'s' * (len(some) > 1)} {spans(some)}"
            kinds = kinds_of(pattern, weights[some[0]] > 0).cpu()
            yield Matrix(f"{name}: {pattern.name}", weights[some[0]], kinds)


def spans(numbers: list[int]) -> str:
    """`0-3` or `0, 4`."""
    is_run = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if is_run else ", ".join(map(str, numbers))


def kinds_of(pattern: AttentionPattern, read: Tensor) -> Tensor:
    """(n, n) int64 numbers in KINDS for the pairs that are `read` (n, n): which part of `pattern` gives them."""
    i = torch.arange(len(read), device=read.device)[:, None]
    j, length = i.T, len(read)
    window = "stride" if pattern.dilation > 1 else "local"
    # what neither window nor global tokens give, random blocks have given
    kinds = torch.where(pattern.in_window(i, j), KINDS.index(window), KINDS.index("random"))
    is_global = pattern.is_global(i, length) | pattern.is_global(j, length)
    return torch.where(is_global, KINDS.index("global"), kinds) * read


def fourier_matrices(mixer: FourierMixer, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """What the transform does to unit vectors of positions, at two of four frequencies of the features.

    With x = u_j u_f the output at feature g is Re exp(-2πi(jk/n + fg/4)): at g = f = 0 cosines, at g = f = 1, where
    the factor of the features is -i, minus sines.
    """
    length = hidden.shape[1]
    units = torch.zeros(length, length, 4, dtype=hidden.dtype, device=hidden.device)
    for feature, name in ((0, "cosines"), (1, "minus sines")):
        one = units.clone()
        one[:, :, feature] = torch.eye(length, dtype=hidden.dtype, device=hidden.device)
        plain = replace(sequence, positions=torch.arange(length, device=hidden.device)[None].expand(length, -1))
        mixed = mixer(one, plain)[0]  # (unit, n, 4)
        yield Matrix(f"{name} of the transform", mixed[:, :, feature].T, rows="frequency", columns="token")


def full_attention_like(mixer: Any) -> nn.Module:
    """A mixer of full attention with the projections of `mixer`."""
    config = mixer.config
    full = EtFullConfig(**{field.name: getattr(config, field.name) for field in fields(EtConfig) if field.init})
    twin = EtFullModel.mixer_class(full, mixer.layer).to(mixer.q_proj.weight)
    twin.load_state_dict(mixer.state_dict(), strict=False)
    return twin.eval()
