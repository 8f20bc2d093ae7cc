"""Weights that several processes share out as DTensors: those of `fully_shard` (FSDP2), of tensor parallelism, of both.

Reading a weight gathers it, so all processes that share it read it together; writing puts each process's own part in.
The tensors of adapters are gathered likewise where they are shared out (`gathered`). A new adapter starts the same on
all processes (`agree`), and where a model was shared out before its adapter came, the adapter's gradients are averaged
over the processes that have samples of their own (`average_gradients`), as `fully_shard` does for what it holds.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage import flat
from peft.core.storage.base import Storage
from peft.ops.internals import fsdp_modules, is_put_away


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is shared out; without torch's module for it, there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def whole(tensor: Any) -> Tensor:
    """A tensor without its share-out: gathered from all processes that share it, which all call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def own_part(value: Tensor, like: Any) -> Tensor:
    """What this process holds of a whole tensor that is shared out as `like` is; gradients come back whole."""
    return shared_out(value, like.device_mesh, like.placements).to_local()


def shared_out(value: Tensor, mesh: Any, placements: Iterable[Any]) -> Any:
    """A DTensor of a tensor that all processes have; nothing is sent, gradients come back whole."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, tuple(placements))


class Sharded(Storage):
    """Weights that are DTensors: read whole, written into the part of each process."""

    def read(self, module: nn.Module, name: str) -> Tensor:
        return whole(getattr(module, name))

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        parameter: Any = getattr(module, name)
        return parameter if own else parameter.detach().to_local().clone()

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> Any:
        before, parameter = self.keep(module, name, own), getattr(module, name)
        value = own_part(value.detach().to(dtype=parameter.dtype, device=parameter.to_local().device), parameter)
        if own:
            self._replace(module, name, parameter, value)
        else:
            parameter.detach().to_local().copy_(value)  # in place: `fully_shard` holds the same memory
        return before

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        if isinstance(before, nn.Parameter):
            setattr(module, name, before)
        else:
            getattr(module, name).detach().to_local().copy_(before)

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        parameter: Any = getattr(module, name)
        if isinstance(before, nn.Parameter):
            return whole(before.detach())
        return whole(_like(before, parameter))

    def nbytes(self, before: Any) -> int:
        return super().nbytes(before.to_local() if is_dtensor(before) else before)

    @staticmethod
    def _replace(module: nn.Module, name: str, parameter: Any, value: Tensor) -> None:
        if is_managed(module):
            raise NotImplementedError(
                f"The {name} of this {type(module).__name__} is shared by several modules and held by fully_shard, so a"
                " merge cannot give this module one of its own. Merge before fully_shard, or into an unsharded model."
            )
        setattr(module, name, nn.Parameter(_like(value, parameter), requires_grad=parameter.requires_grad))


def _like(part: Tensor, parameter: Any) -> Any:
    """A DTensor of this process's part, shared out as `parameter` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def put(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be shared out."""
    if is_dtensor(target):
        local: Any = target.detach()
        local.to_local().copy_(own_part(value.to(local.dtype), local))
    else:
        flat.put(target, value)


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
    with gathered([module]):
        return type(module).forward(module, *args)  # past the hooks of tensor parallelism, for the weight is whole


# ---- adapters


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, the tensors in these modules are whole; gradients go to the parts of all processes."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in (module for holder in modules for module in holder.modules()):
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if is_dtensor(tensor):
                        replaced.append((held, name, tensor))
                        held[name] = whole(tensor)  # type: ignore[assignment]
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


def agree(tensors: Iterable[Tensor], model: nn.Module) -> None:
    """Gives new tensors the values of the first of the processes that share a model out; a call of all of them."""
    shared: list[Any] = [parameter for parameter in model.parameters() if is_dtensor(parameter)]
    meshes = [parameter.device_mesh for parameter in shared]
    if not meshes:
        return
    mesh = max(meshes, key=lambda mesh: mesh.ndim)
    for tensor in dict.fromkeys(tensors):
        if not tensor.is_meta and not is_dtensor(tensor):
            value = tensor.data.contiguous()
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                torch.distributed.broadcast(value, torch.distributed.get_global_rank(group, 0), group)
            tensor.data.copy_(value)


def average_gradients(model: nn.Module) -> None:
    """Lets a model average the gradients of what `fully_shard` does not hold, where it holds the rest of the model.

    It does so over the processes that have samples of their own. Parameters are looked for in each forward pass, as
    some may come later or be replaced.
    """
    held = [p for m in model.modules() if is_managed(m) for p in m._parameters.values() if is_dtensor(p)]
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


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with whole tensors of its own, without what stands around the original's forward pass."""
    if not any(is_dtensor(parameter) for parameter in module.parameters()):
        return flat.copy_of(module)
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(whole(parameter.detach()).clone(), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return _copied(module, memo)


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kinds = type(module).__mro__
    plain: Any = kinds[2] if len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" else kinds[0]
    made = plain.__new__(plain)
    nn.Module.__init__(made)
    around = (*made.__dict__, "forward", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_is_hooked")
    made.__dict__.update(copy.deepcopy({k: v for k, v in module.__dict__.items() if k not in around}, memo))
    made.training = module.training
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _copied(child, memo)
    made._parameters.update(copy.deepcopy(module._parameters, memo))
    made._buffers.update(copy.deepcopy(module._buffers, memo))
    made._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    return made
