"""What an adapter has on a layer: tensors in slots, and settings in one record.

A method declares both on its layer class. The mechanism makes the containers, moves, casts, saves, loads and deletes
what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, nn

T = TypeVar("T")


class Buffers(nn.Module):
    """Fixed tensors by adapter name (or by name of a group of layers), as buffers: they move with the model.

    Args:
        persistent: whether they are part of the model's state dict.
    """

    def __init__(self, persistent: bool = True):
        super().__init__()
        self.persistent = persistent

    def __setitem__(self, name: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            self.register_buffer(name, value, persistent=self.persistent)

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


@dataclass(frozen=True)
class Slot:
    """One kind of tensor that adapters have.

    Attributes:
        trained: a parameter; else a fixed tensor, made by `AdapterLayer.draw` (or `Method.share`) on a real device even
            where the trained ones have no memory yet.
        stored: whether files hold it; or the field of the configuration that says so.
        shared: one for all layers of an adapter, or for each of several groups of them, made by `Method.share`. It is
            held by the model of the method, and by the layers as the same object.
        modules: what is held are modules with the tensors in them, not the tensors themselves.
        parameter: a fixed tensor that is held as a parameter all the same.
    """

    trained: bool = True
    stored: bool | str = True
    shared: bool = False
    modules: bool = False
    parameter: bool = False

    def container(self) -> nn.Module:
        """An empty container."""
        if self.modules:
            return nn.ModuleDict()
        return nn.ParameterDict() if self.trained or self.parameter else Buffers(persistent=self.stored is not False)

    def is_stored(self, config: Any, name: str) -> bool:
        """Whether the file of an adapter with this configuration holds it, given what the slot is called."""
        if not self.trained and name in (getattr(config, "left_out", None) or ()):
            return False
        return self.stored if isinstance(self.stored, bool) else bool(getattr(config, self.stored))


class Record:
    """The settings of one adapter on one layer, and its configuration."""

    config: Any = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"This adapter has no setting {name!r} here.")


class View(MutableMapping[str, T]):
    """One setting of all adapters of a layer, by adapter name: a view of their records."""

    __slots__ = ("_name", "_records")

    def __init__(self, records: dict[str, Record], name: str):
        self._records, self._name = records, name

    def __getitem__(self, adapter: str) -> T:
        try:
            return self._records[adapter].__dict__[self._name]
        except KeyError:
            raise KeyError(adapter) from None

    def __setitem__(self, adapter: str, value: T) -> None:
        self._records.setdefault(adapter, Record()).__dict__[self._name] = value

    def __delitem__(self, adapter: str) -> None:
        if adapter not in self:
            raise KeyError(adapter)
        del self._records[adapter].__dict__[self._name]

    def __contains__(self, adapter: object) -> bool:
        record = self._records.get(adapter)  # type: ignore[call-overload]
        return record is not None and self._name in record.__dict__

    def __iter__(self) -> Iterator[str]:
        return (adapter for adapter in list(self._records) if adapter in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class Setting(Generic[T]):
    """A setting that each adapter has on a layer: `layer.r["default"]` is `layer.records["default"].r`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, layer: Any, owner: type) -> View[T]: ...
    def __get__(self, layer: Any, owner: type) -> Any:
        return self if layer is None else View(layer.records, self.name)

    def __set__(self, layer: Any, values: Any) -> None:
        """Replaces the setting of all adapters, as code that is used to dictionaries may do."""
        view: View[T] = View(layer.records, self.name)
        for adapter in list(view):
            del view[adapter]
        view.update(values)
