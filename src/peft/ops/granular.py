"""Matrices of blocks that are each of low rank (arXiv:2505.20355)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix


class Granular(Matrix):
    """A matrix [out, in] of k x k blocks, each of rank r / k.

    The r ranks of a column of blocks are shared out among its blocks, k groups of r / k in the order of the rows; so
    are those of a row of blocks, in the order of the columns. Block (m, n) is (a[n][:, group m] b[m][group n])^T.

    Args:
        a: for each column of blocks, [k, in / k, r].
        b: for each row of blocks, [k, r, out / k].
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = a, b
        self.blocks, _, self.rank = a.shape

    def dense(self) -> Tensor:
        k, shape = self.blocks, (self.blocks, self.rank // self.blocks)
        a, b = self.a.unflatten(2, shape), self.b.unflatten(1, shape)
        # One product for each block: [m, n, out / k, in / k].
        blocks = b.mT @ a.permute(2, 0, 3, 1)
        return blocks.transpose(1, 2).reshape(k * b.shape[-1], k * a.shape[1])

    def apply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.blocks, self.a.shape[1])
        return self._up(torch.bmm(rows.transpose(0, 1), self.a.to(x.dtype)).transpose(0, 1)).view(*x.shape[:-1], -1)

    def columns(self, index: Tensor) -> Tensor:
        width = self.a.shape[1]
        low = F.embedding(index.flatten(), self.a.flatten(0, 1))
        # A column is in one block, so the ranks of the others are zero.
        here = F.one_hot(index.flatten() // width, self.blocks).to(low.dtype)
        return self._up(here.unsqueeze(-1) * low.unsqueeze(1)).view(*index.shape, -1)

    def _up(self, low: Tensor) -> Tensor:
        """[rows, n, r], of the columns of blocks, to [rows, out]."""
        groups = low.unflatten(2, (self.blocks, -1)).permute(2, 0, 1, 3).flatten(2)  # [m, rows, (n, r / k)]
        return torch.bmm(groups, self.b.to(low.dtype)).transpose(0, 1).flatten(1)
