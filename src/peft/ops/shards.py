"""Matrices that repeat one block along their columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.lora import needs_plain
from peft.ops.matrix import Matrix


def tile_columns(block: Tensor, columns: int) -> Tensor:
    """[out, columns] out of a block [r, out]: its transpose over and over, the last one cut off at the end."""
    return block.T.repeat(1, -(-columns // block.shape[0]))[:, :columns]


def shard_sums(x: Tensor, r: int) -> Tensor:
    """The sum of all shards of `r` entries of the last dimension: [..., n] to [..., r]; the last may be shorter.

    `shard_sums(x, r) @ block` is x @ tile_columns(block, n).T.
    """
    whole = x.shape[-1] // r * r
    total = x[..., :whole].unflatten(-1, (-1, r)).sum(-2)
    rest = x[..., whole:]
    return total if rest.shape[-1] == 0 else total + F.pad(rest, (0, r - rest.shape[-1]))


def shard_linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """x (W + tile_columns(block))^T + b, for a frozen W.

    As a changed weight, which is a copy of W, the block takes no product beside the base's own; for its gradient, the
    sums of the shards of x are all that is kept.

    Args:
        x: [..., in].
        weight: W [out, in].
        bias: b [out], or None.
        block: [r, out].
    """
    tracked = torch.is_grad_enabled() and (x.requires_grad or block.requires_grad)
    if not tracked or needs_plain(x, weight, block):
        return F.linear(x, weight + tile_columns(block, weight.shape[1]), bias)
    # The sums come from outside, where they have a history: second derivatives go through it, first ones need it not.
    return _ShardLinear.apply(x, shard_sums(x, block.shape[0]), weight, bias, block)


class _ShardLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        ctx.save_for_backward(sums, weight, block)
        return F.linear(x, weight + tile_columns(block, weight.shape[1]), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, weight, block = ctx.saved_tensors
        grad_x = grad @ (weight + tile_columns(block, weight.shape[1])) if ctx.needs_input_grad[0] else None
        grad_block = sums.flatten(0, -2).T @ grad.flatten(0, -2) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_block


class Tiled(Matrix):
    """`tile_columns` of a block [r, out]: its transpose over and over, up to so many columns."""

    def __init__(self, block: Tensor, columns: int):
        self.block, self.count = block, columns

    def dense(self) -> Tensor:
        return tile_columns(self.block, self.count)

    def apply(self, x: Tensor) -> Tensor:
        return shard_sums(x, len(self.block)) @ self.block.to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        return F.embedding(index % len(self.block), self.block)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return shard_linear(x, weight, bias, self.block.to(weight.dtype))


def transform_shards(weight: Tensor, blocks: Tensor) -> Tensor:
    """W + W_jk M_j + M_j for each r x r block W_jk of a matrix [out, in], with M [out / r, r, r]."""
    count, r, _ = blocks.shape
    rows = weight.reshape(count, -1, r)
    changed = torch.baddbmm(rows, rows, blocks).view(count, r, -1, r)
    return (changed + blocks.unsqueeze(2)).view(weight.shape)
