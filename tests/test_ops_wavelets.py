"""Matrices of few wavelets against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.sparse import draw_places
from peft.ops.wavelets import FAMILIES, Wavelets, analyse, filters, half_length, synthesise

SIDES = st.integers(1, 40)


def matrix_of(family: str, out_features: int, in_features: int, count: int, seed: int = 0) -> Wavelets:
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Wavelets(values, draw_places(out_features, in_features, count, seed), family, out_features, in_features)


def by_definition(matrix: Wavelets, values: torch.Tensor) -> torch.Tensor:
    """Each coefficient by itself: an outer product of two shifted filters, cut to the matrix."""
    taps, total = torch.tensor(matrix.taps, dtype=torch.float64), torch.zeros(matrix.shape, dtype=torch.float64)
    length = taps.shape[1]
    for value, (i, j) in zip(values, matrix.positions.T.tolist(), strict=True):
        high, sides = [], []
        for size, place in zip(matrix.shape, (i, j), strict=True):
            padded = size + length - 2 + (size + length) % 2
            place += (padded - size) // 2
            high.append(int(place >= padded // 2))
            sides.append((size, place % (padded // 2)))
        vectors = []
        for (size, shift), kind in zip(sides, reversed(high), strict=True):
            vector = torch.zeros(size + 4 * length + 2 * shift, dtype=torch.float64)
            vector[2 * shift + length : 2 * shift + 2 * length] = taps[kind]
            vectors.append(vector[2 * length - 2 : 2 * length - 2 + size])
        total += value * torch.outer(*vectors)
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_filters(family):
    low, high = torch.tensor(filters(family), dtype=torch.float64)
    near = 0.05 if family == "coif4" else 1e-6  # that one is what adapters that exist have
    for shift in range(0, len(low), 2):
        ahead = (low[: len(low) - shift] * low[shift:]).sum()
        assert ahead == pytest.approx(float(shift == 0), abs=near)
        assert (low[: len(low) - shift] * high[shift:]).sum() == pytest.approx(0, abs=near)
    assert low.sum() == pytest.approx(2**0.5, abs=near)
    moments = int(family[2:]) if family[:2] == "db" else int(family[3:]) if family[:3] == "sym" else 2
    for power in range(moments):
        assert (high * torch.linspace(0, 1, len(high), dtype=torch.float64) ** power).sum().abs() < near


def test_symlets_are_those_of_daubechies_with_the_energy_in_the_middle():
    for order in range(4, 11):
        db, sym = (torch.tensor(filters(f"{name}{order}")[0], dtype=torch.float64) for name in ("db", "sym"))
        spectra = [torch.fft.rfft(low, n=64).abs() for low in (db, sym)]
        torch.testing.assert_close(*spectra, rtol=1e-5, atol=1e-8)
        places = torch.arange(2 * order, dtype=torch.float64) - (2 * order - 1) / 2
        away = [float((low**2 * places).sum().abs()) for low in (db, sym)]
        assert away[1] < away[0] / 2


def test_unknown_family():
    with pytest.raises(ValueError, match="wavelet_family='db0'"):
        filters("db0")


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.floats(0, 1), st.sampled_from(FAMILIES))
def test_matrix_is_the_sum_of_its_wavelets(out_features, in_features, share, family):
    matrix = matrix_of(family, out_features, in_features, max(1, int(share * min(out_features * in_features, 30))))
    drawn = torch.randn(len(matrix.values), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = by_definition(matrix, drawn)
    torch.testing.assert_close(matrix.dense(), expected)
    start = torch.ones(matrix.shape, dtype=torch.float64)
    torch.testing.assert_close(matrix.added_to(start), expected + 1)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    torch.testing.assert_close(matrix.apply(x), x @ expected.T)
    torch.testing.assert_close(matrix.apply(x.repeat(1, 9, 1)), x.repeat(1, 9, 1) @ expected.T)
    torch.testing.assert_close(matrix.columns(torch.tensor([[0]])), expected.T[:1][None])


@settings(deadline=None, max_examples=40)
@given(SIDES, st.sampled_from(FAMILIES))
def test_analysis_is_the_transpose_of_synthesis(size, family):
    taps = filters(family)
    x = torch.randn(size, 3, dtype=torch.float64)
    c = torch.randn(2 * half_length(size, len(taps[0])), 3, dtype=torch.float64)
    torch.testing.assert_close((analyse(x, taps) * c).sum(), (x * synthesise(c, taps, size)).sum())


@pytest.mark.parametrize("family, size, single", [("db1", 40, True), ("db2", 9, False), ("coif1", 8, False)])
def test_gradients(family, size, single):
    places = draw_places(size, size + 1, 5, 3)
    x = torch.randn(2, 3, size + 1, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(size, size + 1, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert Wavelets(values, places, family, size, size + 1).single == single

    def linear(x, values):
        return Wavelets(values, places, family, size, size + 1).linear(x, weight, bias)

    torch.testing.assert_close(
        linear(x, values), x @ (weight + Wavelets(values, places, family, size, size + 1).dense()).T + bias
    )
    assert torch.autograd.gradcheck(linear, (x, values))
    assert torch.autograd.gradgradcheck(linear, (x, values))
    assert torch.autograd.gradcheck(
        lambda x, values: Wavelets(values, places, family, size, size + 1).apply(x), (x, values)
    )
