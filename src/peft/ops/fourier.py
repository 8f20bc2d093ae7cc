"""Real matrices with few frequencies, and products with them that do not build them.

Entry s at (u, v) of a spectrum [out, in] stands for the matrix s / (out in) cos(2 pi (u j / out + v k / in)), the real
part of its inverse Fourier transform (arXiv:2405.03003). As the cosine of -a is that of a, (u, v) and (-u, -v) stand
for the same, so all frequencies here have v at most in / 2.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peft.ops.lora import needs_plain
from peft.ops.matrix import Matrix
from peft.ops.memo import remember
from peft.ops.sparse import draw_places, sampled_product, sparse_product


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
    return torch.fft.irfft2(half.view(out_features, width), s=(out_features, in_features))


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
    product: Any = _plain_product if needs_plain(x, values) else _TransformProduct.apply
    with torch.autocast(x.device.type, enabled=False):
        return product(rows, values, frequencies, out_features).view(*x.shape[:-1], out_features)


def _plain_product(rows: Tensor, values: Tensor, frequencies: Tensor, out_features: int) -> Tensor:
    """The formula itself, for rows [t, in]."""
    waves = torch.view_as_real(torch.fft.rfft(rows.to(values.dtype).T, dim=0))  # [in / 2 + 1, rows, 2]
    product = _gather_waves(waves.index_select(0, frequencies[1]), values, frequencies[0], out_features)
    return product / (out_features * rows.shape[-1])


class _TransformProduct(torch.autograd.Function):
    """The product by sparse matrices; x is all that is kept for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, values: Tensor, frequencies: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(rows, values, frequencies)
        ctx.out_features = out_features
        entries = _Entries(frequencies, out_features, rows.shape[1])
        return entries.product(_waves(rows.to(values.dtype)), values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, values, frequencies = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so everything comes from tensors with a history
            product = _plain_product(rows, values, frequencies, ctx.out_features)
            wanted = [t for t, needed in zip((rows, values), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(product, wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None
        waves, entries = _waves(grad), _Entries(frequencies, ctx.out_features, rows.shape[1])
        grad_rows = entries.transposed().product(waves, values).to(rows.dtype) if ctx.needs_input_grad[0] else None
        grad_values = entries.inner(waves, _waves(rows.to(grad.dtype))) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_values, None, None


def _waves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the waves in rows [t, n]: both [n / 2 + 1, t]."""
    waves = torch.fft.rfft(rows).T.contiguous()  # first as complex numbers: transposing their parts is slow
    return waves.real.contiguous(), waves.imag.contiguous()


class _Entries:
    """A matrix of few frequencies as sparse matrices between waves.

    With u folded to at most out / 2 as well, each frequency is cos(2 pi (u j / out + sign v k / in)): it takes the real
    part of wave v to that of wave u, and the imaginary part with the sign.
    """

    def __init__(self, frequencies: Tensor, out_features: int, in_features: int, swapped: bool = False):
        self.frequencies, self.swapped = frequencies, swapped
        self.out_features, self.in_features = out_features, in_features
        height, width = out_features // 2 + 1, in_features // 2 + 1
        self.shape = (width, height) if swapped else (height, width)

        def layout() -> tuple[Tensor, ...]:
            u, v = frequencies
            sign = torch.where(2 * u > out_features, -1.0, 1.0)
            u = torch.where(2 * u > out_features, out_features - u, u)
            u, v = (v, u) if swapped else (u, v)
            # Two frequencies may fold to the same place.
            places, inverse = torch.unique(u * self.shape[1] + v, return_inverse=True)
            positions = torch.stack((places // self.shape[1], places % self.shape[1])).int()
            size = in_features if swapped else out_features
            share = torch.where((u == 0) | (2 * u == size), 1.0, 0.5)  # each stands for its mirror image too
            return positions, inverse, sign, share

        key = ("waves", out_features, in_features, swapped)
        self.positions, self.inverse, self.sign, self.share = remember(frequencies, key, layout)

    def transposed(self) -> _Entries:
        """Those of the transposed matrix."""
        return _Entries(self.frequencies, self.out_features, self.in_features, not self.swapped)

    def product(self, waves: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
        """Rows [t, out] with the waves that the matrix makes of these."""
        size, other = self.out_features, self.in_features
        size, other = (other, size) if self.swapped else (size, other)
        real = values * self.share.to(values) / other
        parts = (
            sparse_product(self.positions, self._collected(entries), self.shape, wave)
            for entries, wave in zip((real, -real * self.sign.to(values)), waves, strict=True)
        )
        return torch.fft.irfft(torch.complex(*parts).T.contiguous(), n=size)

    def inner(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        """What each entry gains from rows with waves `left` on the side of the output, `right` on the input's: [n]."""
        real, imaginary = (
            sampled_product(u, v.T, self.positions).index_select(0, self.inverse)
            for u, v in zip(left, right, strict=True)
        )
        return (real - self.sign.to(real) * imaginary) / (self.out_features * self.in_features)

    def _collected(self, entries: Tensor) -> Tensor:
        return entries.new_zeros(self.positions.shape[1]).index_add(0, self.inverse, entries)


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
        self.values, self.frequencies = values, frequencies
        self.out_features, self.in_features = out_features, in_features

    def dense(self) -> Tensor:
        with torch.autocast(self.values.device.type, enabled=False):
            return inverse_transform(self.values, self.frequencies, self.out_features, self.in_features)

    def apply(self, x: Tensor) -> Tensor:
        return transform_product(x, self.values, self.frequencies, self.out_features).to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        return transform_columns(index, self.values, self.frequencies, self.out_features, self.in_features)
