"""Sparse changes of a matrix."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.sparse import draw_places, in_row_order, sampled_product


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_positions_differ_and_are_in_the_order_of_rows(rows, columns, data, seed):
    count = data.draw(st.integers(0, rows * columns))
    places = draw_places(rows, columns, count, seed)
    order, positions = in_row_order(places)
    assert torch.equal(places[:, order], positions)
    assert positions.dtype == torch.int32 and positions.shape == (2, count)
    flat = (positions[0] * columns + positions[1]).tolist()
    assert flat == sorted(set(flat)) and all(0 <= place < rows * columns for place in flat)


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 12), t=st.integers(1, 6), n=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_sampled_product_is_the_product_at_its_positions(m, t, n, share, seed):
    """Dense, or by sparse tensors where few entries are asked for."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(m, t, generator=generator), torch.randn(t, n, generator=generator)
    positions = in_row_order(draw_places(m, n, int(share * m * n), seed))[1]
    rows, columns = positions.long()
    torch.testing.assert_close(sampled_product(a, b, positions), (a @ b)[rows, columns], rtol=1e-4, atol=1e-5)
