"""Weights that lie in flat tensors which processes share out: FSDP1's flat parameters, DeepSpeed ZeRO-3's partitions.

ZeRO-3 leaves a parameter without values, with this process's part of it in `ds_tensor`: reading gathers, so all
processes read together; writing puts each process's own part in. While an engine runs its model, DeepSpeed gathers what
a module gets from another's parameters by itself, and again in the backward pass.

FSDP1's parameters are windows on a flat one. They are whole in the forward pass of the unit that they belong to, and in
`FullyShardedDataParallel.summon_full_params`; there they are written in place.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft.core.storage.base import Storage

#: what to do about a tensor that FSDP1 has cut up
SUMMON = (
    "call this on all processes inside `with FullyShardedDataParallel.summon_full_params(model, writeback=True):`, with"
    " the wrapped model"
)


# ---- ZeRO-3


def is_apart(tensor: Any) -> bool:
    """Whether ZeRO-3 has a parameter's values shared out among processes at present."""
    return hasattr(tensor, "ds_id") and tensor.ds_status.name != "AVAILABLE"


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a parameter when it is whole."""
    return getattr(tensor, "ds_shape", tensor.shape)


def shaped(tensor: Tensor) -> Tensor:
    """A tensor of the whole's shape; of a parameter that is shared out, one without values."""
    return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta") if is_apart(tensor) else tensor


@contextmanager
def together(parameters: Iterable[Any], write: bool = False) -> Iterator[None]:
    """While it lasts, parameters that ZeRO-3 has shared out are whole. A call of all processes.

    Args:
        parameters: the parameters; others may be among them.
        write: whether changes made meanwhile are kept: those that the first process makes.
    """
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    if not apart:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(apart, modifier_rank=0 if write else None):
        yield


def bring_together(module: nn.Module, parameters: Iterable[Any]) -> None:
    """Has DeepSpeed gather parameters that a module reads of others, in its forward and its backward pass."""
    apart = [parameter for parameter in parameters if is_apart(parameter)]
    for parameter in apart:
        sys.modules["deepspeed"].zero.register_external_parameter(module, parameter)
    if apart:
        apart[0].all_gather(apart)


def copy_of(module: nn.Module) -> nn.Module:
    """A copy of a module with whole tensors of its own. A call of all processes where ZeRO-3 has shared some out."""
    with together(module.parameters()):
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            for parameter in module.parameters()
            if hasattr(parameter, "ds_id")
        }
        return copy.deepcopy(module, memo)


