"""Matrices that repeat one block along their columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix


def shard_sums(x: Tensor, r: int) -> Tensor:
    """The sum of all shards of `r` entries of the last dimension: [..., n] to [..., r]; the last may be shorter.

    `shard_sums(x, r) @ block` is the product of x with the matrix that `Tiled` makes of the block.
    """
    whole = x.shape[-1] // r * r
    total = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
    rest = x[..., whole:]
    return total if rest.shape[-1] == 0 else total + F.pad(rest, (0, r - rest.shape[-1]))


class Tiled(Matrix):
    """[out, columns] out of a block [r, out]: its transpose over and over, the last one cut off at the end."""

    def __init__(self, block: Tensor, columns: int):
        super().__init__(block)
        self.count = columns

    def dense(self) -> Tensor:
        (block,) = self.tensors
        return block.T.repeat(1, -(-self.count // len(block)))[:, : self.count]

    def apply(self, x: Tensor) -> Tensor:
        (block,) = self.tensors
        return shard_sums(x, len(block)) @ block.to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        (block,) = self.tensors
        return F.embedding(index % len(block), block)

    def seen(self, x: Tensor) -> Tensor:
        return shard_sums(x, len(self.tensors[0]))

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        return (seen.T @ grad,)


def transform_shards(weight: Tensor, blocks: Tensor) -> Tensor:
    """W + W_jk M_j + M_j for each r x r block W_jk of a matrix [out, in], with M [out / r, r, r]."""
    count, r, _ = blocks.shape
    rows = weight.reshape(count, -1, r)
    changed = torch.baddbmm(rows, rows, blocks).view(count, r, -1, r)
    return (changed + blocks.unsqueeze(2)).view(weight.shape)
