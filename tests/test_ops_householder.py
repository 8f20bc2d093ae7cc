"""Chains of Householder reflections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.householder import gram_schmidt, reflection_factors


def chain(u: torch.Tensor) -> torch.Tensor:
    """The product of the reflections, one after the other."""
    product = torch.eye(len(u), dtype=u.dtype)
    for column in u.unbind(1):
        column = column / column.norm()
        product = product @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(column, column))
    return product


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 8), r=st.integers(1, 6), seed=st.integers(0, 99))
def test_reflections_are_in_their_order(n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, r, generator=generator, dtype=torch.float64)
    left, right = reflection_factors(u)
    torch.testing.assert_close(torch.eye(n, dtype=u.dtype) + left @ right.T, chain(u))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_factors_make_a_rotation(orthogonal):
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    left, right = reflection_factors(u, orthogonal)
    rotation = torch.eye(6) + left @ right.T
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6), rtol=0, atol=1e-5)
    if orthogonal:
        torch.testing.assert_close(rotation, chain(gram_schmidt(u / u.norm(dim=0))), rtol=0, atol=1e-5)
