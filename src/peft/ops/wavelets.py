"""Matrices with few entries in a wavelet basis, and products with them.

One level of the two-dimensional inverse transform is M = P S Q^T: the columns of P [out, 2 m] and Q [in, 2 n] are a low
and a high filter, shifted by two places from column to column, and S holds the coefficients. The filters of the
families of Daubechies are factors of a polynomial (Daubechies, "Orthonormal bases of compactly supported wavelets",
1988): "db" takes the roots inside the unit circle, "sym" others of the same polynomial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix
from peft.ops.memo import remember
from peft.ops.sparse import sampled_product

#: order -> which roots (a pair of conjugates counts as one, those nearest to zero first) are taken outside the circle
_SYMLETS: dict[int, tuple[int, ...]] = {
    2: (), 3: (), 4: (1,), 5: (0,), 6: (0, 2), 7: (0,), 8: (1, 3), 9: (1, 2), 10: (0, 2, 4),
}  # fmt: skip
#: order -> low filter of a coiflet. The fourth is what adapters that exist were trained with, which is near to the
#: published one, but not it.
_COIFLETS: dict[int, tuple[float, ...]] = {
    1: (
        -0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578, -0.07273261951252645,
        -0.01565572813579199,
    ),
    2: (
        0.01638733646320364, -0.04146493678687178, -0.06737255472372559, 0.3861100668227629, 0.8127236354494135,
        0.4170051844232391, -0.07648859907828076, -0.05943441864643109, 0.02368017194684777, 0.005611434819368834,
        -0.001823208870911032, -0.000720549445520347,
    ),
    3: (
        -0.003793512864380802, 0.007782596425672746, 0.02345269614207717, -0.06577191128146936,
        -0.06112339000297255, 0.4051769024091182, 0.7937772226260872, 0.42848347637737, -0.07179982161915484,
        -0.08230192710629983, 0.03455502757329774, 0.01588054486366945, -0.009007976136730624,
        -0.002574517688136797, 0.00111751877083063, 0.0004662169598204029, -7.0983302506379e-05,
        -3.459977319727278e-05,
    ),
    4: (
        0.000892313902537003, -0.001629492425226786, -0.007346167936268051, 0.01606678255965521,
        0.02679236227069727, -0.07314290441258073, -0.04877076756791383, 0.4274778839333794, 0.7842491699914577,
        0.4354613422154989, -0.0615536584279808, -0.09176542029839818, 0.02811565972369683, 0.02494523930553033,
        -0.01041717466605665, -0.003270273131560848, 0.002016677512044911, 0.0006600112966963782,
        -0.000179606231502436, -0.0001598819866911797, 4.311038955902174e-05, 1.791447688858775e-05,
        -2.241424665872016e-06, -1.589502629851071e-06,
    ),
    5: (
        -0.000212081862067494, 0.0003585777411617577, 0.002178294377845695, -0.00415931262757864,
        -0.01013158484690028, 0.02340832211892778, 0.02816974427053235, -0.09192158806008609, -0.05204667025355476,
        0.4215712667307543, 0.7742936228603274, 0.4379823066591634, -0.06203775157498196, -0.1055631513073372,
        0.04128753047211783, 0.03267479946705736, -0.01975839160096547, -0.009159507338676163,
        0.006761520220620417, 0.002431575442538289, -0.001661627303929879, -0.0006375589261258812,
        0.0003018579416682448, 0.0001403563281237324, -4.12198619242655e-05, -2.127022167251561e-05,
        3.70072771133948e-06, 2.061220398578878e-06, -1.623799517204834e-07, -9.604010112767894e-08,
    ),
}  # fmt: skip

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
        raise ValueError(f"Unknown wavelet family {family!r}; there are {', '.join(FAMILIES)}.")
    name, order = re.fullmatch(r"([a-z]+)([0-9]+)", family).groups()  # type: ignore[union-attr]
    if name == "coif":
        low = np.array(_COIFLETS[int(order)])
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
        order, self.waves = remember(positions, ("waves", family, self.shape), self._place)
        super().__init__(values.index_select(0, order))

    def _place(self) -> tuple[Tensor, Tensor]:
        """The order of the coefficients by row of S, and their places in it [2, n]."""
        places, high, counts = [], [], []
        for size, index in zip(self.shape, self.positions.long(), strict=True):
            count = half_length(size, len(self.taps[0]))
            index = index + (2 * count - size) // 2
            places.append(index % count)
            high.append(index // count)
            counts.append(count)
        # What is high in the columns of the spectrum is filtered high along the rows of the matrix, and the reverse.
        waves = torch.stack((places[0] + high[1] * counts[0], places[1] + high[0] * counts[1]))
        order = (waves[0] * 2 * counts[1] + waves[1]).argsort()
        return order, waves[:, order].int()

    own_gradients = True

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
            heights, widths = (2 * half_length(size, len(self.taps[0])) for size in self.shape)
            index = self.waves[0].long() * widths + self.waves[1]
            spectrum = self.values.new_zeros(heights * widths).index_add(0, index, self.values).view(heights, widths)
            columns = synthesise(spectrum, self.taps, self.shape[0])
            return synthesise(columns.T, self.taps, self.shape[1]).T

    def added_to(self, weight: Tensor) -> Tensor:
        if not self.single:
            return super().added_to(weight)
        index, shares = remember(self.positions, ("entries", len(self.taps[0]), self.shape), self._entries)
        entries = (self.values[:, None] * shares.to(self.values)).flatten()
        return weight.reshape(-1).index_add(0, index, entries.to(weight.dtype)).view(weight.shape)

    def _entries(self) -> tuple[Tensor, Tensor]:
        """Which entries of M the coefficients reach [n length^2], and by how much [n, length^2]."""
        length = len(self.taps[0])
        taps = torch.tensor(self.taps, dtype=torch.float64, device=self.waves.device)
        indices, shares = [], []
        for size, waves in zip(self.shape, self.waves.long(), strict=True):
            count = half_length(size, length)
            reached = 2 * (waves % count)[:, None] + torch.arange(length, device=waves.device) - (length - 2)
            inside = (reached >= 0) & (reached < size)
            indices.append(reached.clamp(0, size - 1))
            shares.append(taps[waves // count] * inside)
        index = indices[0][:, :, None] * self.shape[1] + indices[1][:, None]
        return index.flatten(), (shares[0][:, :, None] * shares[1][:, None]).flatten(1)

    def apply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] * self.values.numel() > self.shape[0] * self.shape[1]:
            return super().apply(x)
        # For a few vectors, the coefficients are looked up rather than put into a matrix.
        outer, inner = self.waves.long()
        waves = analyse(rows.to(self.values.dtype).T, self.taps).index_select(0, inner) * self.values[:, None]
        spectrum = waves.new_zeros(2 * half_length(self.shape[0], len(self.taps[0])), len(rows))
        product = synthesise(spectrum.index_add(0, outer, waves), self.taps, self.shape[0]).T
        return product.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        outer, inner = (analyse(rows.T, self.taps) for rows in (grad, seen))
        return (sampled_product(outer, inner.T, self.waves).to(self.values.dtype),)
