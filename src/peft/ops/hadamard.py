"""Elementwise products of low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def face_splitting(a: Tensor, b: Tensor) -> Tensor:
    """Products of all pairs of columns, row by row: [n, r] and [n, s] -> [n, r s].

    (A1 B1) * (A2 B2), elementwise, is face_splitting(A1, A2) @ face_splitting(B1^T, B2^T)^T: a matrix of rank r s at
    most, which a product with vectors need not build.
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


def expand_core(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A tensor [out, in, *kernel] out of its Tucker decomposition along the first two dimensions.

    Args:
        core: [r, r, *kernel].
        a: [r, out].
        b: [r, in].
    """
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)
