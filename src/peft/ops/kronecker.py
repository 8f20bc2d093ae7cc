"""Kronecker products, applied without being built."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix, recomputed


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `dimension`.

    Args:
        dimension: a positive number.
        factor: if it divides `dimension`, the first of the two. Else the first is the largest divisor up to it, and up
            to the square root; -1 sets no bound of its own.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = isqrt(dimension) if factor == -1 else min(factor, isqrt(dimension))
    first = max((m for m in range(1, bound + 1) if dimension % m == 0), default=1)
    return first, dimension // first


def kron_linear(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x (w1 kron w2)^T, for x [..., c d], w1 [a, c], w2 [b, d]: [..., a b].

    With each vector of x seen as a matrix X [c, d], it is w1 X w2^T, in the order that takes fewer operations.
    """
    (a, c), (b, d) = w1.shape, w2.shape
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    rows = x.reshape(-1, c, d)
    if c * b * (d + a) <= a * d * (c + b):
        return _left(w1, (rows.reshape(-1, d) @ w2.T).view(-1, c, b)).reshape(*x.shape[:-1], a * b)
    return (_left(w1, rows).view(-1, d) @ w2.T).reshape(*x.shape[:-1], a * b)


def _left(matrix: Tensor, batch: Tensor) -> Tensor:
    """matrix @ each of a batch, as a batch of products: `matmul` would bring its results into another order first."""
    return torch.bmm(matrix.expand(batch.shape[0], -1, -1), batch)


class Kron(Matrix):
    """w1 kron w2, for w1 [a, c] and w2 [b, d] or [b, d, *kernel]: a matrix [a b, c d * kernel]."""

    def dense(self) -> Tensor:
        w1, w2 = self.tensors
        # The kernel is part of w2's columns. For full factors of one-dimensional convolutions, huggingface/peft takes
        # the product with w1 along the last two of three dimensions, and adapters trained with it rely on that.
        w2 = w2 if w2.dim() == 3 else w2.flatten(1)
        return torch.kron(w1, w2.contiguous()).reshape(w1.shape[0] * w2.shape[0], -1)

    def apply(self, x: Tensor) -> Tensor:
        return recomputed(kron_linear, x, *self.tensors)

    def columns(self, index: Tensor) -> Tensor:
        # Column m n + i is the product of column m of w1 and column i of w2, which has n.
        w1, w2 = self.tensors
        count = w2.shape[1]
        left, right = F.embedding(index // count, w1.T), F.embedding(index % count, w2.T)
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