def run_with(module: Any, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A module's output with other tensors, by their names in it, in place of parameters."""
    owners = [module.get_submodule(name.rpartition(".")[0]) for name in tensors]
    names = [name.rpartition(".")[2] for name in tensors]
    # What DeepSpeed or fully_shard has put around the module wants its own parameters.
    if hasattr(module, "ds_id") or hasattr(module, "_get_fsdp_state"):
        return _twin(module, tensors).forward(*args, **kwargs)
    if any(name in vars(owner) for owner, name in zip(owners, names, strict=True)):  # as FSDP1 has it in a forward pass
        return _twin(module, tensors)(*args, **kwargs)
    return functional_call(module, dict(tensors), tuple(args), dict(kwargs))


def _twin(module: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The module once more, with the same contents but for these tensors."""
    twin = object.__new__(type(module))
    own: dict[str, Any] = dict(module.__dict__)
    own["_parameters"] = {name: module._parameters[name] for name in module._parameters}
    own["_modules"] = dict(module._modules)
    inside: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            inside.setdefault(child, {})[rest] = tensor
        else:
            own.pop(name, None)
            own["_parameters"][name] = tensor
    own["_modules"] |= {child: _twin(module._modules[child], within) for child, within in inside.items()}
    twin.__dict__.update(own)
    return twin


class Partitioned(Storage):
    """ZeRO-3's parameters."""

    def read(self, module: nn.Module, name: str) -> Tensor:
        parameter = getattr(module, name)
        if not is_apart(parameter):
            return parameter
        with together([parameter]):
            return parameter.detach().clone()

    def check_write(self, module: nn.Module, name: str) -> None:
        part = getattr(module, name).ds_tensor
        plain = part.status.name == "AVAILABLE" and part.is_floating_point() and not hasattr(part, "ds_quant_scale")
        if not plain or getattr(module, name).ds_secondary_tensor is not None:
            raise NotImplementedError(
                f"The {name} of this {type(module).__name__} is in a form that only DeepSpeed can write (on a disk, in"
                " few bits, or a second time for ZeRO++), so nothing can be merged into it. Merge into a model that is"
                " not sharded."
            )

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        _refuse_own(module, name, own)
        return getattr(module, name).ds_tensor.detach().clone()

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> Any:
        self.check_write(module, name)
        before, parameter = self.keep(module, name, own), getattr(module, name)
        put(parameter, value)
        return before

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        parameter = getattr(module, name)
        parameter.ds_tensor.detach().copy_(before)
        if not is_apart(parameter):
            parameter.data.copy_(self.original(module, name, before))

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        parameter = getattr(module, name)
        parts = before.new_empty(before.numel() * parameter.ds_zero_partition_world_size, device=parameter.device)
        torch.distributed.all_gather_into_tensor(parts, before.to(parameter.device), group=parameter.ds_process_group)
        return parts[: parameter.ds_numel].view(parameter.ds_shape)


def put(parameter: Any, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, of which ZeRO-3 may have taken a part of its own."""
    if hasattr(parameter, "ds_id"):
        part, flat = parameter.ds_tensor.detach(), value.detach().reshape(-1)
        own = flat[parameter.ds_zero_partition_rank * part.numel() :][: part.numel()]
        part[: own.numel()].copy_(own)
        if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):  # it has a copy of what it trains
            sys.modules["deepspeed"].utils.safe_set_local_fp32_param(parameter, part)
    if not is_apart(parameter):
        parameter.copy_(value)


def put_in_forward(parameter: Any, value: Tensor) -> None:
    """Gives a trained parameter another value in the middle of a forward pass, as a limit on its size does.

    Raises:
        NotImplementedError: FSDP1 has it in its flat parameter, where nobody else writes meanwhile.
    """
    if not isinstance(parameter, nn.Parameter) and parameter._is_view():
        raise NotImplementedError(
            "This method limits the size of its tensors in each forward pass, which FullyShardedDataParallel does not"
            " allow. Use DDP, DeepSpeed or fully_shard, or train without the limit."
        )
    put(parameter, value)


# ---- FSDP1


class Window(Storage):
    """Parameters that are a part of a larger tensor, and so are written in place."""

    def read(self, module: nn.Module, name: str) -> Tensor:
        check_whole(module, name)
        return getattr(module, name)

    def check_write(self, module: nn.Module, name: str) -> None:
        check_whole(module, name)

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        check_whole(module, name)
        _refuse_own(module, name, own)
        return getattr(module, name).detach().clone()

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> Any:
        before = self.keep(module, name, own)
        getattr(module, name).data.copy_(value)
        return before

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        check_whole(module, name)
        getattr(module, name).data.copy_(before)


def is_window(parameter: Tensor) -> bool:
    """Whether a parameter may be part of a larger tensor, so that replacing its data would be lost on that."""
    if hasattr(parameter, "_fsdp_flattened"):
        return True
    if torch.compiler.is_compiling():  # nothing is written then, and a graph cannot ask for what follows
        return False
    # Where FSDP1 makes its parameters anew, they bear no mark; one alone is as large as the flat parameter.
    fsdp = "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized()
    return not parameter.is_meta and (fsdp or parameter.untyped_storage().nbytes() != parameter.nbytes)


def is_cut_up(model: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of one of these tensors of a model that FSDP1 has cut up; None where it has not.

    What it cuts it flattens, so a tensor of one dimension does not tell, but those of the whole model together do.
    """
    flattened = [name for name, tensor in tensors.items() if hasattr(tensor, "_fsdp_flattened") or _is_freed(tensor)]
    if not flattened or any(_is_freed(tensors[name]) for name in flattened):
        return flattened[0] if flattened else None
    whole = any(hasattr(parameter, "_fsdp_flattened") and parameter.dim() > 1 for parameter in model.parameters())
    return None if whole else flattened[0]


def check_whole(module: nn.Module, name: str) -> None:
    """Raises RuntimeError where FSDP1 has cut up a parameter of a module."""
    tensor = getattr(module, name, None)
    if isinstance(tensor, Tensor) and _is_cut(module, tensor):
        raise RuntimeError(
            f"The {name} of this {type(module).__name__} is shared out among processes by FullyShardedDataParallel:"
            f" {SUMMON}."
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


def weight_of(module: Any) -> Tensor:
    """The weight of a module of an adapter that FSDP1 may have made a unit of its own: whole, with gradients.

    A unit is whole in its own forward pass, so that is what takes place here.
    """
    unit = module if "_fsdp_wrapped_module" in module._modules else None
    if unit is None or not getattr(unit, "_has_params", False) or _is_summoned(unit):
        return module.weight
    if unit._is_root is not False:
        raise RuntimeError(f"FullyShardedDataParallel has not run yet, or with this module alone: {SUMMON}.")
    inner = unit._fsdp_wrapped_module
    inner.__dict__["forward"] = lambda: inner.weight.clone()
    try:
        return unit()
    finally:
        del inner.__dict__["forward"]


def _is_summoned(unit: Any) -> bool:
    return unit._handle._training_state.name == "SUMMON_FULL_PARAMS"


def _is_freed(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


# ---- both


def _refuse_own(module: nn.Module, name: str, own: bool) -> None:
    if own:
        raise NotImplementedError(
            f"The {name} of this {type(module).__name__} is shared by several modules and shared out among processes,"
            " so a merge cannot give this module one of its own. Merge into a model that is not sharded."
        )


def storage_for(parameter: Tensor) -> Storage | None:
    """How a parameter is held that looks like any other; None if it is."""
    if hasattr(parameter, "ds_id"):
        return _PARTITIONED
    return _WINDOW if is_window(parameter) else None


_PARTITIONED, _WINDOW = Partitioned(), Window()
