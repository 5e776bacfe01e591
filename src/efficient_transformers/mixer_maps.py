"""The matrices by which each token mixer mixes positions. Every row of `registry.VARIANTS` refers to one function.

`…_matrices(mixer, hidden, sequence)` yields the matrices of one mixer for its input `hidden` (1, n, e). No function
repeats the formula of a variant: weights are those that the mixer returns, and parameters are obtained by multiplying
them by the identity. A new mixer does not need a function: see `default_matrices`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .models.attn_pattern import group_heads
from .models.base_configuration import EtConfig
from .models.base_mixer import SequenceInfo
from .models.modeling_full import EtFullConfig, EtFullModel
from .models.ops_patterns import AttentionPattern

KINDS = ("nothing", "local", "stride", "global", "random")  # the part of a pattern that includes a pair


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer.

    name: its head and its meaning.
    values: (rows, columns), float64, as multiplied by the values or, for a parameter, by the hidden states.
    kinds: (rows, columns) int64, for each pair the index in KINDS of its part of the pattern; None without a pattern.
    rows, columns: labels of the two axes.
    """

    name: str
    values: Tensor
    kinds: Tensor | None = None
    rows: str = "query"
    columns: str = "key"


Matrices = Callable[[Any, Tensor, SequenceInfo], Iterator[Matrix]]


def default_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """Attention weights, one matrix per head; influences if the mixer returns no weights."""
    weights = mixer(hidden, sequence)[1]
    if weights is None:
        yield from influence_matrices(mixer, hidden, sequence)
    else:
        yield from (Matrix(f"head {head}", some) for head, some in enumerate(weights[0]))


def influence_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """Norms of gradients: how much the output at one token changes with the input at another.

    Entry (i, j) is the Frobenius norm of the Jacobian of output i with respect to input j, divided by √e. If all
    features are mixed by the same matrix, this is its absolute value.
    """
    length, size = hidden.shape[1:]
    # output i is taken from copy i, so that one backward pass covers all tokens
    copies = hidden.detach().repeat(length, 1, 1).requires_grad_()
    positions = sequence.positions.expand(length, -1)
    token = torch.arange(length, device=hidden.device)
    with torch.enable_grad():
        mixed = mixer(copies, replace(sequence, positions=positions, output_attentions=False, decisions={}))[0]
        outputs = [mixed[token, token, feature].sum() for feature in range(size)]
        grads = [torch.autograd.grad(output, copies, retain_graph=True)[0] for output in outputs]
    squares = sum(grad.square().sum(-1) for grad in grads)
    yield Matrix("influence", torch.as_tensor(squares / size).sqrt(), rows="token", columns="influenced by")


# patterns -------------------------------------------------------------------------------------------------------------


def pattern_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """One matrix for each group of heads that attend to the same keys."""
    return matrices_of_groups(mixer.groups, mixer(hidden, sequence)[1][0])


def matrices_of_groups(groups: tuple, weights: Tensor) -> Iterator[Matrix]:
    for pattern, heads in groups:
        if pattern.is_full:  # there is no pattern to show, only the weights of each head
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
    """Format head numbers as `0-3` or `0, 4`."""
    is_run = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if is_run else ", ".join(map(str, numbers))


def kinds_of(pattern: AttentionPattern, allowed: Tensor) -> Tensor:
    """(n, n) int64 indices in KINDS: the part of `pattern` that includes each of the `allowed` (n, n) pairs."""
    i = torch.arange(len(allowed), device=allowed.device)[:, None]
    j, length = i.T, len(allowed)
    window = "stride" if pattern.dilation > 1 else "local"
    # pairs outside the window and without a global token come from random blocks
    kinds = torch.where(pattern.in_window(i, j), KINDS.index(window), KINDS.index("random"))
    is_global = pattern.is_global(i, length) | pattern.is_global(j, length)
    return torch.where(is_global, KINDS.index("global"), kinds) * allowed


