"""Weights that lie in flat tensors which processes share out: FSDP1's flat parameters, DeepSpeed ZeRO-3's partitions.

ZeRO-3 leaves a parameter without values, with this process's part of it in `ds_tensor`. While an engine runs its model,
DeepSpeed gathers what a module gets from another's parameters by itself, and again in the backward pass.

FSDP1's parameters are windows on a flat one. They are whole in the forward pass of the unit that they belong to, and in
`FullyShardedDataParallel.summon_full_params`; there they are written in place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage.base import widened
from peft.core.storage.shared import Shared

#: what to do about a tensor that FSDP1 has cut up
SUMMON = (
    "call this on all processes inside `with FullyShardedDataParallel.summon_full_params(model, writeback=True):`, with"
    " the wrapped model"
)


# ---- DeepSpeed


def is_apart(tensor: Any) -> bool:
    """Whether ZeRO-3 has a parameter's values shared out among processes at present."""
    return hasattr(tensor, "ds_id") and tensor.ds_status.name != "AVAILABLE"


@contextmanager
def together(parameters: Iterable[Any]) -> Iterator[None]:
    """While it lasts, parameters that ZeRO-3 has shared out are whole, to be read. A call of all processes."""
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    if not apart:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(apart):
        yield


def bring_together(module: nn.Module, parameters: Iterable[Any]) -> None:
    """Has DeepSpeed gather parameters that a module reads of others, in its forward and its backward pass."""
    if "ds_id" not in module.__dict__:
        return
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    if apart:
        # A layer around this one may run it without the hooks that gather for the backward pass.
        called = getattr(sys.modules["deepspeed.runtime.zero.parameter_offload"], "FWD_MODULE_STACK", None) or [module]
        for parameter in apart:
            sys.modules["deepspeed"].zero.register_external_parameter(called[-1], parameter)
        apart[0].all_gather(apart)


def feed_leaves(model: nn.Module) -> None:
    """Lets what ZeRO-3 gathers as one (its "leaves", blocks of experts) have inputs that take a gradient.

    With that of an input DeepSpeed takes those of the parameters inside. Where nothing is trained before the first such
    block, there is none, and it would not wait for them.
    """
    if "ds_id" in model.__dict__ and "_feeds_leaves" not in model.__dict__:
        model.__dict__["_feeds_leaves"] = True
        for module in model.modules():
            if getattr(module, "_z3_leaf", False):
                module.register_forward_pre_hook(_feed, prepend=True)


