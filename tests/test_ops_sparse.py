"""Sparse changes of a matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.sparse import add_at, random_positions, sampled_product, sparse_linear


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_positions_differ_and_are_in_the_order_of_rows(rows, columns, data, seed):
    count = data.draw(st.integers(0, rows * columns))
    positions = random_positions(rows, columns, count, seed)
    assert positions.dtype == torch.int32 and positions.shape == (2, count)
    flat = (positions[0] * columns + positions[1]).tolist()
    assert flat == sorted(set(flat)) and all(0 <= place < rows * columns for place in flat)
    assert torch.equal(positions, random_positions(rows, columns, count, seed))


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 12), t=st.integers(1, 6), n=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_sampled_product_is_the_product_at_its_positions(m, t, n, share, seed):
    """Dense, or by sparse tensors where few entries are asked for."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, t, generator=generator), torch.randn(t, n, generator=generator)
    positions = random_positions(m, n, int(share * m * n), seed)
    rows, columns = positions.long()
    torch.testing.assert_close(sampled_product(a, b, positions), (a @ b)[rows, columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_with_the_sum(count, with_bias):
    """Its gradients, the second ones too."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64) if with_bias else None
    positions = random_positions(6, 7, count, 1)
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def product(x, values):
        return sparse_linear(x, weight, bias, positions, values)

    torch.testing.assert_close(product(x, values), F.linear(x, add_at(weight, positions, values), bias))
    assert torch.autograd.gradcheck(product, (x, values))
    assert torch.autograd.gradgradcheck(product, (x, values))


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    weight, positions = torch.randn(64, 64), random_positions(64, 64, 100, 1)
    values, x = torch.randn(100, requires_grad=True), torch.randn(2, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_linear(x, weight, None, positions, values)
    assert all(t.numel() < weight.numel() or t is weight for t in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    weight, positions = torch.randn(16, 8), random_positions(16, 8, 20, 1)
    values, x = torch.randn(20, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = sparse_linear(x, weight, None, positions, values)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert values.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, x.detach().sum(0)[positions[1]], rtol=0.02, atol=0.05)


def test_transforms_of_torch_func():
    weight, positions = torch.randn(6, 7), random_positions(6, 7, 5, 1)
    values, x = torch.randn(5, requires_grad=True), torch.randn(4, 7)
    one_by_one = torch.vmap(lambda row: sparse_linear(row[None], weight, None, positions, values)[0])(x)
    torch.testing.assert_close(one_by_one, sparse_linear(x, weight, None, positions, values))
