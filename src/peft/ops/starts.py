"""How trained tensors start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def uniform(*shape: int) -> Tensor:
    """What `nn.Linear` starts its weight with: uniform in +-1 / sqrt(in), for [out, in, ...]."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5)


def started(*shape: int, zero: bool | str = False) -> nn.Parameter:
    """A parameter that starts so, or at zero."""
    return nn.Parameter(torch.zeros(shape) if zero else uniform(*shape))
