"""Weights that several processes share out as DTensors: those of `fully_shard` (FSDP2), of tensor parallelism, of both.

A new adapter starts the same on all processes (`agree`), and where a model was shared out before its adapter came, the
adapter's gradients are averaged over the processes that have samples of their own (`average_gradients`), as
`fully_shard` does for what it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage.shared import Shared, is_one_of_many
from peft.ops.internals import fsdp_modules, is_put_away


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is a DTensor; without torch's module for it, there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def shared_out(value: Tensor, mesh: Any, placements: Iterable[Any]) -> Any:
    """A DTensor of a tensor that all processes have; nothing is sent, gradients come back whole."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, tuple(placements))


def joined(part: Tensor, mesh: Any, placements: Iterable[Any], shape: Sequence[int]) -> Tensor:
    """The whole tensor of this shape of which the processes hold these parts; gradients go back to the parts."""
    from torch.distributed.tensor import DTensor

    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, tuple(placements), run_check=False, shape=size, stride=stride).full_tensor()


class Sharded(Shared):
    """Weights that are DTensors; `fully_shard` holds the same memory, so they are written in place."""

    apart = True

    def holds(self, tensor: Any) -> bool:
        return is_dtensor(tensor)

    def part(self, tensor: Any) -> Tensor:
        return tensor.detach().to_local()

    def split(self, tensor: Any, value: Tensor) -> Tensor:
        value = value.to(dtype=tensor.dtype, device=self.part(tensor).device)
        return shared_out(value, tensor.device_mesh, tensor.placements).to_local()

    def join(self, tensor: Any, part: Tensor) -> Tensor:
        return joined(part, tensor.device_mesh, tensor.placements, tensor.shape)

    def whole(self, tensor: Any) -> Tensor:
        return tensor.full_tensor()

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module in (module for holder in modules for module in holder.modules()):
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if is_dtensor(tensor):
                            replaced.append((held, name, tensor))
                            held[name] = self.whole(tensor)  # type: ignore[assignment]
            yield
        finally:
            for held, name, tensor in replaced:
                held[name] = tensor

    def why_not_own(self, module: nn.Module) -> str | None:
        return "held by fully_shard" if is_managed(module) else None


SHARDED = Sharded()


# ---- fully_shard


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` holds the parameters of a module, by itself or as one of those around it."""
    return "_is_fsdp_managed_module" in module.__dict__  # past what some modules ask those that they stand for


def reshard() -> None:
    """Lets `fully_shard` put away the whole weights that it keeps after a forward pass: what is written there is lost.

    No other process has to do so as well.
    """
    for module in fsdp_modules():
        module.reshard()


def data_parallel_dims(parameter: Any) -> int:
    """How many of the first dimensions of a parameter's mesh are those that `fully_shard` was given.

    It replicates over some, shards over one, and what comes after them is tensor parallel.
    """
    return next((i for i, placement in enumerate(parameter.placements) if not placement.is_replicate()), 0) + 1


def call_whole(module: nn.Module, *args: Any) -> Any:
    """What a module makes of these arguments, also outside of the forward pass that `fully_shard` gathers it for.

    A call of all processes that share it.
    """
    weight = module._parameters.get("weight")
    holder = next((held for held in fsdp_modules() if is_put_away(held, weight)), None) if is_dtensor(weight) else None
    if holder is None or holder is module:
        return module(*args)
    with SHARDED.gathered([module]):
        return type(module).forward(module, *args)  # past the hooks of tensor parallelism, for the weight is whole


def agree(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Gives new tensors the values of the first of the processes that share a model out; a call of all of them."""
    held: Any = model.parameters() if is_one_of_many() else ()
    meshes = [parameter.device_mesh for parameter in held if is_dtensor(parameter)]
    if not meshes:
        return
    mesh = max(meshes, key=lambda mesh: mesh.ndim)
    for tensor in dict.fromkeys(tensors):
        if not tensor.is_meta and not is_dtensor(tensor):
            tensor.data.copy_(of_first(tensor.data.contiguous(), mesh))


def of_first(value: Tensor, mesh: Any) -> Tensor:
    """A tensor as the first of the processes of a mesh has it, written in place; a call of all of them."""
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        torch.distributed.broadcast(value, torch.distributed.get_global_rank(group, 0), group)
    return value


def average_gradients(model: nn.Module) -> None:
    """Lets a model average the gradients of what `fully_shard` does not hold, where it holds the rest of the model.

    It does so over the processes that have samples of their own. Parameters are looked for in each forward pass, as
    some may come later or be replaced.
    """
    modules = model.modules() if is_one_of_many() else ()
    held = [p for m in modules if is_managed(m) for p in m._parameters.values() if is_dtensor(p)]
    if held and _join not in model._forward_pre_hooks.values():
        parameter: Any = held[0]
        model.__dict__["_averages_over"] = [
            parameter.device_mesh.get_group(dim) for dim in range(data_parallel_dims(parameter))
        ]
        model.register_forward_pre_hook(_join)


def _join(model: Any, args: Any) -> None:
    if not torch.is_grad_enabled():
        return
    groups = model._averages_over

    def average(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        for group in groups:
            torch.distributed.all_reduce(grad, group=group)
            grad /= group.size()
        return grad

    for module in model.modules():
        for parameter in () if is_managed(module) else module._parameters.values():
            if parameter is not None and parameter.requires_grad and not hasattr(parameter, "_is_averaged"):
                parameter.register_hook(average)
                parameter._is_averaged = True
