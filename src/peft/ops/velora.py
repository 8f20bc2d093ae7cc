"""A product whose input is kept for the gradient in groups, each by its length along one direction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_width(features: int, groups: int) -> int:
    """Features in a group; the last one is filled up with zeros."""
    return -(-features // groups)


def in_groups(x: Tensor, groups: int) -> Tensor:
    """x [..., features] as [rows, groups, width]."""
    width = group_width(x.shape[-1], groups)
    return F.pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def mean_direction(x: Tensor, groups: int) -> Tensor:
    """The unit vector [width] along the mean of all groups of x; equal entries if that is zero."""
    mean = in_groups(x, groups).float().mean((0, 1))
    return unit(mean if mean.any() else torch.ones_like(mean))


def unit(vector: Tensor) -> Tensor:
    """A vector of length 1 in the same direction."""
    return vector / torch.linalg.vector_norm(vector)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, direction: Tensor, groups: int, scale: float) -> Tensor:
        ctx.shape, ctx.scale = x.shape, scale
        ctx.save_for_backward(in_groups(x, groups) @ direction, a, direction)
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, a, direction = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        rebuilt = (lengths[..., None] * direction).flatten(1)[:, : ctx.shape[-1]]
        grad_x = (flat @ a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, flat.T @ rebuilt * ctx.scale, None, None, None


def compressed_linear(x: Tensor, a: Tensor, direction: Tensor, groups: int, scale: float) -> Tensor:
    """x A^T, of whose input only the lengths of its groups along a direction are kept (arXiv:2405.17991).

    The gradient of A is that for the input `scale` times rebuilt from these; all else is exact.

    Args:
        x: [..., in].
        a: [r, in].
        direction: unit vector [width of a group].
        groups: number of groups that the features are divided into.
        scale: factor on the rebuilt input.
    """
    return _Compressed.apply(x, a, direction.to(x.dtype), groups, scale)
