"""One adapted module, and the adapters on it.

`AdapterLayer` is the mechanism that every method shares. A method says which tensors an adapter has (`create`) and what
it changes (`change`); how the module is run with that is decided in `run`, how it becomes part of the weight in
`merge`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core import making
from peft.core import merge as merging
from peft.core.base_op import BaseOp, NormOp, base_op
from peft.core.call import current_route
from peft.core.change import Change
from peft.core.own_forward import has_own_forward
from peft.core.part import Part, as_names
from peft.core.routing import BASE, Route
from peft.core.run import run, run_routed
from peft.core.slots import Record, Slot
from peft.core.storage import onloaded, place_of, read_bias, storage_of
from peft.core.storage.flat import bring_together
from peft.errors import PeftWarning
from peft.ops.memo import remember


class AdapterLayer(Part):
    """A base module with named adapters of one method.

    The base module is `base_layer`; if that is an `AdapterLayer` itself (several methods on one module), this layer's
    adapters act on the outcome of that one's. The tensors of adapter `name` are `getattr(self, slot)[name]` for each
    slot in `slots`, its settings are in `records[name]`.

    What a method writes:
        create: makes the tensors of an adapter.
        change: what an adapter does to the module, as one or several of the changes in `change`.
    """

    #: kinds of base module (see `base_op`) that the method works on
    kinds: ClassVar[frozenset[str]] = frozenset(
        ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "Parameter")
    )
    #: what the adapter layer is called in status, beside its kind: its file if None; "" where the class says it all
    label: ClassVar[str | None] = None
    #: the setting that is a `Dropout`
    dropout_field: ClassVar[str | None] = None

    parameter_name: str | None
    is_read: bool  # whether modules around it read `weight` and `bias`: what they see is with the adapters
    with_attention: bool  # whether it is the output projection of an attention module with a layer around it
    without_samples: str | None
    ledger: merging.Ledger
    _live: list[str]
    _merged: list[merging.Entry]
    #: whether the tensors of the adapter that is being made come from a file, those that files hold
    waits_for_file: bool

    def __init__(self, base_layer: nn.Module, parameter_name: str | None = None, op: BaseOp | None = None):
        super().__init__()
        self._modules["base_layer"] = base_layer
        found = op or self.op_of(self.get_base_layer(), parameter_name)
        if found is None:
            raise ValueError(f"{type(self.get_base_layer()).__name__} has no weight that an adapter can change.")
        found.own_forward = parameter_name is None and has_own_forward(self.get_base_layer(), found)
        for slot in self.adapter_layer_names:
            self._modules[slot] = self.slots[slot].container()
        ledger = base_layer.ledger if isinstance(base_layer, AdapterLayer) else merging.Ledger()
        self.__dict__.update(
            op=found, parameter_name=parameter_name, is_read=False, with_attention=False, without_samples=None,
            ledger=ledger, _live=[], _merged=ledger.entries, waits_for_file=False,
        )  # fmt: skip

    def of_module(self, name: str) -> Any:
        is_changed = name in (self.op.weight_name, self.op.bias_name) and self.acting()
        return self._seen()[name == self.op.bias_name] if is_changed else getattr(self._modules["base_layer"], name)

    # ---- what a method writes

    def create(self, name: str, config: Any) -> None:
        """Makes the tensors of adapter `name`, on any device and in any dtype: the mechanism moves them."""

    def draw(self, name: str, config: Any) -> None:
        """Makes the fixed tensors of adapter `name`, which its configuration and the base weight determine.

        Called after `create`, and on a real device even where that is not. What is made of `start_matrix` has no memory
        where a file is about to bring it.
        """

    def loaded(self, name: str) -> None:
        """Called when tensors of adapter `name`, shared ones too, have come from a file; some may be missing."""

    def change(self, name: str) -> Change | Iterable[Change]:
        """What adapter `name` does to the module at present; several changes act one after the other."""
        raise NotImplementedError

    def changes(self, names: Sequence[str]) -> list[Change]:
        """What these adapters do to the module, the first next to it."""
        if "ds_id" in self.__dict__:
            bring_together(self, self.held(names))
        changes: list[Change] = []
        for name in names:
            change = self.change(name)
            if isinstance(change, Change):
                changes.append(change)
            else:
                changes += change
        return changes

    def dropout_of(self, name: str) -> float:
        """The probability of dropout on the input of adapter `name`, at present."""
        return getattr(self, self.dropout_field)[name] if self.dropout_field and self.training else 0.0

    def check_merge(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where the adapter cannot become part of the weight."""

    @classmethod
    def op_of(cls, module: nn.Module, parameter_name: str | None) -> BaseOp | None:
        """How the method sees a module (or one parameter of it); None where it can do nothing with it."""
        return base_op(module, parameter_name)

    @classmethod
    def check(cls, config: Any, key: str, module: nn.Module, op: BaseOp) -> None:
        """Raises ValueError where `config` cannot go on this module; asked before anything is changed."""

    def settle(self, name: str) -> Any:
        """Changes the base weight, if the start of adapter `name` asks for it; when the adapter is complete.

        Returns what the storage needs to undo it; None where nothing was changed.
        """
        return None

    # ---- the module underneath

    @property
    def wrapped(self) -> nn.Module:
        return self.base_layer

    @property
    def below(self) -> AdapterLayer | None:
        """The layer that this one is around, of another method or for another parameter; None if it is around none."""
        below = self._modules["base_layer"]
        return below if isinstance(below, AdapterLayer) else None

    def get_base_layer(self) -> Any:
        """The base module under all adapter layers."""
        layer = self._modules["base_layer"]
        while isinstance(layer, AdapterLayer):
            layer = layer._modules["base_layer"]
        return layer

    def read_layers(self) -> list[AdapterLayer]:
        """The layers inside the module below that it reads instead of calling."""
        children = self.base_layer.children()
        return [child for child in children if isinstance(child, AdapterLayer) and child.with_attention]

    @property
    def weight(self) -> Tensor:
        """The base module's weight, packed as it may be; the one in effect where it is read rather than called."""
        return self._seen()[0] if self.is_read and self.acting() else self.own_weight

    @property
    def own_weight(self) -> Tensor:
        """The base module's weight, packed as it may be."""
        base, name = self.get_base_layer(), self.op.weight_name
        held = base._parameters.get(name)
        return storage_of(base, name).held(base, name) if held is None else held

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias, or None; in effect where `weight` is."""
        return self._seen()[1] if self.is_read and self.acting() else self.get_base_bias()

    def _seen(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as a module around reads them."""
        for name in () if self.with_attention else self.acting():
            self.check_merge(name)  # else it cannot be seen in a weight
        return self.effective()

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
        value = self.ledger.original(base, name)
        if value.is_meta:
            with onloaded(base):
                value = self.ledger.original(base, name)
        return value

    def start_matrix(self) -> Tensor:
        """The original base weight as a matrix [out, in], for what a new adapter has of it (see `making.start_of`)."""
        with onloaded(self.get_base_layer()):
            return making.start_of(self.op.matrix(self.original_weight()), self.waits_for_file)

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

    # ---- the life of an adapter

    def add_adapter(
        self, name: str, config: PeftConfig | None, planned: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        """Makes adapter `name` and puts it where the base weight is; it is not active yet.

        Args:
            name: its name.
            config: its configuration.
            planned: settings that `create` finds made, see `Method.plan_settings`.
            settings: arguments of `create`.
        """
        making.make(self, name, config, planned or {}, settings)
        if name in self._active:
            self.refresh()

    def new_record(self, name: str, config: Any) -> None:
        """Begins the record of an adapter."""
        record = self.records[name] = Record()
        record.config = config
        for setting in self.other_param_names:
            field = getattr(type(self), setting).field
            if hasattr(config, field):
                record.__dict__[setting] = getattr(config, field)

    def add_slot(self, name: str, slot: Slot) -> None:
        """Makes room for one more kind of tensor on this layer."""
        if name not in self.slots:
            self.__dict__["slots"] = {**self.slots, name: slot}
            self.__dict__["adapter_layer_names"] = (*self.adapter_layer_names, name)
            self.__dict__.pop(name, None)
            self._modules[name] = slot.container()

    def share(self, containers: Mapping[str, nn.Module]) -> None:
        """Takes in the containers of the slots that layers share."""
        self._modules.update(containers)

    def unsettle(self, before: Any) -> None:
        """Gives the base weight back that `settle` changed."""
        base = self.get_base_layer()
        with onloaded(base):
            storage_of(base, self.op.weight_name).restore(base, self.op.weight_name, before)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off, merged ones too; what was trainable before is so again after."""
        if enabled == (not self._disable_adapters):
            return
        merging.resume(self) if enabled else merging.pause(self)
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        A merged adapter is taken out of the base weight first.
        """
        merging.unmerge(self, [adapter_name])
        was_active = adapter_name in self._active
        super().delete_adapter(adapter_name)
        left = self.adapter_names()
        if was_active and not self._active and left:
            self.set_adapter(left[0])

    # ---- forward

    def refresh(self) -> None:
        entries = self.ledger.entries
        merged = self.ledger.of(self) if entries else ()
        live = [name for name in self._active if self.has(name) and name not in merged]
        self.__dict__.update(_live=live, _merged=entries)

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
            return self.get_base_bias()
        return merging.apply_to_bias(below.changes(below.acting()), below.bias_below())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters in effect; takes and returns what that takes and returns.

        `adapter_names`, one name per sample, gives each sample an adapter of its own.
        """
        names = kwargs.pop("adapter_names", None) if kwargs else None
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        route = current_route() if names is None else Route(names)
        if route is not None:
            return self._forward_routed(route, x, *args, **kwargs)
        live = self.live()
        if not live:
            return self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        return run(self, live, x, *args, **kwargs)

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the samples of each adapter with that adapter."""
        return run_routed(self, route, x, *args, **kwargs)

    def effective(self, names: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight (in the module's shape) and bias as these adapters (those that act if None) make them.

        They act on what the adapter layers below make of the base weight.
        """
        return merging.changed(self, self.changes(self.acting() if names is None else names))

    # ---- merging

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are part of the base weight at present."""
        return self.ledger.of(self)

    @property
    def merged(self) -> bool:
        """Whether some adapter is part of the base weight at present."""
        return bool(self.merged_adapters)

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        return self.ledger.nbytes(self.get_base_layer())

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: str | Sequence[str] | None = None,
        keep: bool = True,
        own: bool | None = None,
    ) -> None:
        """Makes adapters part of the base weight.

        With `keep`, the original weight is kept beside it, as much memory again as the weight takes, so that
        `unmerge` gives it back bit for bit. With `own`, modules that share the weight keep the original.

        Raises:
            ValueError: `safe_merge`, and the outcome would not be finite.
            NotImplementedError: the method, or its combination with this module, has no merged form.
        """
        names = self.names_to_merge(adapter_names)
        if names:
            merging.merge(self, names, safe_merge, keep, own)

    def unmerge(self) -> None:
        """Gives the base weight back as it was before merging, bit for bit."""
        if not self.merged and not self.ledger.of(self, paused=True):
            warnings.warn("Already unmerged: nothing to do.", PeftWarning, stacklevel=2)
            return
        merging.unmerge(self)

    def names_to_merge(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        """Which adapters of this layer a merge of `adapter_names` (None: of the active ones) concerns."""
        here = [name for name in (self._active if adapter_names is None else as_names(adapter_names)) if self.has(name)]
        merged = [name for name in here if name in self.merged_adapters]
        if merged:
            warnings.warn(f"Adapter {', '.join(merged)} is merged already.", PeftWarning, stacklevel=3)
        names = [name for name in here if name not in merged]
        for name in names:
            self.check_mergeable(name)
        return names

    def check_mergeable(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where adapter `name` or the base weight does not allow merging."""
        self.check_merge(name)
        base = self.get_base_layer()
        storage_of(base, self.op.weight_name).check_write(base, self.op.weight_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` changes the base weight by, in the module's shape and dtype."""
        native = self.get_base_weight()
        return self.op.unmatrix(merging.difference(self, adapter), native).to(native.dtype)

    def adapter_dtype(self) -> torch.dtype | None:
        """The dtype that adapters here are kept in."""
        return next((dtype for name in self.adapter_names() if (dtype := self.dtype_of(name)) is not None), None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's effect is a change of a weight matrix, which a LoRA can have too."""
        if not self.has(adapter_name) or isinstance(self.op, NormOp):
            return False
        try:
            self.check_merge(adapter_name)
        except NotImplementedError:
            return False
        return True

    # ---- what status shows

    @property
    def type_name(self) -> str:
        """What status calls this kind of layer."""
        label = type(self).__module__.rpartition(".")[2] if self.label is None else self.label
        return f"{label}.{self.op.kind}" if label else type(self).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, self.type_name, 1)
