"""Elementwise products of low-rank matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix


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


class HadamardProduct(Matrix):
    """(a1 b1) * (a2 b2), elementwise, for a1 and a2 [out, r], b1 and b2 [r, in]."""

    def dense(self) -> Tensor:
        a1, b1, a2, b2 = self.tensors
        return (a1 @ b1) * (a2 @ b2)

    def added_to(self, weight: Tensor) -> Tensor:
        a1, b1, a2, b2 = self.tensors
        fits = weight.dtype == a1.dtype  # else the product is rounded by itself
        return torch.addcmul(weight, a1 @ b1, a2 @ b2) if fits else super().added_to(weight)

    def thin(self) -> tuple[Tensor, Tensor]:
        a1, b1, a2, b2 = self.tensors
        return face_splitting(b1.T, b2.T).T, face_splitting(a1, a2)

    def columns(self, index: Tensor) -> Tensor:
        a1, b1, a2, b2 = self.tensors
        return F.linear(F.embedding(index, b1.T), a1) * F.linear(F.embedding(index, b2.T), a2)
