"""Elementwise products of low-rank matrices, with each other and with a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class Rescaled(Matrix):
    """W * F + G, elementwise, for a weight W [out, in] that stays as it is.

    Args:
        weight: gives W, without gradient, and the same until the backward pass has run.
        factor: F: a tensor that spreads to [out, in], or two whose product it is, [out, r] and [r, in].
        added: G, in the same form as F; nothing for zero.
    """

    def __init__(self, weight: Callable[[], Tensor], factor: Sequence[Tensor], added: Sequence[Tensor] = ()):
        super().__init__(*factor, *added)
        self.weight, self.count = weight, len(factor)

    def dense(self) -> Tensor:
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            scaled = self.weight().to(self.tensors[0]) * spread(self.tensors[: self.count])
            added = self.tensors[self.count :]
            return scaled + spread(added) if added else scaled

    def added_to(self, weight: Tensor) -> Tensor:
        if weight.dtype != self.tensors[0].dtype:  # which would round once more
            return super().added_to(weight)
        scaled = torch.addcmul(weight, self.weight().to(weight), spread(self.tensors[: self.count]))
        added = self.tensors[self.count :]
        return scaled if not added else scaled + added[0] if len(added) == 1 else torch.addmm(scaled, *added)

    def columns(self, index: Tensor) -> Tensor:
        factor, added = (
            part[0].flatten() if len(part) == 1 else F.linear(F.embedding(index, part[1].T), part[0]) if part else 0
            for part in (self.tensors[: self.count], self.tensors[self.count :])
        )
        return F.embedding(index, self.weight().T).to(self.tensors[0]) * factor + added


def spread(part: Sequence[Tensor]) -> Tensor:
    """The one tensor, or the product of two."""
    return part[0] if len(part) == 1 else part[0] @ part[1]
