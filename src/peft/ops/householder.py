"""Chains of Householder reflections, in compact WY form."""

from __future__ import annotations

import torch
from torch import Tensor


def reflection_factors(u: Tensor, orthogonal: bool = False) -> tuple[Tensor, Tensor]:
    """L and K, both [n, r], with (I - 2 u1 u1^T) ... (I - 2 ur ur^T) = I + L K^T.

    The product of r reflections is I - U T U^T with an upper triangular T [r, r], whose inverse is half the identity
    plus the strict upper triangle of U^T U (arXiv:0911.2181, the UT transform).

    Args:
        u: [n, r]; its columns are normalised here.
        orthogonal: make the columns orthonormal first, by Gram-Schmidt in their order.
    """
    u = torch.nn.functional.normalize(u, dim=0)
    if orthogonal:
        u = gram_schmidt(u)
        return -2 * u, u
    inverse = torch.triu(u.T @ u, diagonal=1) + 0.5 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    # T is found by solving rather than inverting, for accuracy.
    work = torch.promote_types(u.dtype, torch.float32)  # there is no solver in half precision
    return -torch.linalg.solve_triangular(inverse.to(work), u.to(work), upper=True, left=False).to(u.dtype), u


def gram_schmidt(u: Tensor) -> Tensor:
    """The columns of `u` [n, r] made orthonormal one after the other, each against those before it.

    A column that depends on those before it becomes zero, which as a reflection does nothing.
    """
    basis: list[Tensor] = []
    for column in u.unbind(1):
        for other in basis:
            column = column - (column @ other) * other
        norm = column.norm()
        basis.append(torch.where(norm > 1e-6, column / norm.clamp_min(1e-6), torch.zeros_like(column)))
    return torch.stack(basis, dim=1)
