"""Files without what can be made again: fixed tensors that come from a seed or from the base weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from peft.checkpoint.state import locations_of
from peft.core.layer import AdapterLayer
from peft.core.plan import Plan
from peft.core.undo import replaced
from peft.core.walk import layers_of
from peft.errors import warn

#: how far the sum of a tensor that is made again may be off, as a share of its length: rounding, on another machine
_TOLERANCE = 1e-4


def leave_out(
    model: Any, adapter_name: str, tensors: dict[str, Tensor], content: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter without the fixed tensors that seed and base weights give again, and its configuration, which says so.

    What layers share is written once, which huggingface/peft reads right as well.

    Each is made again to see whether that is so; what comes out otherwise stays in the file, with a warning.

    Args:
        model: a `PeftModel` whose adapters are on layers.
        adapter_name: which of them.
        tensors, content: the adapter and its configuration, as they would be saved.
    """
    tuner, config = model.base_model, model.peft_config[adapter_name]
    method = tuner.method(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        again = _made_again(tuner, adapter_name)
    held = {name: tensors for name, tensors in _fixed(tuner, adapter_name).items() if name in again}
    differ = {
        name for name in held if len(again[name]) != len(held[name]) or not all(map(_alike, held[name], again[name]))
    }
    stored = {name: method.slot(name).stored for name in held}
    # What one field of the configuration is about stays or goes together.
    kept = [name for name in held if name in differ or stored[name] in {stored[other] for other in differ} - {True}]
    sums = {name: checksum(held[name]) for name in held if name not in kept}
    if kept:
        warn(
            f"Adapter {adapter_name!r}: neither seed nor base weights give {', '.join(kept)} as they are here, so they"
            " stay in the file."
        )
    before = locations_of(model, adapter_name)
    with replaced(config, "left_out", sums):
        after = locations_of(model, adapter_name)
    # What layers share has a name in each of them; the first will do.
    once = {(id(slot.owner), slot.attribute): key for key, slot in reversed(after.items())}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in before or key in once.values()}
    if not sums:
        return tensors, content
    fields = {stored[name]: False for name in sums if stored[name] is not True}
    return tensors, {**content, **fields, "left_out": sums}


def check_left_out(tuner: Any, adapter_name: str) -> None:
    """Checks what a file has left out and loading has made again. From then on the adapter is saved in full.

    Raises:
        RuntimeError: something came out otherwise than where the file was written.
    """
    config = tuner.peft_config[adapter_name]
    sums = getattr(config, "left_out", None)
    if not sums:
        return
    held = _fixed(tuner, adapter_name, everything=True)
    off = [name for name, before in sums.items() if name in held and not _has_sum(held[name], before)]
    if off:
        raise RuntimeError(
            f"The file of adapter {adapter_name!r} leaves out {', '.join(off)}, which come out otherwise here: the base"
            " weights, or what computes, are not those it was saved with. Save it in full (without minimal=True) where"
            " it loads."
        )
    config.left_out = None
    slots = tuner.method(config).layer_class.slots
    for name in sums:
        if name in slots and isinstance(slots[name].stored, str):
            setattr(config, slots[name].stored, True)


def checksum(tensors: list[Tensor]) -> float:
    """A sum that tells tensors apart, also those that differ in signs or order."""
    total = 0.0
    for place, tensor in enumerate(tensors):
        values = tensor.detach().to("cpu", torch.float64).flatten()
        total += float(values @ torch.arange(len(values), dtype=torch.float64).add_(place + 1).cos_())
    return total


def _has_sum(tensors: list[Tensor], before: float) -> bool:
    length = sum(float(tensor.detach().double().norm()) for tensor in tensors)
    return abs(checksum(tensors) - before) <= _TOLERANCE * max(length, 1e-12)


def _fixed(tuner: Any, adapter_name: str, everything: bool = False) -> dict[str, list[Tensor]]:
    """The fixed tensors that the file of an adapter holds (`everything`: all), by slot, in the order of the layers."""
    config = tuner.peft_config[adapter_name]
    method = tuner.method(config)
    layers = layers_of(tuner, AdapterLayer, adapter_name).values()
    found: dict[str, list[Tensor]] = {}
    for name, slot in method.layer_class.slots.items():
        if slot.trained or not (everything or slot.is_stored(config, name)):
            continue
        held: list[Any] = [method.shared] if slot.shared else [layer._modules for layer in layers]
        own = [containers[name] for containers in held if adapter_name in containers.get(name, ())]
        found[name] = [tensor for container in own for tensor in _tensors(container[adapter_name])]
    return {name: tensors for name, tensors in found.items() if tensors}


def _made_again(tuner: Any, adapter_name: str) -> dict[str, list[Tensor]]:
    """The same as seed and base weights give them; without those that are made otherwise."""
    config = tuner.peft_config[adapter_name]
    method = tuner.method(config)
    made: dict[str, list[Tensor]] = {}
    if method.shared:
        plan = Plan.of_layers(tuner.parts(), adapter_name)
        method.note_plan(plan, config)
        with torch.device("cpu"):
            made = {name: list(_tensors(value)) for name, value in method.share(plan, config, adapter_name).items()}
        method.planned = {}
    for layer in layers_of(tuner, AdapterLayer, adapter_name).values():
        fixed = {name: slot for name, slot in layer.slots.items() if not slot.trained and not slot.shared}
        names = [name for name, slot in fixed.items() if slot.is_stored(config, name)]
        for name, tensors in _drawn(layer, adapter_name, config, names).items():
            made.setdefault(name, []).extend(tensors)
    return made


def _drawn(layer: AdapterLayer, adapter_name: str, config: Any, names: list[str]) -> dict[str, list[Tensor]]:
    """What a layer draws for slots: into those of a copy, which has all else of it."""
    twin, empty = copy.copy(layer), {name: layer.slots[name].container() for name in names}
    twin.__dict__["_modules"] = {**layer._modules, **empty}
    made: Any = empty
    with suppress(ValueError, KeyError), torch.device("cpu"):  # where it has nothing to draw them from
        twin.draw(adapter_name, config)
    return {name: list(_tensors(made[name][adapter_name])) for name in names if adapter_name in made[name]}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        entries = value.state_dict() if isinstance(value, nn.Module) else value
        yield from (entries[name] for name in sorted(entries))


def _alike(held: Tensor, made: Tensor) -> bool:
    if held.shape != made.shape:
        return False
    made = made.detach().to("cpu", held.dtype)
    same = held.detach().cpu()
    return torch.allclose(same, made, rtol=1e-5, atol=1e-7) if held.is_floating_point() else torch.equal(same, made)
