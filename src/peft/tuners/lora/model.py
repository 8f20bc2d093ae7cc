"""A model with LoRA adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from peft.core.base_op import base_op
from peft.core.layer import AdapterLayer
from peft.core.tuner import BaseTuner
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LAYERS, LoraLayer, alpha_of, rank_of


class LoraModel(BaseTuner):
    """A model with LoRA adapters on its layers (arXiv:2106.09685)."""

    prefix = "lora_"
    layer_class = LoraLayer

    def layer_settings(self, config: LoraConfig, key: str) -> dict[str, Any]:
        return {"r": rank_of(config, key), "lora_alpha": alpha_of(config, key)}

    def make_layer(self, config: LoraConfig, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        base = target.get_base_layer() if isinstance(target, AdapterLayer) else target
        op = base_op(base, parameter_name)
        if op is None:
            raise ValueError(f"{key!r} is a {type(base).__name__}, which LoRA does not know.")
        return LAYERS[op.kind](target, parameter_name=parameter_name)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> Callable[[], None] | None:
        return replicate_layers(model, peft_config.layer_replication) if peft_config.layer_replication else None


def replicate_layers(model: nn.Module, ranges: list[tuple[int, int]]) -> Callable[[], None]:
    """Builds a model's stack of layers anew from ranges [start, end) of it; repeated layers share their weights.

    Returns what undoes it.

    Raises:
        ValueError: the model has no such stack, or it is shorter than a range.
    """
    config = getattr(model, "config", None)
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
        raise ValueError(f"layer_replication={ranges} asks for layers that {type(model).__name__} does not have ({len(layers)} layers).")
    replicated = nn.ModuleList()
    for index in order:
        replicated.append(_sharing_copy(layers[index]) if layers[index] in list(replicated) else layers[index])
    _number_layers(replicated)
    setattr(parent, name, replicated)
    config.num_hidden_layers = len(replicated)

    def undo() -> None:
        setattr(parent, name, layers)
        _number_layers(layers)
        config.num_hidden_layers = count

    return undo


def _sharing_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that holds the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _number_layers(layers: nn.ModuleList) -> None:
    # Attention modules find their part of the cache by this number.
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
