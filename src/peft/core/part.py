"""A place in a model where adapters are: what each of them has there, and which of them act."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peft.core.routing import BASE
from peft.core.slots import Setting, Slot, stored_names
from peft.core.storage.shared import gathered

#: dtypes that adapters are not trained in
UPCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def tensors_in(containers: Iterable[Any], name: str) -> list[Tensor]:
    """All that adapter `name` has in these containers of slots."""
    found: list[Tensor] = []
    for entry in (entries[name] for entries in containers if name in entries):
        found += _tensors_of(entry) if isinstance(entry, nn.Module) else (entry,)
    return found


def keep_values(before: Iterable[Tensor], now: Iterable[Tensor]) -> None:
    """Gives tensors the values of those that they take the place of, where these have any."""
    for old, new in zip(before, now, strict=True):
        new.data = new.data.to(old.dtype) if old.is_meta else old.data
        new.requires_grad_(old.requires_grad)


class Part(nn.Module):
    """A module of the model with something of each adapter on it, or in place of it.

    What adapter `name` has here is `getattr(self, slot)[name]` for each slot. All parts of a model take part in the
    same states: adapters are active, switched off, trained, routed, merged.
    """

    #: the tensors that adapters have here, by the name of their container; collected from the attributes of the class
    slots: ClassVar[Mapping[str, Slot]] = {}
    #: those that are not shared by several parts
    own_slots: tuple[str, ...] = ()
    #: those that hold what is trained, for code that looks for it
    adapter_layer_names: tuple[str, ...] = ()
    #: slots of modules that FSDP may make units of: they are called, or read by `storage.flat.weight_of`
    unit_slots: ClassVar[frozenset[str]] = frozenset()
    #: the settings that adapters have here
    other_param_names: tuple[str, ...] = ()

    #: adapter -> its configuration and settings
    configs: dict[str, Any]
    #: setting -> adapter -> value
    settings: dict[str, dict[str, Any]]
    #: shared slot -> the group of layers that it shares the slot's tensor with, where there are groups
    groups = Setting[dict[str, str]]()

    #: shared slots that are left to the model around
    _left: tuple[str, ...] = ()
    _active: list[str]
    #: the adapters that were made trainable last
    _trained: frozenset[str]
    _disable_adapters: bool
    _trained_before_disable: list[nn.Parameter]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = (vars(kind).items() for kind in reversed(cls.__mro__))
        names = dict.fromkeys(name for items in declared for name, value in items if isinstance(value, Slot))
        found = {name: getattr(cls, name) for name in names}
        cls.slots = {name: slot for name, slot in found.items() if isinstance(slot, Slot)}
        cls.own_slots = tuple(name for name, slot in cls.slots.items() if not slot.shared)
        cls.adapter_layer_names = tuple(name for name, slot in cls.slots.items() if slot.trained)
        settings = (name for kind in cls.__mro__ for name, value in vars(kind).items() if isinstance(value, Setting))
        cls.other_param_names = tuple(dict.fromkeys(settings))

    def __init__(self) -> None:
        super().__init__()
        # Straight into __dict__, here and in what derives from it: a large model has tens of thousands of parts, and
        # assigning to a module is slow.
        self.__dict__.update(
            configs={}, settings={name: {} for name in self.other_param_names}, _active=[], _trained=frozenset(),
            _disable_adapters=False, _trained_before_disable=[],
        )  # fmt: skip

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What a part lacks is what its module has, for modules around it: weights as adapted, sizes, methods.

            Not so what hooks leave on a module: private things that are neither of its class nor plain values.
            """
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("__") or not self.__dict__.get("_modules"):
                    raise
                value = self.of_module(name)
                is_own = isinstance(value, (int, float, str)) or hasattr(type(self.wrapped), name)
                if name.startswith("_") and not is_own:
                    raise
                return value

    def of_module(self, name: str) -> Any:
        """An attribute of the module that this one is in place of, as it is in effect; AttributeError without one."""
        raise AttributeError(name)

    @property
    def wrapped(self) -> nn.Module:
        """The module of the model that this one is in place of."""
        raise NotImplementedError

    def unload(self, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module | None:
        """The module to leave in the model: with what the adapters trained in its place if `merge`, else as it was.

        None where there was none in this place.
        """
        return self.wrapped

    # ---- what adapters have here

    def containers(self) -> list[Any]:
        """What holds the tensors of the adapters by name, one container per slot."""
        modules = self._modules  # past `__getattr__`, which takes longer than all the rest of most callers
        return [modules[slot] for slot in self.own_slots]

    def all_containers(self) -> list[Any]:
        """The same with those that several parts share."""
        modules = self._modules
        return [modules[slot] for slot in self.slots if slot in modules]

    def adapter_names(self) -> list[str]:
        """The adapters that are here, in the order they came."""
        return list(dict.fromkeys(name for entries in self.containers() for name in entries))

    def has(self, name: str) -> bool:
        """Whether adapter `name` has something here."""
        for entries in self.containers():  # noqa: SIM110 - asked of every layer in every change of state
            if name in entries:
                return True
        return False

    def is_beside(self, name: str) -> bool:
        """Whether adapter `name` trains something here beside its changes: a module in full, or rows of one."""
        return False

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters that adapter `name` has here."""
        parameters: list[nn.Parameter] = []
        modules: Any = self._modules
        for slot, kind in self.slots.items():
            entries = modules.get(slot) if kind.trained else None
            if entries is None:
                continue
            entry = entries._modules.get(name)  # looked for here first: asked of every layer in every change of state
            if entry is not None:
                parameters += self._own_group(slot, name) if kind.shared else _parameters_of(entry)
            elif name in entries and isinstance(entries[name], nn.Parameter):
                parameters.append(entries[name])
        return parameters

    def shared_tensor(self, slot: str, name: str) -> Tensor:
        """What adapter `name` has in a shared slot: the one of all layers, or of the group that this layer is in."""
        held = self._modules[slot][name]  # type: ignore[index]
        return held if isinstance(held, Tensor) else held[self.groups[name][slot]]

    def _own_group(self, slot: str, name: str) -> list[nn.Parameter]:
        """The parameter of the group that this layer is in, if the adapter is here."""
        here = name in self.groups and slot in self.groups[name]
        return [self.shared_tensor(slot, name)] if here else []  # type: ignore[list-item]

    def trainable_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Those of them that training changes; all unless the method says otherwise."""
        return self.adapter_parameters(name)

    def tensors(self, name: str) -> list[Tensor]:
        """All tensors that adapter `name` has here, trained or fixed, those that it shares among them."""
        return tensors_in(self.all_containers(), name)

    def bring_back(self) -> None:
        """Brings tensors of the adapters back that accelerate has offloaded, to stay: nobody calls their modules."""
        for module in (inner for container in self.all_containers() for inner in container.modules()):
            hook: Any = module.__dict__.get("_hf_hook")
            tensors = (*module._parameters.values(), *module._buffers.values())
            if getattr(hook, "offload", False) and any(tensor is not None and tensor.is_meta for tensor in tensors):
                hook.pre_forward(module)

    def gathered(self) -> AbstractContextManager[None]:
        """While it lasts, the tensors of the adapters here are whole, also where processes share them out."""
        if "_hf_hook" in self.wrapped.__dict__:
            self.bring_back()
        return gathered(self.all_containers())

    def leave_shared(self) -> None:
        """Leaves what layers share to the model around, which holds it as well."""
        left = (slot for slot, kind in self.slots.items() if kind.shared or kind.several)
        self.__dict__["_left"] = tuple(left)  # in the same order in all processes

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Without what is left to the model around: `fully_shard` of a block finds its parameters in this way."""
        return ((name, child) for name, child in super().named_children() if name not in self._left)

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype that an adapter is kept in, if its parameters have one."""
        return next((parameter.dtype for parameter in self.adapter_parameters(name)), None)

    def key_map(self, name: str) -> dict[str, str]:
        """Names of an adapter's tensors below this module: as files have them -> as the live module has them."""
        return self._stored(name, self.own_slots)

    def shared_key_map(self, name: str) -> dict[str, str]:
        """The same for what this part shares with others."""
        return self._stored(name, [slot for slot in self.slots if slot not in self.own_slots])

    def _stored(self, name: str, slots: Iterable[str]) -> dict[str, str]:
        held = {slot: getattr(self, slot) for slot in slots if slot in self._modules}
        return stored_names(held, self.slots, name, self.configs.get(name))

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names as files have them -> names as the live module has them."""
        return self.key_map(adapter_name)

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors, as files name them, out of this module's `state_dict`."""
        return {key: state_dict[live] for key, live in self.key_map(adapter_name).items() if live in state_dict}

    def move(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Moves the tensors of an adapter; those on the meta device become empty ones elsewhere."""
        modules: Any = self._modules
        for slot, kind in self.slots.items():
            entries = modules.get(slot, ())  # a layer may do without what others share
            if name not in entries or (kind.shared and not kind.trained):
                continue
            entry = entries[name]
            if isinstance(entry, nn.Module):
                _move_module(entry, device, dtype)
            elif (moved := _moved(data := entry.data, device, dtype)) is not data:
                is_parameter = isinstance(entry, nn.Parameter)
                entries[name] = nn.Parameter(moved, requires_grad=entry.requires_grad) if is_parameter else moved

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter."""
        for entries in self.containers():
            if adapter_name in entries:
                del entries[adapter_name]
        for values in (self.configs, *self.settings.values()):
            values.pop(adapter_name, None)
        self.__dict__["_active"] = [name for name in self._active if name != adapter_name]
        self.refresh()

    # ---- which of them act

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order they act."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list if there are several or none."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    _active_adapter = active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether the module acts as it would without adapters."""
        return self._disable_adapters

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are part of a base weight at present."""
        return []

    def check_active(self, names: Sequence[str]) -> None:
        """Raises ValueError where these adapters cannot be active here together."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones, in this order; trainable unless `inference_mode`, the others not.

        Raises:
            ValueError: they cannot be active here together.
        """
        names = as_names(adapter_names)
        self.check_active(names)
        for name in {*self._active, *self._trained}.difference(names):  # there may be hundreds, nearly all frozen
            self.set_requires_grad(name, False)
        for name in names:
            self.set_requires_grad(name, not inference_mode)
        self.__dict__["_active"] = names
        self.refresh()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not."""
        for name in as_names(adapter_names):
            self.__dict__["_trained"] = self._trained | {name} if requires_grad else self._trained - {name}
            parameters = list(self.trainable_parameters(name))
            for parameter in parameters:
                parameter.requires_grad_(requires_grad)
            if self._trained_before_disable:  # what is said while they are switched off counts afterwards
                self._trained_before_disable = without(self._trained_before_disable, parameters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off; what was trainable before is so again after."""
        if enabled == (not self._disable_adapters):
            return
        if enabled:
            changed, self._trained_before_disable = self._trained_before_disable, []
        else:
            changed = [p for name in self.adapter_names() for p in self.adapter_parameters(name) if p.requires_grad]
            self._trained_before_disable = changed
        for parameter in changed:
            parameter.requires_grad_(enabled)
        self._disable_adapters = not enabled
        self.refresh()

    def refresh(self) -> None:
        """Decides what the next forward passes do; called whenever the state changes."""


def trained_in(dtype: torch.dtype | None, autocast: bool) -> torch.dtype | None:
    """The dtype of adapters beside a base weight of this one: with `autocast` they are not trained in halves.

    Never in floats of 8 bits, which nothing is computed in.
    """
    return torch.float32 if dtype in (UPCAST_DTYPES if autocast else UPCAST_DTYPES[2:]) else dtype


def as_names(names: str | Iterable[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def check_adapter_name(name: str, there: Collection[str] = ()) -> None:
    """Raises ValueError where a string cannot name a new adapter, beside those that are there."""
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(f"{name!r} cannot name an adapter: a name is a string without dots, and not {BASE!r}.")
    if name in there:
        raise ValueError(f"An adapter {name!r} exists already; delete it first, or choose another name.")


def known(names: str | Iterable[str], there: Collection[str], asked: str = "Adapter") -> list[str]:
    """One name or several, as a list; `asked` says in a message what they were for.

    Raises:
        ValueError: some adapter is none of those that are there.
    """
    names = as_names(names)
    missing = [name for name in names if name not in there]
    if missing:
        raise ValueError(
            f"{asked} {', '.join(map(repr, missing))} not found: it does not exist; there are"
            f" {', '.join(there) or 'none'}."
        )
    return names


def without(parameters: Iterable[nn.Parameter], those: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """`parameters` without `those`; by identity, for tensors compare by value."""
    left_out = {id(parameter) for parameter in those}
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """`module.parameters()`, without a walk where there is nothing to walk through."""
    own = module.parameters() if module._modules else module._parameters.values()
    return [parameter for parameter in own if parameter is not None]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """`module.parameters()` and `module.buffers()`, likewise."""
    return [*_parameters_of(module), *(module.buffers() if module._modules or module._buffers else ())]


def _move_module(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    parameters = _parameters_of(module)
    if device is not None and device.type != "meta" and any(parameter.is_meta for parameter in parameters):
        module.to_empty(device=device)
    elif any(p.device != (device or p.device) or p.dtype != (dtype or p.dtype) for p in parameters):
        module.to(device=device, dtype=dtype)


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else None  # indices stay what they are
    if tensor.is_meta and device is not None and device.type != "meta":
        return torch.empty_like(tensor, device=device, dtype=dtype)
    return tensor.to(device=device, dtype=dtype)
