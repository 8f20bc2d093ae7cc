"""Weights rounded to what a quantised storage can hold, as plain tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: the sixteen values of NF4 (arXiv:2305.14314, appendix E): quantiles of a normal distribution, scaled to [-1, 1]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_rounded(weight: Tensor, block: int = 64) -> Tensor:
    """`weight` rounded to NF4: in blocks of `block` entries, times the largest of each block."""
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    values = torch.tensor(NF4, device=weight.device, dtype=weight.dtype)
    nearest = torch.bucketize(blocks / largest, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * largest).flatten()[: len(flat)].view(weight.shape)


def int8_rounded(weight: Tensor) -> Tensor:
    """`weight` [out, in] rounded to 8 bits, times the largest entry of each row."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / step).round() * step
