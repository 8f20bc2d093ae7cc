"""Lengths of the rows of a weight with a low-rank change, without the change being built."""

from __future__ import annotations

import torch
from torch import Tensor


def row_squares(weight: Tensor) -> Tensor:
    """||W_i||^2 of each row of a weight [out, in], in float32 at least: [out]."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Row by row on the way to the sum, so that no copy of the whole weight is made.
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def changed_row_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """||W_i + s B_i A|| of each row (arXiv:2603.22276).

    ||W_i||^2 + 2 s W_i . B_i A + s^2 ||B_i A||^2, where W A^T and A A^T are all that is needed of products.

    Args:
        weight: W [out, in].
        squares: ||W_i||^2 of its rows: [out].
        a: A [r, in].
        b: B [out, r].
        scaling: s.

    Returns:
        [out], in the dtype of `squares`.
    """
    dtype = squares.dtype
    cross = (weight @ a.to(weight.dtype).T).to(dtype)
    a, b = a.to(dtype), b.to(dtype)
    changes = (b * (2 * scaling * cross + scaling**2 * (b @ (a @ a.T)))).sum(1)
    return (squares + changes).clamp_(min=0).sqrt_()
