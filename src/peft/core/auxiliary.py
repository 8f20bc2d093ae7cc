"""Modules that are trained in full beside the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft.core.call import calling, current_route
from peft.core.part import Part, as_names
from peft.core.routing import BASE, Route, join_rows, select_rows
from peft.core.slots import ModuleSlot
from peft.core.storage.shared import whole_copy
from peft.core.walk import parts_of
from peft.core.wrappers import AuxiliaryTrainingWrapper, get_submodules, layer_of, share_hooks, state_names
from peft.errors import warn


class ModulesToSaveWrapper(Part, AuxiliaryTrainingWrapper):
    """A module that each adapter trains in full: `modules_to_save[adapter]` beside `original_module`.

    Args:
        module_to_save: the module.
        adapter_name: the first adapter.
        tied_module: a module to share the copy's weight with (tied embeddings).
    """

    modules_to_save = ModuleSlot[Any]()
    holds = "original_module"

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None):
        super().__init__()
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()  # type: ignore[assignment]
        parts = [part for part in module_to_save.modules() if isinstance(part, Part)]
        others = {p for part in parts for name in part.adapter_names() for p in part.adapter_parameters(name)}
        for parameter in module_to_save.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in others)
        self.update(adapter_name, tied_module)

    def of_module(self, name: str) -> Any:
        return getattr(self.current_module(), name)

    @property
    def wrapped(self) -> nn.Module:
        return self.original_module

    def update(self, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        """Makes a copy of the original for another adapter."""
        copied = whole_copy(self.original_module)
        share_hooks(self.original_module, copied)
        copied = _without_adapters(copied).requires_grad_(False)
        if tied_module is not None:
            copied.weight = tied_module.weight
        self.modules_to_save[adapter_name] = copied

    def check_active(self, names: Sequence[str]) -> None:
        here = [name for name in names if self.has(name)]
        if len(here) > 1:
            raise ValueError(
                f"Only one adapter at a time can have its own version of a module; {', '.join(here)} all have one."
            )

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes the version of this adapter the one that runs; the original where the adapter has none here.

        Raises:
            ValueError: several of the adapters have a version of this module.
        """
        super().set_adapter([name for name in as_names(adapter_names) if self.has(name)], inference_mode)

    def version(self, name: str) -> nn.Module:
        """The module with what adapter `name` trained; the original if the adapter has nothing here."""
        return self.modules_to_save[name] if name != BASE and self.has(name) else self.original_module

    def current_module(self) -> nn.Module:
        """The module that the next forward pass runs."""
        return self.version(BASE if self._disable_adapters or not self._active else self._active[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = kwargs.pop("adapter_names", None) if kwargs else None
        route = current_route() if names is None else Route(names)
        if route is None or self._disable_adapters:
            return self.current_module()(*args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None:
            raise ValueError("adapter_names (a mixed batch) needs modules whose inputs are tensors, a row per sample.")
        rows, parts = first.shape[0], []
        for name, index in route.groups(rows, first.device):
            some_args, some_kwargs = select_rows(index, rows, args, kwargs)
            with calling(route=Route([name]), samples=route.samples[name]):
                parts.append((index, self.version(name)(*some_args, **some_kwargs)))
        return join_rows(parts, 0, rows)

    def is_beside(self, name: str) -> bool:
        return self.has(name)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in super().adapter_parameters(name) if parameter.is_floating_point()]

    def key_map(self, name: str) -> dict[str, str]:
        if not self.has(name):
            return {}
        return {leaf: f"modules_to_save.{name}.{leaf}" for leaf in state_names(self.modules_to_save[name])}

    def unload(self, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
        if not merge or not self._active:
            return self.original_module
        active = self._active[0]
        others = [name for name in adapter_names or () if name != active and self.has(name)]
        if others:
            warn(
                f"{', '.join(others)} trained a version of {type(self.original_module).__name__} too, but the active"
                f" adapter's ({active!r}) is the one that stays; call set_adapter first to have another."
            )
        return self.modules_to_save[active].requires_grad_(True)


def _without_adapters(module: nn.Module) -> Any:
    """The module of the base model that is left of one with parts of other adapters in it, or around it."""
    holder = nn.ModuleDict({"left": module})
    for path, part in reversed(parts_of(holder)):
        for name in part.merged_adapters:
            part.delete_adapter(name)  # takes it out of the weight
        place, _, child = path.rpartition(".")
        children, left = layer_of(holder.get_submodule(place))._modules, part.unload(merge=False)
        if left is None:
            del children[child]
        else:
            children[child] = left
    return holder["left"]


def save_modules(model: nn.Module, keys: Mapping[str, str], adapter_name: str, tied: Sequence[str] = ()) -> None:
    """Gives an adapter its own copy of modules of a model, to be trained in full; those in `tied` share a weight.

    `keys` are the names that they have without adapters -> those that they have now.
    """
    shared: nn.Module | None = None
    for key, live in keys.items():
        owner, module, name = get_submodules(model, live)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(adapter_name, shared if key in tied else None)
        else:
            wrapper = ModulesToSaveWrapper(module, adapter_name, shared if key in tied else None)
            module = wrapper.train(module.training)
            setattr(owner, name, module)
        if key in tied:
            shared = shared or module.modules_to_save[adapter_name]
