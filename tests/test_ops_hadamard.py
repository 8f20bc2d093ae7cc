"""Elementwise products of low-rank matrices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.hadamard import expand_core, face_splitting

small = st.integers(1, 5)


@settings(deadline=None, max_examples=40)
@given(out=small, width=small, r=small, s=small, seed=st.integers(0, 99))
def test_an_elementwise_product_is_a_product_of_thin_matrices(out, width, r, s, seed):
    generator = torch.Generator().manual_seed(seed)
    a1, b1 = torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator)
    a2, b2 = torch.randn(out, s, generator=generator), torch.randn(s, width, generator=generator)
    thin = face_splitting(a1, a2) @ face_splitting(b1.T, b2.T).T
    torch.testing.assert_close(thin, (a1 @ b1) * (a2 @ b2))


@settings(deadline=None, max_examples=40)
@given(out=small, width=small, r=small, kernel=st.lists(small, max_size=3), seed=st.integers(0, 99))
def test_a_core_is_expanded_on_both_sides(out, width, r, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(r, r, *kernel, generator=generator)
    a, b = torch.randn(r, out, generator=generator), torch.randn(r, width, generator=generator)
    expected = a.T @ core.flatten(2).movedim(-1, 0) @ b if kernel else a.T @ core @ b
    whole = expand_core(core, a, b)
    assert whole.shape == (out, width, *kernel)
    torch.testing.assert_close(whole.flatten(2).movedim(-1, 0) if kernel else whole, expected, rtol=1e-4, atol=1e-4)
