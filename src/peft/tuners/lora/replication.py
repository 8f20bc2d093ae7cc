"""A model whose stack of layers is built anew of some of its layers, several times over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from peft.tuners.lora.config import LoraConfig


def same_stack(config: LoraConfig, other: LoraConfig) -> bool:
    """Whether two adapters are on the same stack of layers."""
    ranges, others = config.layer_replication or (), getattr(other, "layer_replication", None) or ()
    return [tuple(entry) for entry in ranges] == [tuple(entry) for entry in others]


def replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> Callable[[], None]:
    """Builds a model's stack of layers anew from ranges [start, end) of it; repeated layers share their weights.

    Returns what undoes it.

    Raises:
        ValueError: the model has no such stack, or it is shorter than a range.
    """
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    stacks = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and count is not None and len(child) == count
    ]
    if not stacks:
        raise ValueError(f"layer_replication found no stack of layers in {type(model).__name__}.")
    parent, name, layers = stacks[0]
    order = [index for start, end in ranges for index in range(start, end)]
    if not order or max(order) >= len(layers):
        raise ValueError(f"layer_replication={ranges} goes beyond the {len(layers)} layers of {type(model).__name__}.")
    replicated = nn.ModuleList().train(layers.training)
    for index in order:
        layer, own = layers[index], {id(t): t for t in (*layers[index].parameters(), *layers[index].buffers())}
        replicated.append(copy.deepcopy(layer, own) if layer in list(replicated) else layer)
    _number_layers(replicated)
    setattr(parent, name, replicated)
    config.num_hidden_layers = len(replicated)

    def undo() -> None:
        setattr(parent, name, layers)
        _number_layers(layers)
        config.num_hidden_layers = count

    return undo


def _number_layers(layers: nn.ModuleList) -> None:
    # Attention modules find their part of the cache by this number.
    for index, layer in enumerate(layers):
        for module in layer.modules():
            attention: Any = module
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = index
