"""Matrices with few entries in a wavelet basis, and products with them.

One level of the two-dimensional inverse transform is M = P S Q^T: the columns of P [out, 2 m] and Q [in, 2 n] are a low
and a high filter, shifted by two places from column to column, and S holds the coefficients. The filters of the
families of Daubechies are factors of a polynomial (Daubechies, "Orthonormal bases of compactly supported wavelets",
1988): "db" takes the roots inside the unit circle, "sym" others of the same polynomial.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix
from peft.ops.memo import remember
from peft.ops.sparse import Entries, add_at, sampled_product

#: order -> which roots (a pair of conjugates counts as one, those nearest to zero first) are taken outside the circle
_SYMLETS: dict[int, tuple[int, ...]] = {
    2: (), 3: (), 4: (1,), 5: (0,), 6: (0, 2), 7: (0,), 8: (1, 3), 9: (1, 2), 10: (0, 2, 4),
}  # fmt: skip
#: order -> low filter of a coiflet. The fourth is what adapters that exist were trained with, which is near to the
#: published one, but not it.
_COIFLETS: dict[str, list[float]] = json.loads(Path(__file__).with_name("coiflets.json").read_text())

FAMILIES = (
    *(f"db{order}" for order in range(1, 11)),
    *(f"sym{order}" for order in _SYMLETS),
    *(f"coif{order}" for order in _COIFLETS),
)


#: the low and the high filter of a family, for synthesis
Filters = tuple[tuple[float, ...], tuple[float, ...]]
_KNOWN: dict[str, Filters] = {}


def filters(family: str) -> Filters:
    """The filters of a family; numbers rather than tensors, so that a compiled graph has them as constants.

    Raises:
        ValueError: there is no such family.
    """
    if family in _KNOWN:  # always so while a graph is traced, which cannot look into NumPy
        return _KNOWN[family]
    if family not in FAMILIES:
        raise ValueError(f"wavelet_family={family!r} is not known; there are {', '.join(FAMILIES)}.")
    name, order = re.fullmatch(r"([a-z]+)([0-9]+)", family).groups()  # type: ignore[union-attr]
    if name == "coif":
        low = np.array(_COIFLETS[order])
    else:
        low = _daubechies(int(order), _SYMLETS[int(order)] if name == "sym" else ())
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return _KNOWN.setdefault(family, (tuple(low.tolist()), tuple(high.tolist())))


def _daubechies(order: int, outside: tuple[int, ...]) -> np.ndarray:
    """The low filter with `order` vanishing moments: [2 order]."""
    halves = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    shifted = 1 - 2 * halves + 0j
    roots = shifted + np.sqrt(shifted**2 - 1)
    roots = np.where(abs(roots) < 1, roots, 1 / roots)
    pairs = sorted(roots[roots.imag > -1e-9], key=abs)  # one of each pair of conjugates, and the real ones
    low = np.array([1.0])
    for _ in range(order):
        low = np.convolve(low, [1.0, 1.0])
    for place, root in enumerate(pairs):
        root = 1 / root if place in outside else root
        real = abs(root.imag) < 1e-9
        low = np.convolve(low, [1.0, -root.real] if real else [1.0, -2 * root.real, abs(root) ** 2])
    return low * math.sqrt(2) / low.sum()


def half_length(size: int, taps: int) -> int:
    """How many shifts of a filter it takes for `size` places, and the coefficients that begin in the padding."""
    return (size + taps - 1) // 2


def analyse(columns: Tensor, taps: Filters) -> Tensor:
    """The coefficients of columns [size, t]: [2 m, t], low ones first; the transpose of `synthesise`."""
    size, length = columns.shape[0], len(taps[0])
    shifts = half_length(size, length)
    # Convolutions of a single channel are slow on CPUs, sums of whole rows are not.
    pairs = F.pad(columns.contiguous(), (0, 0, length - 2, 2 * shifts - size)).unflatten(0, (-1, 2))
    places = [pairs[tap // 2 : tap // 2 + shifts, tap % 2] for tap in range(length)]
    return torch.cat([_weighted(places, weights) for weights in taps])


def synthesise(waves: Tensor, taps: Filters, size: int) -> Tensor:
    """The columns [size, t] that coefficients [2 m, t] stand for."""
    length = len(taps[0])
    last = length // 2 - 1
    padded = [F.pad(part, (0, 0, last, last)) for part in waves.contiguous().chunk(2)]
    count = len(padded[0]) - last
    places = [part[last - shift : last - shift + count] for part in padded for shift in range(last + 1)]
    sides = [_weighted(places, taps[0][side::2] + taps[1][side::2]) for side in (0, 1)]
    return torch.stack(sides, dim=1).flatten(0, 1)[length - 2 : length - 2 + size]


def _weighted(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of tensors, each times its weight."""
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        # In place, unless somebody keeps what it was.
        total = torch.add(total, part, alpha=weight) if torch.is_grad_enabled() else total.add_(part, alpha=weight)
    return total


