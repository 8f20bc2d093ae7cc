"""What an adapter has on a layer: tensors in slots, and settings.

A method declares both on its layer class. The mechanism makes the containers, moves, casts, saves, loads and deletes
what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from peft.core.wrappers import state_names

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Buffers(nn.Module):
    """Fixed tensors by adapter name (or by name of a group of layers), as buffers: they move with the model.

    Args:
        buffers: those that it starts with.
        persistent: whether they are part of the model's state dict.
    """

    keys, values, items, get = Mapping.keys, Mapping.values, Mapping.items, Mapping.get
    pop, popitem, clear, update = (getattr(MutableMapping, name) for name in ("pop", "popitem", "clear", "update"))

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        self.transient: set[str] = set()  # names that are not part of it all the same
        self.update(buffers or {})

    def __setitem__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            self.register_buffer(name, value, persistent=self.persistent and name not in self.transient)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else self._buffers[name]

    def __delitem__(self, name: str) -> None:
        del (self._modules if name in self._modules else self._buffers)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers or name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter((*self._buffers, *self._modules))

    def __len__(self) -> int:
        return len(self._buffers) + len(self._modules)


@dataclass
class Slot:
    """One kind of tensor that adapters have on a part: what holds those of all its adapters, by adapter name.

    A class attribute of the part: `hra_u = Slot()` makes `layer.hra_u["default"]` a tensor.

    Attributes:
        trained: whether it is trained; else it is made by `AdapterLayer.draw` (or `Method.share`), on a real device
            even where the trained ones have no memory yet.
        stored: whether files hold it; or the field of the configuration that says so.
        shared: one for all layers of an adapter, or for each of several groups of them, made by `Method.share`. It is
            held by the model of the method, and by the layers as the same object.
        several: it holds modules that layers may have in common, which files have under the name of each.
    """

    trained: bool = True
    stored: bool | str = True
    shared: bool = False
    several: bool = False

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, part: Any, owner: type) -> nn.ParameterDict:
        try:
            return self if part is None else part.__dict__["_modules"][self.name]  # type: ignore[return-value]
        except KeyError:
            raise AttributeError(self.name) from None

    def container(self) -> nn.Module:
        """An empty container."""
        return nn.ParameterDict()

    def is_stored(self, config: Any, name: str) -> bool:
        """Whether the file of an adapter with this configuration holds it, given what the slot is called."""
        return not self._is_left_out(config, name) and self.in_state(config, name)

    def in_state(self, config: Any, name: str) -> bool:
        """Whether the model's state dict holds it: what a file holds from which nothing is left out."""
        if self._is_left_out(config, name) or isinstance(self.stored, bool):
            return self.stored is not False
        return bool(getattr(config, self.stored, False))

    def _is_left_out(self, config: Any, name: str) -> bool:
        return not self.trained and name in (getattr(config, "left_out", None) or ())


@dataclass
class FixedSlot(Slot):
    """A fixed tensor, held as a buffer."""

    trained: bool = False

    def __get__(self, part: Any, owner: type) -> Buffers:  # type: ignore[override]
        return super().__get__(part, owner)  # type: ignore[return-value]

    def container(self) -> nn.Module:
        return Buffers(persistent=self.stored is not False)

    def prepare(self, container: Buffers, name: str, adapter: str, config: Any) -> None:
        """Called before an adapter's tensor comes."""
        (container.transient.discard if self.in_state(config, name) else container.transient.add)(adapter)


def stored_names(containers: Mapping[str, Any], slots: Mapping[str, Slot], adapter: str, config: Any) -> dict[str, str]:
    """Names of an adapter's tensors that files hold, in these containers: as files have them -> as they are here."""
    keys: dict[str, str] = {}
    for slot, entries in containers.items():
        if adapter in entries and slots[slot].is_stored(config, slot):
            entry = entries[adapter]
            leaves = [f".{leaf}" for leaf in state_names(entry)] if isinstance(entry, nn.Module) else [""]
            keys |= {f"{slot}{leaf}": f"{slot}.{adapter}{leaf}" for leaf in leaves}
    return keys


class ModuleSlot(Slot, Generic[M]):
    """Modules of a kind, with the tensors in them: `router = ModuleSlot[nn.Linear]()`."""

    def __get__(self, part: Any, owner: type) -> dict[str, M]:  # type: ignore[override]
        return super().__get__(part, owner)  # type: ignore[return-value]

    def container(self) -> nn.Module:
        return nn.ModuleDict()


class Setting(Generic[T]):
    """A setting that each adapter has on a layer: `layer.r["default"]` is `layer.settings["r"]["default"]`.

    Args:
        field: the field of the configuration that it starts as, where there is one; that of the same name if None.
    """

    def __init__(self, field: str | None = None):
        self.field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.field = self.field or name

    def __get__(self, layer: Any, owner: type) -> dict[str, T]:
        return self if layer is None else layer.settings[self.name]  # type: ignore[return-value]

    def __set__(self, layer: Any, values: Any) -> None:
        """Replaces the setting of all adapters, as code that is used to dictionaries may do."""
        layer.settings[self.name] = dict(values)


class Dropout(Setting[float]):
    """The probability of dropout on an adapter's input, see `AdapterLayer.dropout_of`.

    Args:
        field: as for other settings.
        needs: what modules have to be, for it to be more than 0: an attribute of [`BaseOp`].
    """

    def __init__(self, field: str | None = None, needs: str = "linear"):
        super().__init__(field)
        self.needs = needs

    def __set_name__(self, owner: Any, name: str) -> None:
        super().__set_name__(owner, name)
        owner.dropout_setting = self
