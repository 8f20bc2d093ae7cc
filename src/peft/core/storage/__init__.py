"""How base weights are held: the one place that reads them as plain tensors and writes them back.

Kinds of storage are told apart by what the tensor or module is, never by flags on the model, and packages that are not
loaded are not asked. `base` has what every kind does, `quantised` the packages that hold weights in few bits, `shared`
what several processes hold parts of.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage.base import Narrow, Storage, widened
from peft.core.storage.flat import Mastered, Partitioned, Window, check_whole, together
from peft.core.storage.parametrised import Parametrised, is_parametrised
from peft.core.storage.quantised import QUANTISED
from peft.core.storage.sharded import SHARDED
from peft.core.storage.shared import ALONE, KINDS, kind_of, shape_of, whole

_PLAIN, _NARROW, _PARAMETRISED = Storage(), Narrow(), Parametrised()
KINDS[:] = SHARDED, Partitioned(), Mastered(), Window()


def storage_of(module: nn.Module, name: str) -> Storage:
    """How `module` holds its weight `name`.

    Raises:
        TypeError: the weight is held in a way that cannot be read.
    """
    weight: Any = module._parameters.get(name)
    if weight is None:
        if is_parametrised(module, name):
            return _PARAMETRISED
        weight = getattr(module, name, None)
    if _is_usual(weight):
        kind = kind_of(weight)
        return _PLAIN if kind is ALONE else kind
    if SHARDED.holds(weight) and weight.is_floating_point():
        return SHARDED
    for storage in QUANTISED:
        if storage.holds(module, name, weight):
            return storage
    is_plain_kind = isinstance(weight, Tensor) and (weight.is_floating_point() or not weight.dim())  # or a count
    if is_plain_kind and not _is_packed(module, weight):
        check_whole(module, name)
        return _NARROW if weight.itemsize == 1 else _PLAIN
    raise TypeError(
        f"{type(module).__module__}.{type(module).__name__} holds its weight {name!r} as"
        f" {'nothing' if weight is None else type(weight).__name__}"
        f"{f' of {weight.dtype}' if isinstance(weight, Tensor) else ''}, which cannot be read as a plain tensor."
        f" Known are floating tensors and the layers of {', '.join(dict.fromkeys(s.backend or '' for s in QUANTISED))}."
    )


def _is_usual(weight: Any) -> bool:
    # A tensor that is no parameter may be what a packed layer has unpacked for its own forward.
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1


def _is_packed(module: nn.Module, weight: Tensor) -> bool:
    """Whether a weight that says it is floating means other values than those in it."""
    if type(weight).dequantize is not Tensor.dequantize:
        return True
    return weight.itemsize == 1 and any("scale" in name for name in (*module._parameters, *module._buffers))


def read_bias(module: nn.Module, name: str | None) -> Tensor | None:
    """A module's bias; None where it has none."""
    bias = getattr(module, name, None) if name else None
    if bias is None or not shape_of(bias).numel():  # Transformer Engine's layers have an empty one
        return None
    return widened(whole(bias))


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a weight is a plain floating tensor, which can be computed with as it is."""
    return _is_usual(getattr(module, name, None)) or storage_of(module, name) is _PLAIN


@contextmanager
def onloaded(module: nn.Module, written: bool = True) -> Iterator[None]:
    """While it lasts, the weights of a module that accelerate offloads (to the CPU or the disk) are there.

    Changes made meanwhile go back to where the weights were, if any are `written`. Those that ZeRO-3 has shared out are
    there too, without their changes, which `Storage.write` puts in; a call of all processes. (In a forward pass of its
    engine, DeepSpeed gathers what is asked for by itself.)
    """
    hook: Any = getattr(module, "_hf_hook", None)
    away = getattr(hook, "offload", False) and any(tensor.is_meta for tensor in module.parameters())
    if not away:  # or there for a caller
        running = getattr(module._parameters, "_in_forward", False)
        with together(() if running else module._parameters.values()):
            yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        held = module.state_dict() if written else {}
        weights = {key: value.detach().cpu() for key, value in held.items() if not value.is_meta}
        hook.post_forward(module, torch.empty(0))
        _keep_offloaded(hook.weights_map, weights)


def _keep_offloaded(weights_map: Any, weights: dict[str, Tensor]) -> None:
    """Puts weights back into accelerate's map of offloaded tensors: a dict, or a view with a prefix on a loader."""
    prefix = getattr(weights_map, "prefix", "")
    target = getattr(weights_map, "dataset", weights_map)
    folder, index = getattr(target, "save_folder", None), getattr(target, "index", {})
    for name, value in weights.items():
        key = prefix + name
        if torch.equal(weights_map[name].to(value), value):
            continue
        if folder is None or key not in index:
            getattr(target, "state_dict", target)[key] = value
        else:  # what is on the disk stays there, in a new file: the old one may be mapped into memory
            Path(folder, f"{key}.dat").unlink(missing_ok=True)
            sys.modules["accelerate.utils"].offload_weight(value, key, folder, index)


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating dtype that new tensors beside this module should have; None where it says neither.

    For offloaded modules it is the device that they run on.
    """
    device = dtype = None
    for tensor in (*module.parameters(), *module.buffers()):
        device = device or tensor.device
        if tensor.is_floating_point() and tensor.element_size() >= 2:
            dtype = tensor.dtype
            break
    hook: Any = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False) and getattr(hook, "execution_device", None) is not None:
        device = torch.device(hook.execution_device)
    return device, dtype


def backend_of(layer: Any) -> str | None:
    """What the storage of an adapter layer's base weight is called; None for plain tensors."""
    try:
        return storage_of(layer.get_base_layer(), layer.op.weight_name).backend
    except TypeError:
        return None