def routing_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The window of the local heads, and the weights of each routing head."""
    weights, local = mixer(hidden, sequence)[1][0], mixer.head_counts[0]
    yield from matrices_of_groups(group_heads([mixer.window], local), weights)
    for head in range(local, len(weights)):
        yield Matrix(f"head {head}: its cluster", weights[head])


# fewer keys -----------------------------------------------------------------------------------------------------------


def linformer_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The projection F of the values, and the weights of each head over the projected keys."""
    weights = mixer(hidden, sequence)[1][0]  # (h, n, n)
    projections: list[Any] = [*mixer.projections] or [sequence.shared]
    matrix = projections[-1](hidden.shape[1]).expand(len(weights), -1, -1).to(weights)  # (h, k, n)
    # the mixer returns the n×k weights times F; solve for the weights, which are unique if F has full rank
    factors = torch.linalg.lstsq(matrix.mT, weights.mT, driver="gelsd").solution.mT
    yield Matrix("F, the projection of the values", matrix[0], rows="projected value", columns="token")
    for head, some in enumerate(factors):
        yield Matrix(f"head {head}: weights of the projected", some, columns="projected key")


def compressed_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The blocks of a local layer, or the weights of each head over the segments."""
    if mixer.is_local:
        yield from pattern_matrices(mixer, hidden, sequence)
        return
    weights, factor = mixer(hidden, sequence)[1][0], mixer.config.compression_factor
    padded = nn.functional.pad(weights, (0, -hidden.shape[1] % factor))
    of_segments = padded.unflatten(-1, (-1, factor)).sum(-1)  # a segment's weight is spread over its tokens
    yield from (Matrix(f"head {head}: segments", some, columns="segment") for head, some in enumerate(of_segments))


# feature maps ---------------------------------------------------------------------------------------------------------


def kernel_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """For each head, the implied weights and those of softmax attention with the same projections."""
    implied = mixer(hidden, sequence)[1][0]
    softmax = full_attention_like(mixer)(hidden, sequence)[1][0]
    for head, (some, others) in enumerate(zip(implied, softmax, strict=True)):
        yield Matrix(f"head {head}: implied weights", some)
        yield Matrix(f"head {head}: softmax's", others)


def full_attention_like(mixer: Any) -> nn.Module:
    """A mixer of full attention with the projections of `mixer`."""
    config = mixer.config
    full = EtFullConfig(**{field.name: getattr(config, field.name) for field in fields(EtConfig) if field.init})
    twin = EtFullModel.mixer_class(full, mixer.layer).to(mixer.q_proj.weight)
    twin.load_state_dict(mixer.state_dict(), strict=False)
    return twin.eval()


# mixing without comparing tokens --------------------------------------------------------------------------------------


def fourier_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The transform of one-hot positions, at two of four frequencies of the features.

    With x = u_j u_f, the output at feature g is Re exp(-2πi(jk/n + fg/4)): cosines at g = f = 0, and minus sines at
    g = f = 1, where the factor of the features is -i.
    """
    length = hidden.shape[1]
    units = torch.zeros(length, length, 4, dtype=hidden.dtype, device=hidden.device)
    for feature, name in ((0, "cosines"), (1, "minus sines")):
        one = units.clone()
        one[:, :, feature] = torch.eye(length, dtype=hidden.dtype, device=hidden.device)
        plain = replace(sequence, positions=torch.arange(length, device=hidden.device)[None].expand(length, -1))
        mixed = mixer(one, plain)[0]  # (unit, n, 4)
        yield Matrix(f"{name} of the transform", mixed[:, :, feature].T, rows="frequency", columns="token")


def gate_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The spatial weight of gMLP's gate."""
    eye = torch.eye(hidden.shape[1], dtype=hidden.dtype, device=hidden.device)[None]
    weight = (mixer.mix(eye) - mixer.mix(0 * eye))[0]
    yield Matrix("spatial weight W", weight, rows="token", columns="gated by")


def token_mlp_matrices(mixer: Any, hidden: Tensor, sequence: SequenceInfo) -> Iterator[Matrix]:
    """The two weights of an MLP over the positions."""
    length, unit = hidden.shape[1], "hidden unit"
    yield Matrix("W₁, to the hidden units", mixer.reading_weight[:, :length], rows=unit, columns="token")
    yield Matrix("W₂, back to the tokens", mixer.writing_weight[:length], rows="token", columns=unit)
