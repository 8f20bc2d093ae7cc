"""Real matrices with few frequencies, and products with them that do not build them.

Entry s at (u, v) of a spectrum [out, in] stands for the matrix s / (out in) cos(2 pi (u j / out + v k / in)), the real
part of its inverse Fourier transform (arXiv:2405.03003). As the cosine of -a is that of a, (u, v) and (-u, -v) stand
for the same, so all frequencies here have v at most in / 2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from peft.ops.matrix import Matrix
from peft.ops.sparse import draw_places


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def draw_frequencies(out_features: int, in_features: int, count: int, seed: int) -> Tensor:
    """`count` random places (u, v) of a spectrum, all different, v folded to at most in / 2: [2, count], on the CPU."""
    with torch.device("cpu"):
        u, v = draw_places(out_features, in_features, count, seed)
        beyond = 2 * v > in_features
        return torch.stack([torch.where(beyond, -u % out_features, u), torch.where(beyond, in_features - v, v)])


def inverse_transform(values: Tensor, frequencies: Tensor, out_features: int, in_features: int) -> Tensor:
    """The matrix [out, in] whose spectrum is `values` [n] at `frequencies` [2, n]."""
    u, v = frequencies
    # Inside, an entry of the half spectrum stands for its mirror image too.
    alone = (v == 0) | (2 * v == in_features)
    width = in_features // 2 + 1
    half = values.new_zeros(out_features * width).index_add(
        0, u * width + v, values * torch.where(alone, 1.0, 0.5).to(values)
    )
    # One by one, the two directions take half the time of `irfft2`.
    return torch.fft.irfft(torch.fft.ifft(half.view(out_features, width), dim=0), n=in_features)


def transform_product(x: Tensor, values: Tensor, frequencies: Tensor, out_features: int) -> Tensor:
    """x [..., in] times the transposed matrix of `inverse_transform`, by Fourier transforms of x: [..., out].

    Between the waves of x and those of the result the matrix is sparse, with n entries: a product takes two transforms
    and n multiplications per vector, where the matrix takes out in.

    Args:
        x: in any floating dtype; the result has that of `values`.
        values: [n].
        frequencies: [2, n].
        out_features: rows of the matrix.
    """
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        waves = torch.view_as_real(torch.fft.rfft(rows.to(values.dtype).T, dim=0))  # [in / 2 + 1, rows, 2]
        product = _gather_waves(waves.index_select(0, frequencies[1]), values, frequencies[0], out_features)
        return (product / (out_features * rows.shape[-1])).view(*x.shape[:-1], out_features)


def transform_columns(
    index: Tensor, values: Tensor, frequencies: Tensor, out_features: int, in_features: int
) -> Tensor:
    """Columns `index` [...] of the matrix of `inverse_transform`: [..., out]."""
    angle = (frequencies[1][:, None] * index.flatten() % in_features).to(values) * (2 * math.pi / in_features)
    product = _gather_waves(torch.stack([angle.cos(), -angle.sin()], -1), values, frequencies[0], out_features)
    return (product / (out_features * in_features)).view(*index.shape, out_features)


def _gather_waves(waves: Tensor, values: Tensor, rows: Tensor, out_features: int) -> Tensor:
    """Puts waves [n, rows, 2] (real and imaginary part) times `values` in their places, and transforms: [rows, out]."""
    spectrum = waves.new_zeros(out_features, *waves.shape[1:]).index_add(0, rows, waves * values[:, None, None])
    return torch.fft.fft(torch.view_as_complex(spectrum), dim=0).real.T


class Spectrum(Matrix):
    """The matrix [out, in] of `inverse_transform`: real waves with amplitudes `values` [n] at `frequencies` [2, n]."""

    def __init__(self, values: Tensor, frequencies: Tensor, out_features: int, in_features: int):
        super().__init__(values)
        self.frequencies, self.out_features, self.in_features = frequencies, out_features, in_features

    def dense(self) -> Tensor:
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            return inverse_transform(self.tensors[0], self.frequencies, self.out_features, self.in_features)

    def apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.linear(x)
        return transform_product(x, self.tensors[0], self.frequencies, self.out_features).to(x.dtype)

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        (values,), (u, v) = self.tensors, self.frequencies
        waves = torch.fft.fft(torch.fft.rfft((grad.T @ seen).to(values.dtype)), dim=0)
        return (waves[u, v].real / (self.out_features * self.in_features),)

    def columns(self, index: Tensor) -> Tensor:
        return transform_columns(index, self.tensors[0], self.frequencies, self.out_features, self.in_features)
