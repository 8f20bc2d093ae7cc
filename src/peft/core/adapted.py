"""A base module, and what adapters it has on it: what the rest of the mechanism works with.

How it runs with them is in `run`, how they become part of its weight in `merge`, their life in `layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import BaseOp, ParameterOp, base_op
from peft.core.call import current_route, fact
from peft.core.change import Change, bias_with
from peft.core.own_forward import has_own_forward
from peft.core.part import Part
from peft.core.routing import BASE
from peft.core.slots import Buffers, FixedSlot, Slot
from peft.core.storage import onloaded, place_of, read_bias, storage_of
from peft.core.storage.flat import bring_together
from peft.ops.memo import remember

#: an adapter on a layer
Entry = tuple["AdaptedModule", str]


@dataclass
class Ledger:
    """What is part of the tensors of a base module at present, and what it takes to undo that.

    All layers around one base module share its ledger, so that what one of them merged is not lost to another.
    """

    #: in the order in which they were merged
    entries: list[Entry] = field(default_factory=list)
    #: those of them that are switched off, to be merged again when they are switched on
    paused: list[Entry] = field(default_factory=list)
    #: name of each changed tensor -> what its storage keeps of the original
    originals: dict[str, Any] = field(default_factory=dict)
    #: those that were merged for good
    settled: list[Entry] = field(default_factory=list)
    #: whether modules that share a changed tensor have kept the original
    own: bool = False
    #: adapters whose start has taken something out of the weight
    taken_by: set[str] = field(default_factory=set)

    def of(self, layer: Part, paused: bool = False) -> list[str]:
        """The adapters of a layer that are merged (or paused)."""
        return [name for other, name in (self.paused if paused else self.entries) if other is layer]

    def original(self, base: nn.Module, name: str) -> Tensor:
        """A tensor of the base module as it was before anything was merged into it."""
        storage = storage_of(base, name)
        if name in self.originals:
            return storage.original(base, name, self.originals[name])
        return storage.read(base, name)

    def nbytes(self, base: nn.Module) -> int:
        """Bytes kept to undo it."""
        return sum(storage_of(base, name).nbytes(before) for name, before in self.originals.items())


def to_init_from(matrix: Tensor, waits_for_file: bool) -> Tensor:
    """A base weight as the tensors of a new adapter are made of it: in float32, or float64 where it is.

    On the meta device where it has no memory itself, or where a file is about to bring what is made of it.
    """
    matrix = matrix.detach()
    matrix = matrix.to("meta") if waits_for_file else matrix
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def apply_to_bias(changes: Sequence[Change], bias: Tensor | None) -> Tensor | None:
    """A bias with changes; the very tensor where there is none that changes it."""
    changed = bias_with(changes, bias)
    return changed if changed is bias or changed is None or bias is None else changed.to(bias.dtype)


class AdaptedModule(Part):
    """A base module, `base_layer`, with named adapters of one method.

    If the base module is such a module itself (several methods on one module), the adapters act on the outcome of that
    one's.
    """

    base_layer: Any
    #: the kind of module that the base module is
    op: BaseOp
    parameter_name: str | None
    is_read: bool  # whether modules around it read `weight` and `bias`: what they see is with the adapters
    with_attention: bool  # whether it is the output projection of an attention module with a layer around it
    without_samples: str | None
    ledger: Ledger
    _live: list[str]
    _merged: list[Entry]
    #: whether the tensors of the adapter that is being made come from a file, those that files hold
    waits_for_file: bool

    def __init__(self, base_layer: nn.Module, parameter_name: str | None = None, op: BaseOp | None = None):
        super().__init__()
        self._modules["base_layer"] = base_layer
        found = op or self.op_of(self.get_base_layer(), parameter_name)
        if found is None:
            raise ValueError(f"{type(self.get_base_layer()).__name__} has no weight that an adapter can change.")
        found.own_forward = parameter_name is None and has_own_forward(self.get_base_layer(), found)
        for slot in self.own_slots:
            self._modules[slot] = self.slots[slot].container()
        ledger = base_layer.ledger if isinstance(base_layer, AdaptedModule) else Ledger()
        self.__dict__.update(
            op=found, parameter_name=parameter_name, is_read=False, with_attention=False, without_samples=None,
            ledger=ledger, _live=[], _merged=ledger.entries, waits_for_file=False,
        )  # fmt: skip

    # ---- what adapters change

    def change(self, name: str) -> Change | Iterable[Change]:
        """What adapter `name` does to the module at present; several changes act one after the other."""
        raise NotImplementedError

    def changes(self, names: Sequence[str]) -> list[Change]:
        """What these adapters do to the module, the first next to it."""
        if "ds_id" in self.__dict__:  # asked here as well: each layer comes by for each token that is decoded
            bring_together(self, (tensor for name in names for tensor in self.tensors(name)))
        changes: list[Change] = []
        for name in names:
            change = self.change(name)
            if isinstance(change, Change):
                changes.append(change)
            else:
                changes += change
        return changes

    def refresh(self) -> None:
        entries = self.ledger.entries
        merged = self.ledger.of(self) if entries else ()
        live = [name for name in self._active if self.has(name) and name not in merged]
        self.__dict__.update(_live=live, _merged=entries)
        self.__dict__.pop("_stacks", None)  # what mixed batches have kept, see `stacks`

    def live(self) -> list[str]:
        """The active adapters that are not merged."""
        if self._merged is not self.ledger.entries:  # another layer around the module has merged, or was interrupted
            self.refresh()
        return self._live

    def acting(self) -> Sequence[str]:
        """The adapters that act on the whole of the present call, those that are merged aside."""
        if self._disable_adapters:
            return ()
        route = current_route()
        if route is None:
            return self.live()
        names = set(route.names)
        if len(names) > 1:
            raise ValueError(
                f"{type(self.get_base_layer()).__name__} is read by the module around it rather than called, so its"
                " adapters cannot differ from sample to sample (adapter_names)."
            )
        return [name for name in names if name != BASE and self.has(name)]

    def bias_below(self) -> Tensor | None:
        """The bias of the module that this layer is around, with what the layers below make of it."""
        below = self.below
        if below is None:
            bias = self.get_base_bias()
            if bias is not None and bias.is_meta:  # offloaded
                with onloaded(self.get_base_layer()):
                    bias = self.get_base_bias()
            return bias
        return apply_to_bias(below.changes(below.acting()), below.bias_below())

    def adapter_dtype(self) -> torch.dtype | None:
        """The dtype that adapters here are kept in."""
        return next((dtype for name in self.adapter_names() if (dtype := self.dtype_of(name)) is not None), None)

    # ---- the module underneath

    @classmethod
    def op_of(cls, module: nn.Module, parameter_name: str | None) -> BaseOp | None:
        """How the method sees a module (or one parameter of it); None where it can do nothing with it."""
        return base_op(module, parameter_name)

    @property
    def wrapped(self) -> nn.Module:
        return self.base_layer

    @property
    def below(self) -> AdaptedModule | None:
        """The layer that this one is around, of another method or for another parameter; None if it is around none."""
        below = self._modules["base_layer"]
        return below if isinstance(below, AdaptedModule) else None

    def count_below(self) -> int:
        """How many adapter layers this one is around."""
        return 0 if self.below is None else 1 + self.below.count_below()

    def turn(self) -> tuple[bool, int]:
        """When it acts among the layers around a module: those of parameters, outer ones first, then inner ones."""
        of_parameter = isinstance(self.op, ParameterOp)
        return not of_parameter, -self.count_below() if of_parameter else self.count_below()

    def get_base_layer(self) -> Any:
        """The base module under all adapter layers."""
        layer = self._modules["base_layer"]
        while isinstance(layer, AdaptedModule):
            layer = layer._modules["base_layer"]
        return layer

    @property
    def own_weight(self) -> Tensor:
        """The base module's weight, packed as it may be."""
        base, name = self.get_base_layer(), self.op.weight_name
        held = base._parameters.get(name) if name else base.weight  # a block has none: AttributeError
        return storage_of(base, name).held(base, name) if held is None else held

    def get_base_bias(self) -> Tensor | None:
        """The base module's own bias, or None."""
        return read_bias(self.get_base_layer(), self.op.bias_name)

    def original_weight(self) -> Tensor:
        """The base weight as `get_base_weight` gives it, without what is merged into it."""
        return self._original(self.op.weight_name)

    def original_matrix(self) -> Tensor:
        """`original_weight` as a matrix [out, in], without gradient."""
        return self.op.matrix(self.original_weight().detach())

    def remembered(self, compute: Callable[[], Tensor], parameter: Tensor, *others: Tensor) -> Tensor:
        """What `compute` makes of tensors of an adapter and the base weight; once, where all stay as they are."""
        weight = self.get_base_layer()._parameters.get(self.op.weight_name)
        if type(weight) is not nn.Parameter:  # packed: it has no memory of its own to tell it by
            return compute()
        return remember(parameter, "with base", compute, weight, *others)

    def original_bias(self) -> Tensor | None:
        """The base bias without what is merged into it, or None."""
        name = self.op.bias_name
        return None if name is None or self.get_base_bias() is None else self._original(name)

    def _original(self, name: str) -> Tensor:
        """A tensor of the base module without what is merged into it, there also while it is offloaded."""
        base = self.get_base_layer()
        value = fact(f"original {name} {id(base)}")  # where a layer around this one has it changed for the call
        value = self.ledger.original(base, name) if value is None else value
        if value.is_meta:
            with onloaded(base):
                value = self.ledger.original(base, name)
        return value

    def start_matrix(self) -> Tensor:
        """The original base weight as a matrix [out, in], for what a new adapter has of it (see `to_init_from`)."""
        with onloaded(self.get_base_layer()):
            return to_init_from(self.op.matrix(self.original_weight()), self.waits_for_file)

    def get_base_weight(self) -> Tensor:
        """The base weight as a plain tensor in the module's shape, whatever it is stored as."""
        return storage_of(base := self.get_base_layer(), self.op.weight_name).read(base, self.op.weight_name)

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.op.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return self.op.out_features

    def place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and floating dtype of the base module, where tensors beside it belong."""
        base = self.get_base_layer()
        weight = base._parameters.get(self.op.weight_name)
        if weight is not None and weight.is_floating_point() and "_hf_hook" not in base.__dict__:
            return weight.device, weight.dtype
        return place_of(base)

    # ---- what adapters have

    def new_record(self, name: str, config: Any, own: Any = None) -> None:
        """Notes the configuration of an adapter; its settings are what that (`own`: as it is here) has fields for."""
        for values in self.settings.values():
            values.pop(name, None)
        self.configs[name], own = config, config if own is None else own
        for slot in self.own_slots:
            kind, entries = self.slots[slot], self._modules[slot]
            if isinstance(kind, FixedSlot) and isinstance(entries, Buffers):
                kind.prepare(entries, slot, name, config)
        for setting in self.other_param_names:
            field = getattr(type(self), setting).field
            if hasattr(own, field):
                getattr(self, setting)[name] = getattr(own, field)

    def add_slot(self, name: str, slot: Slot) -> None:
        """Makes room for one more kind of tensor on this layer."""
        if name not in self.slots:
            self.__dict__["slots"] = {**self.slots, name: slot}
            self.__dict__["own_slots"] = (*self.own_slots, name)
            self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, *([name] if slot.trained else ()))
            self.__dict__.pop(name, None)
            self._modules[name] = slot.container()

    def share(self, containers: Mapping[str, nn.Module]) -> None:
        """Takes in the containers of the slots that layers share."""
        self._modules.update(containers)