def _feed(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    floating = [isinstance(x, Tensor) and x.is_floating_point() for x in args]
    if not torch.is_grad_enabled() or any(is_one and x.requires_grad for is_one, x in zip(floating, args, strict=True)):
        return None
    return tuple(x.detach().requires_grad_() if is_one else x for is_one, x in zip(floating, args, strict=True))


class Mastered(Shared):
    """Parameters that are whole, and of which a ZeRO-1 or ZeRO-2 engine trains a copy, a part on each process."""

    def holds(self, tensor: Any) -> bool:
        return getattr(tensor, "_hp_mapping", None) is not None

    def put(self, tensor: Any, value: Tensor) -> None:
        super().put(tensor, value)
        sys.modules["deepspeed"].utils.safe_set_full_fp32_param(tensor, value.detach())

    def scale(self, tensor: Any, factor: Tensor) -> None:
        super().scale(tensor, factor)
        here = tensor._hp_mapping.lp_fragment_address
        tensor._hp_mapping.get_hp_fragment().mul_(factor.flatten()[here.start :][: here.numel])

    def gradient(self, tensor: Any) -> Tensor | None:
        return sys.modules["deepspeed"].utils.safe_get_full_grad(tensor)


class Partitioned(Mastered):
    """ZeRO-3's parameters."""

    apart = True

    def holds(self, tensor: Any) -> bool:
        return hasattr(tensor, "ds_id")

    def shape(self, tensor: Any) -> torch.Size:
        return tensor.ds_shape

    def part(self, tensor: Any) -> Tensor:
        return tensor.ds_tensor.detach()

    def split(self, tensor: Any, value: Tensor) -> Tensor:
        size = tensor.ds_tensor.numel()
        return value.reshape(-1)[tensor.ds_zero_partition_rank * size :][:size]

    def join(self, tensor: Any, part: Tensor) -> Tensor:
        parts = part.new_empty(part.numel() * tensor.ds_zero_partition_world_size, device=tensor.device)
        torch.distributed.all_gather_into_tensor(parts, part.to(tensor.device), group=tensor.ds_process_group)
        return parts[: tensor.ds_numel].view(tensor.ds_shape)

    def whole(self, tensor: Any) -> Tensor:
        if not is_apart(tensor):
            return tensor
        with together([tensor]):
            return tensor.detach().clone()

    def put(self, tensor: Any, value: Tensor) -> None:
        part, own = self.part(tensor), self.split(tensor, value.detach())
        part[: own.numel()].copy_(own)  # the last process's may be padded
        if tensor.requires_grad and hasattr(tensor, "_z3_optimizer"):  # it has a copy of what it trains
            sys.modules["deepspeed"].utils.safe_set_local_fp32_param(tensor, part)
        if not is_apart(tensor):
            tensor.data.copy_(value)

    def scale(self, tensor: Any, factor: Tensor) -> None:
        Shared.scale(self, tensor, factor)
        if tensor.requires_grad and hasattr(tensor, "_z3_optimizer"):
            own, kept = self.split(tensor, factor), sys.modules["deepspeed"].utils.safe_get_local_fp32_param(tensor)
            kept[: own.numel()].mul_(own)
            sys.modules["deepspeed"].utils.safe_set_local_fp32_param(tensor, kept)
        if not is_apart(tensor):
            tensor.data.mul_(factor)

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        return together(parameter for module in modules for parameter in module.parameters())

    def check_write(self, module: nn.Module, name: str) -> None:
        part = getattr(module, name).ds_tensor
        plain = part.status.name == "AVAILABLE" and part.is_floating_point() and not hasattr(part, "ds_quant_scale")
        if not plain or getattr(module, name).ds_secondary_tensor is not None:
            raise NotImplementedError(
                f"The {name} of this {type(module).__name__} is in a form that only DeepSpeed can write (on a disk, in"
                " few bits, or a second time for ZeRO++), so nothing can be merged into it. Merge into a model that is"
                " not sharded."
            )

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        super().restore(module, name, before)
        parameter = getattr(module, name)
        if not is_apart(parameter):
            parameter.data.copy_(self.join(parameter, before))


# ---- FSDP1


class Window(Shared):
    """Parameters that are a part of a larger tensor, and so are written in place."""

    def holds(self, tensor: Any) -> bool:
        """Whether it may be part of a larger tensor, so that replacing its data would be lost on that."""
        if type(tensor) is not nn.Parameter or tensor.is_meta:
            return False
        if hasattr(tensor, "_fsdp_flattened"):
            return True
        if torch.compiler.is_compiling():  # nothing is written then, and a graph cannot ask for what follows
            return False
        # Where FSDP1 makes its parameters anew, they bear no mark; one alone is as large as the flat parameter.
        fsdp = "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()
        return fsdp or tensor.untyped_storage().nbytes() != tensor.nbytes

    def held(self, module: nn.Module, name: str) -> Tensor:
        check_whole(module, name)
        return getattr(module, name)


def check_uncut(model: nn.Module, tensors: Mapping[str, Any], instead: str = "") -> None:
    """Raises RuntimeError where FSDP1 has cut up some of these tensors of a model.

    What it cuts it flattens, so a tensor of one dimension does not tell, but those of the whole model together do.

    Args:
        model: the model.
        tensors: by what they are called in the message; what is no tensor is passed over.
        instead: what else can be done than to put them together.
    """
    held = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    freed = [name for name, tensor in held.items() if _is_freed(tensor)]
    cut = freed or [name for name, tensor in held.items() if hasattr(tensor, "_fsdp_flattened")]
    marked = (parameter for parameter in model.parameters() if hasattr(parameter, "_fsdp_flattened"))
    if freed or (cut and not any(parameter.dim() > 1 for parameter in marked)):
        _raise_cut(cut[0], instead)


def check_whole(module: nn.Module, name: str) -> None:
    """Raises RuntimeError where FSDP1 has cut up a parameter of a module."""
    tensor = getattr(module, name, None)
    if isinstance(tensor, Tensor) and _is_cut(module, tensor):
        _raise_cut(f"{name} of a {type(module).__name__}")


def _raise_cut(what: str, instead: str = "") -> None:
    raise RuntimeError(
        f"The {what} is shared out among processes by FullyShardedDataParallel, which leaves this one a part:"
        f" {instead}{SUMMON}."
    )


def _is_cut(module: nn.Module, tensor: Tensor) -> bool:
    if _is_freed(tensor):
        return True
    if not hasattr(tensor, "_fsdp_flattened") or tensor.dim() > 1:
        return False
    # What is cut is flattened. A bias is so anyway, and lies where the weight does.
    weight = getattr(module, "weight", None)
    matrix = any(hasattr(module, name) for name in ("in_features", "embedding_dim", "kernel_size", "nf"))
    return matrix and isinstance(weight, Tensor) and weight.dim() == 1


def _is_freed(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def weight_of(module: Any) -> Tensor:
    """The weight of a module of an adapter that FSDP1 may have made a unit of its own: whole, with gradients."""
    if not _is_unit(module) or module._handle._training_state.name == "SUMMON_FULL_PARAMS":
        return widened(module.weight)
    if module._is_root is not False:
        raise RuntimeError(f"FullyShardedDataParallel has not run yet, or with this module alone: {SUMMON}.")
    return _in_forward(module, lambda: module.weight.clone())


def read_in_units(model: nn.Module, layers: Iterable[nn.Module], read: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    """What `read` finds in layers of a model in the middle of its forward pass, whole, with gradients."""
    wanted = {*layers}
    held: dict[Any, list[nn.Module]] = {}  # no dict[...](), which torch.compile cannot trace
    waiting: list[tuple[nn.Module, Any]] = [(model, None)]
    while waiting:
        module, unit = waiting.pop()
        unit = module if _is_unit(module) else unit
        if module in wanted:
            held.setdefault(unit, []).append(module)
        waiting += [(child, unit) for child in module._modules.values() if child is not None]
    found = [tensor for layer in held.pop(None, ()) for tensor in read(layer)]
    for unit, inside in held.items():
        found += _in_forward(unit, partial(_copies, inside, read))
    return found


def _copies(layers: Iterable[nn.Module], read: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    return [tensor.clone() for layer in layers for tensor in read(layer)]


def _is_unit(module: Any) -> bool:
    return "_fsdp_wrapped_module" in module._modules and getattr(module, "_has_params", False)


def _in_forward(unit: Any, compute: Callable[[], Any]) -> Any:
    """What is computed while a unit is whole: in its own forward pass, so that is what takes place here."""
    inner = unit._fsdp_wrapped_module
    inner.__dict__["forward"] = compute
    try:
        return unit()
    finally:
        del inner.__dict__["forward"]
