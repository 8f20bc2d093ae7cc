"""Orthogonal matrices made of small blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.orthogonal import add_rotated, butterfly, cayley, cayley_neumann, drop_blocks, skew_symmetric

seeds = st.integers(0, 99)


def skew(count: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    upper = scale * torch.randn(count, size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed))
    return skew_symmetric(upper, size)


def rotation(change: torch.Tensor) -> torch.Tensor:
    return change + torch.eye(change.shape[-1])


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 4), size=st.integers(1, 6), seed=seeds)
def test_a_skew_symmetric_matrix_holds_its_upper_triangle_row_by_row(count, size, seed):
    upper = torch.randn(count, size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed))
    matrix = skew_symmetric(upper, size)
    assert torch.equal(matrix, -matrix.mT)
    rows, columns = torch.triu_indices(size, size, 1)
    assert torch.equal(matrix[:, rows, columns], upper)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 4), size=st.integers(1, 8), seed=seeds)
def test_cayley_rotates(count, size, seed):
    r = rotation(cayley(skew(count, size, seed)))
    torch.testing.assert_close(r @ r.mT, torch.eye(size).expand_as(r), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(count), rtol=0, atol=1e-4)


def test_cayley_is_the_quotient():
    q = skew(3, 4, 0)
    eye = torch.eye(4)
    torch.testing.assert_close(rotation(cayley(q)), (eye - q) @ torch.linalg.inv(eye + q))


@pytest.mark.parametrize("terms", range(1, 10))
def test_the_series_has_the_coefficients_it_says(terms):
    q = skew(2, 4, 1, 0.4).double()
    last = max(3, terms - 1)
    coefficients = {1: {}, 2: {1: 2}}.get(terms, {**dict.fromkeys(range(1, last), 2), last: 1})
    expected = sum((c * torch.linalg.matrix_power(q, k) for k, c in coefficients.items()), torch.zeros_like(q))
    torch.testing.assert_close(cayley_neumann(q, terms), expected)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 8), seed=seeds)
def test_the_series_turns_the_other_way_round(size, seed):
    q = skew(2, size, seed, 0.02)
    torch.testing.assert_close(rotation(cayley_neumann(q, 8)), rotation(cayley(q)).mT, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12), size=st.sampled_from([1, 2, 3, 4, 8, 40]), shared=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=2), seed=seeds,
)  # fmt: skip
def test_rows_are_multiplied_by_the_blocks(count, size, shared, batch, seed):
    """However many blocks are put together for the product."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(1 if shared else count, size, size, generator=generator)
    x = torch.randn(*batch, count * size, generator=generator)
    whole = torch.block_diag(*rotation(change).expand(count, -1, -1))
    torch.testing.assert_close(add_rotated(x, change), x @ whole, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(2, 9), p=st.floats(0, 0.99), seed=seeds)
def test_a_share_of_the_blocks_is_left_out(count, p, seed):
    torch.manual_seed(seed)
    left = drop_blocks(torch.ones(count, 2, 2), p).sum((1, 2))
    assert sorted(left.tolist()) == [0.0] * int(p * count) + [4.0] * (count - int(p * count))
    assert torch.equal(drop_blocks(torch.ones(1, 2, 2), p), torch.ones(1, 2, 2))


def factor_matrix(blocks: torch.Tensor, i: int) -> torch.Tensor:
    """Factor i as a matrix, entry by entry, from which pairs of half blocks it couples."""
    count, size, _ = blocks.shape
    half, step = size // 2, 2**i
    matrix = torch.zeros(count * size, count * size)
    for block in range(count):
        first = block // step * 2 * step + block % step
        places = torch.cat([torch.arange(half) + half * (first + side * step) for side in range(2)])
        matrix[places[:, None], places] = blocks[block]
    return matrix


@settings(deadline=None, max_examples=40)
@given(factors=st.integers(1, 4), groups=st.integers(1, 2), half=st.integers(1, 3), seed=seeds)
def test_butterfly_is_the_product_of_its_factors(factors, groups, half, seed):
    count, size = groups * 2 ** (factors - 1), 2 * half
    change = cayley(skew(factors * count, size, seed)).view(factors, count, size, size)
    expected = torch.eye(count * size)
    for i in range(factors):
        expected = factor_matrix(rotation(change[i]), i) @ expected
    blocks = rotation(butterfly(change))
    assert blocks.shape == (groups, 2 ** (factors - 1) * size, 2 ** (factors - 1) * size)
    torch.testing.assert_close(torch.block_diag(*blocks), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(blocks.shape[-1]).expand_as(blocks), rtol=0, atol=1e-5)


def test_gradients():
    torch.manual_seed(0)
    upper = (torch.randn(4, 6, dtype=torch.float64) / 3).requires_grad_()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, u: add_rotated(x, cayley_neumann(skew_symmetric(u, 4), 5)), (x, upper))
    blocks = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: add_rotated(x, butterfly(cayley((b - b.mT).flatten(0, 1)).view_as(b))), (x, blocks)
    )


@pytest.mark.parametrize("count, size", [(3, 40), (4, 2)])
def test_derivatives_of_the_product_with_blocks(count, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, count * size, generator=generator, dtype=torch.float64, requires_grad=True)
    change = 0.1 * torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    change.requires_grad_()
    assert torch.autograd.gradcheck(add_rotated, (x, change), fast_mode=True)
    assert torch.autograd.gradgradcheck(add_rotated, (x, change), fast_mode=True)