class Wavelets(Matrix):
    """M [out, in] of few coefficients in a wavelet basis.

    A coefficient at (i, j) of the matrix is that of the padded matrix's transform at the place that is as far from its
    middle. Its quadrants are the low ones, the high ones of columns (on the right) and of rows (below), and both.

    Args:
        values: the coefficients, [n].
        positions: their places (i, j), no two the same: [2, n].
        family: the wavelets.
        out_features, in_features: size of M.
    """

    def __init__(self, values: Tensor, positions: Tensor, family: str, out_features: int, in_features: int):
        self.positions, self.shape = positions, (out_features, in_features)
        self.taps = filters(family)
        heights, widths = (2 * half_length(size, len(self.taps[0])) for size in self.shape)
        places = remember(positions, ("waves", family, self.shape), self._place)
        self.spectrum = Entries.at(places, values, (heights, widths))
        super().__init__(*self.spectrum.tensors)

    def _place(self) -> Tensor:
        """The places of the coefficients in S, [2, n]."""
        places, high, counts = [], [], []
        for size, index in zip(self.shape, self.positions.long(), strict=True):
            count = half_length(size, len(self.taps[0]))
            index = index + (2 * count - size) // 2
            places.append(index % count)
            high.append(index // count)
            counts.append(count)
        # What is high in the columns of the spectrum is filtered high along the rows of the matrix, and the reverse.
        return torch.stack((places[0] + high[1] * counts[0], places[1] + high[0] * counts[1]))

    @property
    def values(self) -> Tensor:
        """The coefficients in the order of rows."""
        return self.tensors[0]

    @property
    def single(self) -> bool:
        """Whether the entries of M that its coefficients reach are so few that each is added by itself."""
        return 4 * self.values.numel() * len(self.taps[0]) ** 2 <= self.shape[0] * self.shape[1]

    def dense(self) -> Tensor:
        if self.single:
            return self.added_to(self.values.new_zeros(self.shape))
        with torch.autocast(self.values.device.type, enabled=False):
            columns = synthesise(self.spectrum.of(self.tensors).dense(), self.taps, self.shape[0])
            return synthesise(columns.T, self.taps, self.shape[1]).T

    def added_to(self, weight: Tensor) -> Tensor:
        if not self.single:
            return super().added_to(weight)
        entries, source, shares = self._reached()
        return add_at(weight, entries, self.values.index_select(0, source) * shares.to(self.values))

    def _reached(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of M that the coefficients reach, in the order of rows: places [2, n length^2], of which, how."""
        return remember(self.positions, ("entries", len(self.taps[0]), self.shape), self._entries)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        length = len(self.taps[0])
        taps = torch.tensor(self.taps, dtype=torch.float64, device=self.positions.device)
        indices, shares = [], []
        for size, waves in zip(self.shape, self.spectrum.positions.long(), strict=True):
            count = half_length(size, length)
            reached = 2 * (waves % count)[:, None] + torch.arange(length, device=waves.device) - (length - 2)
            inside = (reached >= 0) & (reached < size)
            indices.append(reached.clamp(0, size - 1))
            shares.append(taps[waves // count] * inside)
        index, order = (indices[0][:, :, None] * self.shape[1] + indices[1][:, None]).flatten().sort()
        entries = torch.stack((index // self.shape[1], index % self.shape[1])).int()
        return entries, order // length**2, (shares[0][:, :, None] * shares[1][:, None]).flatten()[order]

    def apply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] * self.values.numel() > self.shape[0] * self.shape[1]:
            return super().apply(x)
        # For a few vectors, the coefficients are looked up rather than put into a matrix.
        outer, inner = self.spectrum.positions.long()
        waves = analyse(rows.to(self.values.dtype).T, self.taps).index_select(0, inner) * self.values[:, None]
        spectrum = waves.new_zeros(self.spectrum.shape[0], len(rows))
        product = synthesise(spectrum.index_add(0, outer, waves), self.taps, self.shape[0]).T
        return product.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        if self.single:
            entries, source, shares = self._reached()
            found = sampled_product(grad.T, seen, entries).to(self.values.dtype) * shares.to(self.values)
            return (torch.zeros_like(self.values).index_add(0, source, found),)
        outer, inner = self.spectrum.positions.long()
        return (analyse(analyse(grad.T @ seen, self.taps).T, self.taps)[inner, outer],)
