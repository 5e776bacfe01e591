r"""The real part of a two-dimensional discrete Fourier transform, each sequence at its own length: three ways.

.. math:: y_{kg} = \mathrm{Re} \sum_{j<n} \sum_{f<e} x_{jf}\, e^{-2\pi i (jk/n + fg/e)}

Both matrices of the transform are symmetric, so it is its own transpose: its gradient is the transform of the gradient.
All take x (b, n, e) with the real tokens of each row first and return (b, n, e) in its dtype, zeros at padding, whose
input is ignored. They run in float32 or wider.
"""

from collections.abc import Sequence
from math import pi
from typing import Any

import torch
from torch import Tensor

from .ops_tracing import is_traced


def fourier_mix(x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """By fast transforms, O(n·e·log(n·e)), rows of equal length together. `lengths` counts real tokens; None: all n."""
    if is_traced():
        return transform(x)
    return FourierMix.apply(x, [x.shape[1]] * len(x) if lengths is None else list(lengths))  # type: ignore[return-value]


class FourierMix(torch.autograd.Function):
    """Keeps nothing for the backward pass but the lengths."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths, length = lengths, x.shape[1]
        if min(lengths, default=length) == length:
            return transform(x)
        mixed = torch.zeros_like(x)
        for real in set(lengths) - {0}:
            rows = torch.tensor([row for row, other in enumerate(lengths) if other == real], device=x.device)
            mixed[rows, :real] = transform(x[rows, :real])
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return FourierMix.apply(gradient, ctx.lengths), None  # type: ignore[return-value]


def transform(x: Tensor) -> Tensor:
    """The formula for rows without padding. Half of the columns are computed, the others are their mirror image."""
    size = x.shape[2]
    half = torch.fft.rfft2(x.to(torch.promote_types(x.dtype, torch.float32))).real.to(x.dtype)  # columns 0 … e/2
    mirrored = half[:, :, 1 : (size + 1) // 2].flip(1, 2).roll(1, 1)  # column e-g, row k is column g, row -k
    return torch.cat([half, mirrored], 2)


def fourier_mix_chirp(x: Tensor, padding_mask: Tensor) -> Tensor:
    r"""`fourier_mix` by one convolution for all lengths, O(n·e·log(n·e)), for tracing: lengths are no numbers there.

    .. math:: jk = (j^2 + k^2 - (k-j)^2)/2 \quad\Longrightarrow\quad
              y_k = w_k \sum_j (x_j w_j)\, \bar w_{k-j}, \qquad w_j = e^{-\pi i j^2/n}

    Bluestein 1970. `padding_mask` (b, n) is True at real tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length, size = x.shape[1:]
    real = padding_mask.sum(1)[:, None].clamp(min=1)
    position = torch.arange(2 * length, device=x.device)
    distance = torch.minimum(position, 2 * length - position)  # of 0 … n-1, n, which is not used, and -(n-1) … -1
    angle = (distance**2 % (2 * real)).to(wide) * (pi / real.to(wide))  # (b, 2n); whole turns are left out exactly
    around = torch.complex(angle.cos(), angle.sin())[..., None]
    position, chirp = position[:length], around[:, :length].conj()
    columns = torch.fft.rfft(x.to(wide) * padding_mask[..., None])
    spectrum = torch.fft.fft(columns * chirp, 2 * length, dim=1) * torch.fft.fft(around, dim=1)
    half = (torch.fft.ifft(spectrum, dim=1)[:, :length] * chirp).real
    opposite = torch.where(position == 0, 0, real - position).clamp(min=0)[..., None]
    mirrored = half[:, :, 1 : (size + 1) // 2].flip(2)
    mirrored = mirrored.gather(1, opposite.expand(-1, -1, mirrored.shape[2]))
    return (torch.cat([half, mirrored], 2) * padding_mask[..., None]).to(x.dtype)


def fourier_mix_dense(x: Tensor, padding_mask: Tensor) -> Tensor:
    r""":math:`C_n x C_e - S_n x S_e` with the matrices of cosines and sines written out, O(n²·e): the reference.

    `padding_mask` (b, n) is True at real tokens.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = x.to(wide) * padding_mask[..., None]
    sides = []
    for length, count in ((x.shape[1], padding_mask.sum(1).clamp(min=1)), (x.shape[2], torch.tensor([x.shape[2]]))):
        index, count = torch.arange(length, device=x.device), count.to(x.device)[:, None, None]
        sides.append((index[:, None] * index % count).to(wide) * (2 * pi / count.to(wide)))
    positions, features = sides  # angles, (b, n, n) and (1, e, e)
    mixed = positions.cos() @ padded @ features.cos() - positions.sin() @ padded @ features.sin()
    return (mixed * padding_mask[..., None]).to(x.dtype)
