"""Modules around those of a model: FSDP's, activation checkpointing's, torch.compile's; and those that hold our own.

The former have no part in the names that tensors have in files.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

#: where such a module keeps what it is around
_INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

#: where a module has its hooks, and what it notes about them
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "_hooks" in name and value is not None)


class AuxiliaryTrainingWrapper:
    """What holds a module in full, or rows of one, that adapters train beside their changes of others."""


class TrainableTokensWrapper(nn.Module, AuxiliaryTrainingWrapper):
    """What holds a layer of rows that are trained beside other changes, as `token_adapter`; no more than that name.

    So parameters are called as in huggingface/peft. What it lacks is what the layer has.
    """

    holds = "token_adapter"

    def __init__(self, token_adapter: nn.Module):
        super().__init__()
        self.token_adapter = token_adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.token_adapter, "base_layer" if name == "original_module" else name)

    @property
    def wrapped(self) -> nn.Module:
        """The layer."""
        return self.token_adapter

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names of an adapter's tensors below this module: as files have them -> as the live module has them."""
        layer: Any = self.token_adapter
        return {key: f"token_adapter.{live}" for key, live in layer.key_map(adapter_name).items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)


def unwrapped(module: nn.Module) -> Any:
    """The module that others are around; itself where there are none."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def held(module: Any) -> Any:
    """What of the base model, with adapter layers around it, stands in the place of a module that holds it."""
    while name := getattr(type(module), "holds", ""):
        module = module._modules[name]
    return module


def layer_of(module: Any) -> Any:
    """The module that others are around, trained rows as the layer that has them."""
    module = unwrapped(module)
    return module.token_adapter if isinstance(module, TrainableTokensWrapper) else module


def _inside(module: nn.Module) -> nn.Module | None:
    modules = module._modules
    for name in _INSIDE:
        if name in modules:
            return modules[name]
    return None


def share_hooks(module: nn.Module, copied: nn.Module) -> None:
    """Lets a copy of a module act with the hooks of that, as long as these are there."""
    own = dict(module.named_modules())
    for name, twin in copied.named_modules():
        hooks = {kind for kind in _HOOKS if "state_dict" not in kind}  # those know which module they are of
        if any(vars(twin)[kind] for kind in hooks):
            vars(twin).update({kind: vars(own[name])[kind] for kind in hooks})


class _FormerHook:
    """A hook of a module that another has taken the place of, there until somebody removes it."""

    def __init__(self, hooks: Mapping[str, Any], kind: str, key: int):
        self.hooks, self.kind, self.key = hooks, kind, key

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.hooks[self.kind].get(self.key)
        return None if hook is None else hook(*args, **kwargs)


def hand_over_hooks(module: nn.Module, to: nn.Module) -> None:
    """Lets the hooks of a module act on the one that takes its place; who can remove them still can."""
    hooks, after = {kind: vars(module)[kind] for kind in _HOOKS}, vars(to)
    for hook in hooks["_load_state_dict_pre_hooks"].values():
        if hook.with_module:
            hook.module = weakref.ref(to)
    if hooks["_backward_hooks"]:
        after["_is_full_backward_hook"] = module._is_full_backward_hook
    if not any(after[kind] for kind in _HOOKS):
        after.update(hooks)
        return
    for kind, there in hooks.items():
        after[kind].update({k: hook if hook is True else _FormerHook(hooks, kind, k) for k, hook in there.items()})


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, Any, str]:
    """(parent, module, its name in the parent) of the module called `key`."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def plain_name(name: str) -> str:
    """The name of a module or tensor without the modules that are around others."""
    if not any(part in name for part in _INSIDE):
        return name
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def state_names(module: nn.Module) -> list[str]:
    """The keys of `module.state_dict()`, without making one: that of FSDP is a call of all processes."""
    return list(_state_names(module, ""))


def _state_names(module: nn.Module, prefix: str) -> Iterator[str]:
    module = unwrapped(module)
    own = [name for name, value in module._parameters.items() if value is not None and name != "_flat_param"]
    # FSDP, around this module or further out, may have made attributes of what were parameters.
    flattened = [name for name, value in vars(module).items() if hasattr(getattr(value, "_base", None), "_param_infos")]
    for name in dict.fromkeys((*own, *flattened)):
        yield prefix + name
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name
    for name, child in module._modules.items():
        if child is not None:
            yield from _state_names(child, f"{prefix}{name}.")
