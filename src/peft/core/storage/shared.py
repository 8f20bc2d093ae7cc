"""Tensors of which each of several processes holds a part: one interface, and who shares them out behind it.

`sharded` knows those of `fully_shard` (FSDP2) and of tensor parallelism, `flat` the partitions of DeepSpeed ZeRO-3 and
the flat parameters of FSDP1. The functions here take any tensor or module, shared out or not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft.core.storage.base import Storage
from peft.core.wrappers import plain_name, unwrapped
from peft.ops.internals import sharded_of, window_of


class Shared(Storage):
    """A way to share tensors out. Reading gathers, so all processes read together; each writes its own part.

    What is not overridden is as for tensors that are not shared out.
    """

    #: whether a module has none of the whole's values, so that copies of it have to be made of the whole
    apart = False

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is shared out in this way."""
        raise NotImplementedError

    def shape(self, tensor: Any) -> torch.Size:
        """Of the whole."""
        return tensor.shape

    def part(self, tensor: Any) -> Tensor:
        """What this process holds of a tensor: the memory itself, without gradient."""
        return tensor.detach()

    def split(self, tensor: Any, value: Tensor) -> Tensor:
        """What this process holds of a whole value that is shared out as the tensor is."""
        return value

    def join(self, tensor: Any, part: Tensor) -> Tensor:
        """The whole of which the processes hold these parts, as they do of the tensor."""
        return part

    def whole(self, tensor: Any) -> Tensor:
        """All of a tensor."""
        return tensor

    def put(self, tensor: Any, value: Tensor) -> None:
        """Gives a tensor another whole value."""
        self.part(tensor).copy_(self.split(tensor, value.detach()))

    def scale(self, tensor: Any, factor: Tensor) -> None:
        """Multiplies a tensor, and what an optimizer keeps of it in a higher precision, by factors for the whole."""
        part, own = self.part(tensor), self.split(tensor, factor)
        part[: len(own)].mul_(own)  # the last process's may be padded

    def gradient(self, tensor: Any) -> Tensor | None:
        """The gradient of `tensor`, shared out as that is, or whole."""
        return tensor.grad

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """See the function of that name."""
        return nullcontext()

    def why_not_own(self, module: nn.Module) -> str | None:
        """Why a module that shares a weight with others cannot get one of its own; None if it can."""
        return "shared out among processes"

    # ---- as weights of modules

    def read(self, module: nn.Module, name: str) -> Tensor:
        return self.whole(self.held(module, name))

    def check_write(self, module: nn.Module, name: str) -> None:
        self.held(module, name)

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        why = self.why_not_own(module) if own else None
        if why:
            raise NotImplementedError(
                f"The {name} of this {type(module).__name__} is shared by several modules and {why}, so a merge cannot"
                " give this module one of its own. Merge into a model that is not sharded."
            )
        return self.held(module, name) if own else self.part(self.held(module, name)).clone()

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> None:
        self.check_write(module, name)
        held = self.held(module, name)
        if own:
            held = nn.Parameter(held.detach().clone(), held.requires_grad)
            setattr(module, name, held)
        self.put(held, value)

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        if isinstance(before, nn.Parameter):
            setattr(module, name, before)
        else:
            self.part(self.held(module, name)).copy_(before)

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        if isinstance(before, nn.Parameter):
            return self.whole(before.detach())
        return self.join(self.held(module, name), before)

    def nbytes(self, before: Any) -> int:
        return super().nbytes(self.part(before) if isinstance(before, nn.Parameter) else before)


#: filled by `peft.core.storage`; the first that holds a tensor is asked
KINDS: list[Shared] = []
#: of tensors that none of them holds
ALONE = Shared()


def is_one_of_many() -> bool:
    """Whether this process is one of several: else nothing is shared out, and nobody has to walk through a model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def kind_of(tensor: Any) -> Shared:
    """How a tensor is shared out; `ALONE` if it is not."""
    return next((kind for kind in KINDS if kind.holds(tensor)), ALONE)


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a tensor when it is whole."""
    return kind_of(tensor).shape(tensor)


