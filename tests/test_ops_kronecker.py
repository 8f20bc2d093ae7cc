"""Kronecker products that are not built."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.kronecker import factorization, kron_linear

small = st.integers(1, 6)


KNOWN = {
    (128, -1): (8, 16),
    (127, -1): (1, 127),
    (256, -1): (16, 16),
    (128, 4): (4, 32),
    (128, 64): (64, 2),
    (30, 4): (3, 10),
    (1, -1): (1, 1),
}


@pytest.mark.parametrize("given, expected", KNOWN.items())
def test_known_factorizations(given, expected):
    assert factorization(*given) == expected


@settings(deadline=None, max_examples=40)
@given(dimension=st.integers(1, 3000), factor=st.integers(1, 100) | st.just(-1))
def test_the_two_numbers_multiply_to_the_dimension(dimension, factor):
    first, second = factorization(dimension, factor)
    assert first * second == dimension
    if factor == -1:
        assert first <= second
        assert not any(dimension % m == 0 for m in range(first + 1, int(dimension**0.5) + 1))
    else:
        assert first <= factor


@settings(deadline=None, max_examples=40)
@given(a=small, b=small, c=small, d=small, batch=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 99))
def test_the_product_is_that_with_the_matrix(a, b, c, d, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    w1, w2 = torch.randn(a, c, generator=generator), torch.randn(b, d, generator=generator)
    x = torch.randn(*batch, c * d, generator=generator)
    torch.testing.assert_close(kron_linear(x, w1, w2), x @ torch.kron(w1, w2).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapes", [((2, 6), (5, 3)), ((6, 2), (3, 5))])
def test_gradients(shapes):
    """Of both orders of products."""
    torch.manual_seed(0)
    w1, w2 = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    x = torch.randn(3, shapes[0][1] * shapes[1][1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kron_linear, (x, w1, w2))
