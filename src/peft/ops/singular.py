"""The parts of a matrix by its singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by one of low rank, as two factors that share its singular values evenly.

    Args:
        matrix: [rows, columns], in single or double precision.
        rank: r; as many as there are singular values where that is less.

    Returns:
        B [rows, r] and A [r, columns], with B^T B = A A^T a diagonal matrix of the largest singular values.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
