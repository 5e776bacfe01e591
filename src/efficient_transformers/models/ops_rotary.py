"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""cos and sin of :math:`m\,\theta^{-2i/d}` for positions m, each (b, n, 1, d/2).

    Su et al. 2021 (arXiv:2104.09864), section 3.4.2. Computed in float32 or wider, returned in `dtype`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions[..., None, None].to(wide) * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn feature pairs (i, i + d/2) of `x` (b, n, h, d); the paper pairs (2i, 2i+1), a permutation of the same."""
    cos, sin = (angle.to(x.dtype) for angle in rotary)  # under autocast `x` is narrower than the embeddings
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