def shaped(tensor: Tensor) -> Tensor:
    """A tensor of the whole's shape; of one that is shared out, one without values."""
    kind = kind_of(tensor)
    return tensor if kind is ALONE else torch.empty(kind.shape(tensor), dtype=tensor.dtype, device="meta")


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its share-out: gathered from all processes that share it, which all call this."""
    return kind_of(tensor).whole(tensor)


def put(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor that may be shared out; without gradient."""
    kind_of(tensor).put(tensor, value)


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the memory itself, without gradient."""
    return kind_of(tensor).part(tensor)


def with_gradient(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """A parameter and its gradient after a backward pass, each shared out as a DTensor or whole."""
    kind = kind_of(parameter)
    gradient = kind.gradient(parameter)
    return (parameter if isinstance(gradient, type(parameter)) else kind.whole(parameter)), gradient


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, the tensors in these modules are whole; gradients go to the parts of all processes."""
    modules = list(modules) if is_one_of_many() else []
    with ExitStack() as stack:
        for kind in KINDS if modules else ():
            stack.enter_context(kind.gathered(modules))
        yield


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with whole tensors of its own, without what stands around the original's forward pass."""
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    values = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if kind_of(parameter).apart and parameter not in wholes:
            wholes[parameter] = nn.Parameter(whole(parameter).detach(), parameter.requires_grad)
        if parameter in wholes:
            values[plain_name(name)] = wholes[parameter]
    hooks: list[Any] = [vars(inner).get("_hf_hook") for inner in module.modules()]
    hooks = [hook for hook in hooks if getattr(hook, "offload", False)]
    kept = {id(held): held for hook in hooks for held in (hook.weights_map, hook.tied_params_map)}
    copied = copy.deepcopy(rebuilt(module, values) if values else module, kept)
    for inner in copied.modules() if hooks else ():
        _bring_in(inner)
    return copied


def _bring_in(module: Any) -> None:
    """Brings the tensors of a copied module that accelerate has offloaded to where it runs, as tensors of its own."""
    hook: Any = vars(module).get("_hf_hook")
    if getattr(hook, "offload", False):
        hook.pre_forward(module)
        hook.offload = False
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


#: what those who share a model out leave on its modules
_AROUND = ("forward", "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_is_hooked", "ds_id")


def rebuilt(module: nn.Module, values: Mapping[str, Any], prefix: str = "", all_children: bool = True) -> Any:
    """A module like this one with these tensors, by their names in it, and nothing around its forward pass.

    Without `all_children`, those of its modules in which nothing is replaced are the very same.
    """
    module = unwrapped(module)
    kinds = type(module).__mro__
    plain: Any = kinds[2] if len(kinds) > 2 and kinds[1].__name__ == "FSDPModule" else kinds[0]
    made = plain.__new__(plain)
    nn.Module.__init__(made)
    mine = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    left = {*made.__dict__, *mine, *_AROUND}
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k not in left})
    if "_flat_weights" in made.__dict__:  # of an LSTM, which keeps it up to date
        made._flat_weights = list(made._flat_weights)
    made.training = module.training
    made._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    made._buffers.update({name: mine.pop(name, buffer) for name, buffer in module._buffers.items()})
    others = {name: held for name, held in module._parameters.items() if name not in mine and name != "_flat_param"}
    made._parameters.update(others)
    for name, value in mine.items():
        if "." not in name:
            setattr(made, name, value)
    for name, child in module._modules.items():
        inside = f"{prefix}{name}."
        if child is not None and (all_children or any(each.startswith(inside) for each in values)):
            child = rebuilt(child, values, inside, all_children)
        made._modules[name] = child
    return made


# ---- in forward passes


def scale_in_forward(parameter: Any, factor: Tensor) -> None:
    """Multiplies a trained parameter in the middle of a forward pass, as a limit on its size does.

    Where the pass has it in a lower precision, its values in full precision are not replaced by those. What is kept for
    the next pass is changed too: `fully_shard` and FSDP1 put away what they have gathered for this one.
    """
    factor = factor.expand(shape_of(parameter))
    window = window_of(parameter)
    if window is not None:
        kept, place = window
        parameter.data.mul_(factor)  # not seen by autograd: for it, all that lies in the flat parameter would change
        kept.mul_(factor.flatten()[place].to(kept.device))
        if parameter.device.type != "cpu":  # FSDP1 may gather it again, on a stream that does not wait for this one
            torch.get_device_module(parameter.device).current_stream().synchronize()
        return
    shards = sharded_of(parameter)
    for tensor in (parameter,) if shards is None else (parameter, shards):
        kind_of(tensor).scale(tensor, factor)


def run_with(module: Any, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A module's output with other tensors, by their names in it, in place of parameters; those are `onloaded`."""
    # What DeepSpeed, fully_shard or accelerate has put around the module wants its own parameters.
    held = hasattr(module, "ds_id") or hasattr(module, "_get_fsdp_state")
    held = held or getattr(vars(module).get("_hf_hook"), "offload", False)
    for path in () if held else tensors:  # FSDP1 has attributes in their place in a forward pass
        owner, _, name = path.rpartition(".")
        held = held or name in vars(module.get_submodule(owner))
    if held:
        return rebuilt(module, tensors, all_children=False).forward(*args, **kwargs)
    return functional_call(module, dict(tensors), tuple(args), dict(kwargs))
