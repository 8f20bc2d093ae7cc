"""How trained tensors and layers start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def uniform(*shape: int) -> Tensor:
    """What `nn.Linear` starts its weight with: uniform in +-1 / sqrt(in), for [out, in, ...]."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5)


def linears(*sizes: tuple[int, int], zero: bool) -> list[nn.Linear]:
    """Linear layers of these sizes (in, out) without biases, the second of them zero or drawn last.

    All are drawn twice, as by huggingface/peft, for the same start from the same seed.
    """
    layers = [nn.Linear(*size, bias=False) for size in sizes]
    for layer in (layers[0], *layers[2:]):
        layer.reset_parameters()
    nn.init.zeros_(layers[1].weight) if zero else layers[1].reset_parameters()
    return layers


def started(*shape: int, zero: bool | str = False) -> nn.Parameter:
    """A parameter that starts so, or at zero."""
    return nn.Parameter(torch.zeros(shape) if zero else uniform(*shape))
