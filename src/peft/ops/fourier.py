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


class Spectrum(Matrix):
    """The matrix [out, in] of real waves with amplitudes `values` [n] at `frequencies` [2, n].

    Between the waves of an input and those of the result it is sparse, with n entries: a product takes two transforms
    and n multiplications per vector, where the matrix takes out in. All is in single or double precision, as the values
    are: there are no other transforms.
    """

    def __init__(self, values: Tensor, frequencies: Tensor, out_features: int, in_features: int):
        super().__init__(values)
        self.frequencies, self.out_features, self.in_features = frequencies, out_features, in_features

    def dense(self) -> Tensor:
        (values,), (u, v), width = self.tensors, self.frequencies, self.in_features // 2 + 1
        # Inside, an entry of the half spectrum stands for its mirror image too.
        alone = (v == 0) | (2 * v == self.in_features)
        entries = values * torch.where(alone, 1.0, 0.5).to(values)
        with torch.autocast(values.device.type, enabled=False):
            half = values.new_zeros(self.out_features * width).index_add(0, u * width + v, entries)
            # One by one, the two directions take half the time of `irfft2`.
            return torch.fft.irfft(torch.fft.ifft(half.view(self.out_features, width), dim=0), n=self.in_features)

    def apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.linear(x)
        with torch.autocast(x.device.type, enabled=False):
            columns = x.reshape(-1, x.shape[-1]).to(self.tensors[0].dtype).T
            waves = torch.view_as_real(torch.fft.rfft(columns, dim=0))  # [in / 2 + 1, rows, 2]
            product = self._product(waves.index_select(0, self.frequencies[1]))
            return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        (values,), (u, v) = self.tensors, self.frequencies
        waves = torch.fft.fft(torch.fft.rfft((grad.T @ seen).to(values.dtype)), dim=0)
        return (waves[u, v].real / (self.out_features * self.in_features),)

    def columns(self, index: Tensor) -> Tensor:
        angle = (self.frequencies[1][:, None] * index.flatten() % self.in_features).to(self.tensors[0])
        angle = angle * (2 * math.pi / self.in_features)
        return self._product(torch.stack([angle.cos(), -angle.sin()], -1)).view(*index.shape, self.out_features)

    def _product(self, waves: Tensor) -> Tensor:
        """What waves [n, rows, 2] (real, imaginary part), each times its value, make in their places: [rows, out]."""
        spectrum = waves.new_zeros(self.out_features, *waves.shape[1:])
        spectrum = spectrum.index_add(0, self.frequencies[0], waves * self.tensors[0][:, None, None])
        product = torch.fft.fft(torch.view_as_complex(spectrum), dim=0).real.T
        return product / (self.out_features * self.in_features)
