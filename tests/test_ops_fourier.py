"""Matrices of few frequencies against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.fourier import Spectrum, draw_frequencies

SIDES = st.integers(1, 9)
SEEDS = st.integers(0, 1000)


def spectrum_of(out_features: int, in_features: int, share: float, seed: int):
    """(values, places as they are drawn, folded places), for a share of all frequencies."""
    count = max(1, int(share * out_features * in_features))
    drawn = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))[:count]
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return values, drawn, draw_frequencies(out_features, in_features, count, seed)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.floats(0, 1), SEEDS)
def test_matrix_is_the_real_inverse_transform(out_features, in_features, share, seed):
    values, drawn, places = spectrum_of(out_features, in_features, share, seed)
    spectrum = torch.zeros(out_features * in_features, dtype=torch.float64)
    spectrum[drawn] = values
    expected = torch.fft.ifft2(spectrum.view(out_features, in_features)).real
    torch.testing.assert_close(Spectrum(values, places, out_features, in_features).dense(), expected)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, st.floats(0, 1), SEEDS)
def test_products_and_columns_are_those_of_the_matrix(out_features, in_features, share, seed):
    values, _, places = spectrum_of(out_features, in_features, share, seed)
    spectrum = Spectrum(values, places, out_features, in_features)
    matrix = spectrum.dense()
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(spectrum.apply(x), x @ matrix.T)
    index = torch.randint(in_features, (2, 4))
    torch.testing.assert_close(spectrum.columns(index), matrix.T[index])


def test_gradients():
    values, _, places = spectrum_of(5, 6, 0.5, 0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, values: Spectrum(values, places, 5, 6).apply(x), (x, values))
    assert torch.autograd.gradcheck(lambda values: Spectrum(values, places, 5, 6).dense(), (values,))


@pytest.mark.parametrize("out_features, in_features", [(5, 6), (6, 5), (1, 4), (8, 8)])
def test_second_derivatives(out_features, in_features):
    values, _, places = spectrum_of(out_features, in_features, 0.6, 1)
    x = torch.randn(3, in_features, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    product = lambda x, values: Spectrum(values, places, out_features, in_features).apply(x)
    assert torch.autograd.gradcheck(product, (x, values))
    assert torch.autograd.gradgradcheck(product, (x, values))
