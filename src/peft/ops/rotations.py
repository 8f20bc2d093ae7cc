"""Rotations of pairs of features."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, straight: Tensor, across: Tensor) -> Tensor:
    """Each pair (a, b) of features becomes (s a - t b, s' b + t' a).

    The features lie in groups of 2 h, and in a group feature i pairs with feature i + h.

    Args:
        x: [..., groups * 2 h].
        straight: s and s', [groups, 2, h], or [groups, 1, h] where s' is s.
        across: t and t', of the same shape.

    Returns:
        [..., groups * 2 h], in the larger dtype of x and the factors.
    """
    groups, _, half = straight.shape
    a, b = x.unflatten(-1, (groups, 2, half)).unbind(-2)
    s, t = (factors.unbind(1) for factors in (straight, across))
    return torch.stack((a * s[0] - b * t[0], b * s[-1] + a * t[-1]), dim=-2).flatten(-3)
