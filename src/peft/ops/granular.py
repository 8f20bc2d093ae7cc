"""Matrices of blocks that each have a low rank (arXiv:2505.20355)."""

from __future__ import annotations

import torch
from torch import Tensor

from peft.ops.matrix import Matrix


class Granular(Matrix):
    """scale M, for a matrix M [out, in] of k x k blocks.

    The r ranks of a column of blocks are shared out among its blocks, k groups of r / k in the order of the rows; so
    are those of a row of blocks, in the order of the columns. Block (m, n) is (a[n][:, group m] b[m][group n])^T.

    Args:
        a: for each column of blocks, [k, in / k, r].
        b: for each row of blocks, [k, r, out / k].
        scale: a number.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float = 1.0):
        super().__init__(a, b)
        self.scale = scale

    def thin(self) -> tuple[Tensor, Tensor]:
        # Of rank k r, and zero for the most part: row m of blocks has group m of each column's ranks.
        a, parts = self._parts()
        spread = torch.diag_embed(parts.permute(1, 2, 3, 0), dim1=0, dim2=1)  # [m, m, n, r / k, out / k]
        return torch.block_diag(*a.mT), spread.permute(0, 4, 2, 1, 3).flatten(2).flatten(0, 1)

    def dense(self) -> Tensor:
        down, up = self.thin()
        return up @ down

    def added_to(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() or weight.dtype != self.tensors[0].dtype:
            return super().added_to(weight)
        a, parts = self._parts()
        total, count = weight.clone(memory_format=torch.contiguous_format), len(a)
        groups = a.mT.unflatten(1, (count, -1))  # [n, m, r / k, in / k]
        for m, rows in enumerate(total.chunk(count)):
            for n, block in enumerate(rows.chunk(count, 1)):
                block.addmm_(parts[m, n].T, groups[n, m])
        return total

    def _parts(self) -> tuple[Tensor, Tensor]:
        """a, and scale b in its groups: [m, n, r / k, out / k]."""
        a, b = self.tensors
        return a, (b * self.scale).unflatten(1, (len(b), -1))

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (tensor.to(grad.dtype) for tensor in self.tensors)
        grad, seen = (rows.unflatten(1, (len(a), -1)).transpose(0, 1) for rows in (grad, seen))  # [k, t, width / k]
        low, high = _crossed(seen @ a), _crossed(grad @ (b.mT * self.scale))
        return seen.mT @ high, low.mT @ grad * self.scale


def _crossed(rows: Tensor) -> Tensor:
    """Group m of block n [k, t, r] as group n of block m."""
    return rows.unflatten(2, (len(rows), -1)).transpose(0, 2).flatten(2)
