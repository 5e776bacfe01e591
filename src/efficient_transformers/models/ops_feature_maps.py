"""Feature maps: functions φ with φ(q)·φ(k) instead of exp(q·k), so that keys can be summed independently of queries.

Maps that are drawn at random take the draw as an argument. All map (…, d) to (…, f).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RELU_FLOOR = 1e-3  # keeps a query whose features are all zero from dividing by zero


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above zero and exp(x) below (Katharopoulos et al. 2020, arXiv:2006.16236, equation 7)."""
    return F.elu(x).add_(1)  # in place: one tensor less to make


def relu_random_features(x: Tensor, projection: Tensor) -> Tensor:
    """max(Wx, 0)/√m with W (m, d): a generalised attention of Choromanski et al. 2020 (arXiv:2009.14794, section 2.2).

    A constant is added to each, which the paper leaves to the implementation.
    """
    return (F.relu(x @ projection.transpose(-1, -2)) + RELU_FLOOR) * projection.shape[-2] ** -0.5


def log_positive_random_features(x: Tensor, projection: Tensor) -> Tensor:
    r"""Logarithms of the positive features of the softmax kernel, :math:`Wx - \|x\|^2/2 - \log\sqrt m`, W (m, d).

    Rows of W are N(0, I): then E[φ(x)·φ(y)] = exp(x·y) (Choromanski et al. 2020, arXiv:2009.14794, lemma 1). The
    logarithm is given so that the caller may shift it before it takes exp.
    """
    shift = x.square().sum(-1, keepdim=True) / 2 + math.log(projection.shape[-2]) / 2
    return x @ projection.transpose(-1, -2) - shift


def trigonometric_random_features(x: Tensor, projection: Tensor) -> Tensor:
    r"""√(1/D)·[sin(Wx), cos(Wx)] with W (D, d), N(0, I): E[φ(x)·φ(y)] = exp(-‖x - y‖²/2), and ‖φ(x)‖ = 1.

    Rahimi and Recht 2007, theorem 1; Peng et al. 2021 (arXiv:2103.02143), section 2.2.
    """
    angle = x @ projection.transpose(-1, -2)
    return torch.cat([angle.sin(), angle.cos()], -1).mul_(projection.shape[-2] ** -0.5)


def log_identity(x: Tensor) -> Tensor:
    """x as the logarithm of a feature: φ = exp, whose sums over features and over positions make softmax."""
    return x


class FeatureMap(NamedTuple):
    """A map, and the properties of its output that the engine needs.

    features: (…, d) and, if `is_random`, the projection -> (…, f).
    per_row: features of each row of the projection.
    in_logs: it returns log φ, which the engine shifts by the largest key of each feature so that nothing overflows.
    per_feature: each feature of the keys is divided by its sum over positions, those of a query by their sum over
        features (Shen et al. 2018); False divides each query by the sum of its weights.
    floor: the least that a query is divided by, per key that it attends to, where weights may cancel.
    """

    features: Callable[..., Tensor]
    is_random: bool = False
    per_row: int = 1
    in_logs: bool = False
    per_feature: bool = False
    floor: float = 0.0

    def __call__(self, x: Tensor, projection: Tensor | None) -> Tensor:
        if not self.is_random:
            return self.features(x)
        assert projection is not None
        return self.features(x, projection.to(x.dtype))


FEATURE_MAPS = {
    "elu": FeatureMap(elu_plus_one),
    "softmax": FeatureMap(log_identity, in_logs=True, per_feature=True),
    "positive": FeatureMap(log_positive_random_features, is_random=True, in_logs=True),
    "relu": FeatureMap(relu_random_features, is_random=True),
    # The paper divides by the estimate as it is, which may come near zero or below, and training explodes there. The
    # kernel itself is at least exp(-2) = 0.135 between vectors of norm 1.
    "trigonometric": FeatureMap(trigonometric_random_features, is_random=True, per_row=2, floor=0.1),
}


def gaussian_projection(num_heads: int, num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows drawn N(0, I), (h, m, d), float32, on the CPU."""
    return torch.randn(num_heads, num_features, dim, generator=generator, device="cpu")


def orthogonal_projection(num_heads: int, num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    """Rows that are N(0, I) one by one and orthogonal within every block of d, (h, m, d), float32, on the CPU.

    Each estimate stays unbiased, and its error falls (Choromanski et al. 2020, arXiv:2009.14794, section 2.4).
    """
    blocks = -(-num_features // dim)
    gaussian = torch.randn(num_heads, blocks, dim, dim, generator=generator, device="cpu", dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # uniform over the rotations, whatever signs QR takes
    norms = torch.randn(num_heads, blocks, dim, dim, generator=generator, device="cpu", dtype=torch.float64).norm(
        dim=-1
    )
    rows = q.transpose(-1, -2) * norms[..., None]
    return rows.flatten(1, 2)[:, :num_features].float()
