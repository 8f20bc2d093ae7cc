"""The factors of the LoRAs in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from peft.core.layer import AdapterLayer


class Pair(NamedTuple):
    """The factors of one LoRA: a [r, ...] and b [out, r, ...], and the scale of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def lora_pairs(model: nn.Module) -> list[Pair]:
    """The factors of all LoRAs in a model, but for those on embeddings and convolutions with groups."""
    pairs = []
    for layer in model.modules():
        if isinstance(layer, AdapterLayer) and "lora_A" in layer._modules:
            factors: Any = layer
            for name in factors.lora_A:
                a, b = factors.lora_A[name].weight, factors.lora_B[name].weight
                if a.shape[0] == b.shape[1]:
                    pairs.append(Pair(a, b, float(factors.scaling[name])))
    return pairs


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained in a model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The loss that `closure` evaluates anew, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_optimizer_class(optimizer_cls: Any) -> None:
    """Raises TypeError where something is no class of optimizers."""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a class of optimizers, as torch.optim.AdamW is; got {optimizer_cls!r}.")
