"""Orthogonal matrices made of small blocks.

A rotation R that is near the identity is held as its change R - I: little of it is lost in half precision, and adding
the product with the change takes the place of a copy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peft.ops.lora import needs_plain

#: smaller blocks are put together up to this size: processors multiply a few larger matrices faster than many tiny ones
PACKED = 32


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def _skew_layout(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each entry of a skew-symmetric matrix comes from in the vector of its upper triangle, and its sign."""
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    index = torch.zeros(size, size, dtype=torch.long, device=device)
    sign = torch.zeros(size, size, dtype=torch.int8, device=device)
    count = torch.arange(rows.numel(), device=device)
    index[rows, columns] = index[columns, rows] = count
    sign[rows, columns], sign[columns, rows] = 1, -1
    return index.flatten(), sign


def skew_symmetric(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices [n, size, size] out of their upper triangles, row by row: [n, size (size - 1) / 2].

    In single precision at least, for what is made of them to be a rotation.
    """
    upper = upper.to(torch.promote_types(upper.dtype, torch.float32))
    if size == 1:
        return upper.new_zeros(upper.shape[0], 1, 1)
    index, sign = _skew_layout(size, upper.device)
    return upper.index_select(1, index).view(-1, size, size) * sign


def cayley(skew: Tensor) -> Tensor:
    """R - I for the rotations R = (I - Q) (I + Q)^-1 of skew-symmetric Q [n, b, b]."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # I + Q is never singular, and not asking whether it is saves a wait for the device.
    return torch.linalg.solve_ex(eye + skew, -2 * skew, left=False).result


def cayley_neumann(skew: Tensor, terms: int) -> Tensor:
    """R - I for R = (I + Q) (I - Q)^-1 with the inverse as a Neumann series (arXiv:2506.19847): nearly orthogonal.

    R is I + 2 Q + 2 Q^2 + ... of `terms` terms, the last of which counts once; with 3 or 4 terms it is
    I + 2 Q + 2 Q^2 + Q^3, with 2 it is I + 2 Q, and with 1 it is I.

    Args:
        skew: Q [n, b, b].
        terms: at least 1.
    """
    if terms < 3:
        return 2 * skew if terms == 2 else torch.zeros_like(skew)
    with torch.autocast(skew.device.type, enabled=False):
        last, square = max(3, terms - 1), skew @ skew
        pair = 2 * (skew + square)
        # Horner's rule in Q^2, two powers at a time, needs half the products.
        total = skew if last % 2 else 2 * skew + square
        for _ in range((last - 1) // 2):
            total = torch.baddbmm(pair, square, total)
        return total


def add_rotated(x: Tensor, change: Tensor) -> Tensor:
    """x R for a block-diagonal rotation R.

    Args:
        x: [..., n].
        change: its blocks minus the identity, [n / b, b, b]; [1, b, b] if all are the same one.
    """
    change = _packed(change, x.shape[-1])
    count, size = change.shape[0], change.shape[-1]
    rows = x.reshape(-1, size) if count == 1 else x.reshape(-1, count, size)
    if count == 1:
        rotated = torch.addmm(rows, rows, change[0])
    elif needs_plain(x, change):
        rotated = rows + torch.bmm(rows.transpose(0, 1), change).transpose(0, 1)
    elif not torch.is_grad_enabled() or not (x.requires_grad or change.requires_grad):
        rotated = _rotated(rows, change)
    else:
        rotated = _AddRotated.apply(rows, change)
    return rotated.reshape(x.shape)


def _rotated(rows: Tensor, change: Tensor) -> Tensor:
    """rows [t, count, size] with the product of each block of them with its one of `change` added."""
    out = rows.clone(memory_format=torch.contiguous_format)
    # Into the place where it belongs: `bmm` alone would leave its blocks apart, to be copied once more.
    out.transpose(0, 1).baddbmm_(rows.transpose(0, 1), change)
    return out


class _AddRotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(rows, change)
        return _rotated(rows, change)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, change = ctx.saved_tensors
        grad_rows = _rotated(grad, change.mT) if ctx.needs_input_grad[0] else None
        grad_change = torch.bmm(rows.permute(1, 2, 0), grad.transpose(0, 1)) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_change


def _packed(blocks: Tensor, total: int) -> Tensor:
    """Blocks along the diagonal of larger ones, where they are small."""
    count, size = blocks.shape[0], blocks.shape[-1]
    shared = count == 1
    most = max(PACKED // size, 1)
    factor = max(f for f in range(1, most + 1) if (total // size if shared else count) % f == 0)
    if factor == 1:
        return blocks
    groups = (blocks.expand(factor, -1, -1) if shared else blocks).reshape(-1, factor, size, size)
    return torch.diag_embed(groups.permute(0, 2, 3, 1), dim1=1, dim2=3).reshape(-1, factor * size, factor * size)


def drop_blocks(change: Tensor, p: float) -> Tensor:
    """With a share `p` of the blocks, chosen at random, replaced by the identity; a single block is kept."""
    count = change.shape[0]
    dropped = torch.randperm(count, device=change.device)[: int(p * count)]
    return change if count == 1 else change.index_fill(0, dropped, 0)


def butterfly(change: Tensor) -> Tensor:
    """The product of butterfly factors (arXiv:2311.06243) as blocks of its own, minus the identity.

    Factor i couples each half block with the one that is 2^i half blocks away. The product F_{m-1} ... F_0 of m factors
    is block-diagonal with blocks of size 2^(m-1) b.

    Args:
        change: blocks of the factors minus the identity, [m, n / b, b, b]; b is even and 2^(m-1) divides n / b.
    """
    factors, count, size, _ = change.shape
    if factors == 1:
        return change[0]
    half = size // 2
    blocks = change + torch.eye(size, dtype=change.dtype, device=change.device)
    product = blocks[0]
    for i in range(1, factors):
        pairs, groups = 2**i, count // 2**i
        # A block of this factor has the rows (h, j, r) for one j of each half h; one of the product so far (h; j, r).
        factor = blocks[i].view(groups, pairs, 2, half, 2, half)
        below = product.view(groups, 2, pairs, half, pairs * half)
        product = torch.einsum("njhrgq,ngjqs->nhjrgs", factor, below).reshape(groups, pairs * size, pairs * size)
    return product - torch.eye(product.shape[-1], dtype=change.dtype, device=change.device)
