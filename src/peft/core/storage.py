"""How base weights are held: the one place that reads them as plain tensors and writes them back.

Kinds of storage are told apart by what the tensor or module is, never by flags on the model, and packages that are not
loaded are not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Storage:
    """Weights held as plain tensors in any floating dtype. Other kinds of storage override what differs."""

    #: what status reports call it; None for plain tensors
    backend: str | None = None

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight as a floating tensor; the very tensor where it is one."""
        return getattr(module, name)

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> Any:
        """Puts `value` in, in the storage's own form; returns what `restore` needs to undo it exactly.

        With `own`, the module gets a parameter of its own, so that modules tied to the old one keep theirs.
        """
        parameter = getattr(module, name)
        value = value.detach().to(dtype=parameter.dtype, device=parameter.device).contiguous()
        if own:
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
            return parameter
        before = parameter.data
        parameter.data = value
        return before

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        """Puts back what `write` returned, bit for bit."""
        if isinstance(before, nn.Parameter):
            setattr(module, name, before)
        else:
            getattr(module, name).data = before

    def nbytes(self, before: Any) -> int:
        """Memory that `before` holds, in bytes."""
        return before.numel() * before.element_size()


_PLAIN = Storage()


def storage_of(module: nn.Module, name: str) -> Storage:
    """How `module` holds its weight `name`.

    Raises:
        TypeError: the weight is held in a way that cannot be read.
    """
    weight = getattr(module, name, None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return _PLAIN
    raise TypeError(
        f"The weight {name!r} of {type(module).__name__} is held as {type(weight).__name__}"
        f"{f' of {weight.dtype}' if isinstance(weight, Tensor) else ''}, which cannot be read as a plain tensor."
    )


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of a module that accelerate offloads (to the CPU or the disk) are there.

    Changes made meanwhile are kept: they go back to where the weights were.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        weights = {key: value.detach().cpu() for key, value in module.state_dict().items() if not value.is_meta}
        hook.post_forward(module, torch.empty(0))
        _keep_offloaded(hook.weights_map, weights)


def _keep_offloaded(weights_map: Any, weights: dict[str, Tensor]) -> None:
    """Puts weights back into accelerate's map of offloaded tensors: a dict, or a view with a prefix on a loader."""
    prefix = getattr(weights_map, "prefix", "")
    target = getattr(weights_map, "dataset", weights_map)
    target = getattr(target, "state_dict", target)
    for key, value in weights.items():
        target[prefix + key] = value


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
