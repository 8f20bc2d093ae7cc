"""The tensors of a new adapter on one layer: with values, or without memory where a file is about to bring them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core.storage import place_of

if TYPE_CHECKING:
    from peft.core.layer import AdapterLayer


def start_of(matrix: Tensor, waits_for_file: bool) -> Tensor:
    """A base weight as the tensors of a new adapter are made of it: in float32, or float64 where it is.

    On the meta device where it has no memory itself, or where a file is about to bring what is made of it.
    """
    matrix = matrix.detach()
    matrix = matrix.to("meta") if waits_for_file else matrix
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def make(layer: AdapterLayer, name: str, config: Any, planned: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Makes adapter `name`, beside the base weight; on the meta device where that is the default device."""
    device = layer.place()[0]
    layer.new_record(name, config)
    layer.records[name].__dict__.update(planned)
    layer.__dict__["waits_for_file"] = torch.get_default_device().type == "meta"
    try:
        # Beside a weight without memory, tensors would lose their values at once: they are made without as well.
        with device if device is not None and device.type == "meta" else nullcontext():
            layer.create(name, config, **settings)
        _draw(layer, name, config)
    finally:
        layer.__dict__["waits_for_file"] = False
    for parameter in layer.adapter_parameters(name):
        parameter.requires_grad = False
    if not lacks(layer, name):  # else loading will bring them
        layer.move(name, device)
    elif device is not None and device.type != "meta":
        _move_fixed(layer, name, device)


def lacks(layer: AdapterLayer, name: str) -> bool:
    """Whether tensors of an adapter have no memory yet."""
    fixed = any(tensor.is_meta for _, tensor in _fixed(layer, name))
    return fixed or any(parameter.is_meta for parameter in layer.adapter_parameters(name))


def fill_in(layer: AdapterLayer, name: str, config: Any, settings: Mapping[str, Any]) -> None:
    """Gives those tensors of an adapter that have no memory the values of a fresh adapter."""
    fixed = _fixed(layer, name)
    if any(tensor.is_meta for _, tensor in fixed):
        _draw(layer, name, config)
        containers: Any = layer._modules
        for slot, old in fixed:
            new = containers[slot][name].to(layer.place()[0], old.dtype)
            containers[slot][name] = _like(old, new) if old.is_meta else old
    before = list(layer.adapter_parameters(name))
    if any(parameter.is_meta for parameter in before):
        layer.create(name, config, **settings)
        layer.move(name, *place_of(layer.get_base_layer()))
        for parameter, new in zip(before, layer.adapter_parameters(name), strict=True):
            new.data = new.data.to(parameter.dtype) if parameter.is_meta else parameter.data
            new.requires_grad_(parameter.requires_grad)


def _draw(layer: AdapterLayer, name: str, config: Any) -> None:
    """Makes the fixed tensors; all with values, unless a file has all those that would be without."""
    with torch.device("cpu"):
        layer.draw(name, config)
        without = [slot for slot, tensor in _fixed(layer, name) if tensor.is_meta]
        if layer.waits_for_file and not all(layer.slots[slot].is_stored(config, slot) for slot in without):
            layer.__dict__["waits_for_file"] = False
            layer.draw(name, config)


def _fixed(layer: AdapterLayer, name: str) -> list[tuple[str, Tensor]]:
    """The fixed tensors of an adapter, by slot."""
    found = []
    for slot in layer.adapter_layer_names:
        if not layer.slots[slot].trained:
            entries: Any = layer._modules[slot]
            if name in entries and isinstance(entries[name], Tensor):
                found.append((slot, entries[name]))
    return found


def _move_fixed(layer: AdapterLayer, name: str, device: torch.device) -> None:
    containers: Any = layer._modules
    for slot, tensor in _fixed(layer, name):
        if not tensor.is_meta:
            containers[slot][name] = _like(tensor, tensor.data.to(device))


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A tensor held as another one is: as a frozen parameter, or as it is."""
    return nn.Parameter(new.data, requires_grad=False) if isinstance(old, nn.Parameter) else new
