"""Matrices that are held in fewer numbers than their entries."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Matrix:
    """A matrix M [out, in]. Those with structure multiply in a way that does not build them."""

    def dense(self) -> Tensor:
        """M itself."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """x M^T, for x [..., in]: [..., out], in the dtype of x."""
        return F.linear(x, self.dense().to(x.dtype))

    def columns(self, index: Tensor) -> Tensor:
        """The columns of M at `index` [...]: [..., out]."""
        return F.embedding(index, self.dense().T)

    def thin(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] with M = B A, for matrices that are of low rank."""
        return None

    def added_to(self, weight: Tensor) -> Tensor:
        """W + M."""
        return weight + self.dense().to(weight.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + M)^T + b, for a frozen W [out, in] and b [out] in the dtype of x [..., in]."""
        return F.linear(x, self.added_to(weight), bias)


class Dense(Matrix):
    """A matrix that is held entry by entry."""

    def __init__(self, entries: Tensor):
        self.entries = entries

    def dense(self) -> Tensor:
        return self.entries
