"""One adapted module: the life of the adapters on it, its forward pass, merging.

`AdapterLayer` is the mechanism that every method shares. A method says which tensors an adapter has (`create`) and what
it changes (`change`); how the module is run with that is decided in `run`, how it becomes part of the weight in
`merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.core import merge as merging
from peft.core.adapted import AdaptedModule
from peft.core.base_op import BaseOp, NormOp
from peft.core.call import current_route
from peft.core.part import Part, as_names, keep_values, tensors_in
from peft.core.routing import Route
from peft.core.run import run, run_routed
from peft.core.slots import Setting
from peft.core.storage import onloaded, storage_of
from peft.core.undo import replaced
from peft.errors import warn


class AdapterLayer(AdaptedModule):
    """A base module with named adapters of one method.

    The tensors of adapter `name` are `getattr(self, slot)[name]` for each slot in `slots`, its settings are in
    `settings`.

    What a method writes:
        create: makes the tensors of an adapter.
        change: what an adapter does to the module, as one or several of the changes in `change`.
    """

    #: kinds of base module (see `base_op`) that the method works on
    kinds: ClassVar[frozenset[str]] = frozenset(
        ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "Parameter")
    )
    #: why adapters cannot become part of the weight, for methods of which that holds
    cannot_merge: ClassVar[str] = ""
    #: what status calls the layer, with the file and the name of its class, and the kind of base module
    label: ClassVar[str] = "{file}.{kind}"
    #: the setting that is a `Dropout`; of a layer, its values by adapter
    dropout_setting: ClassVar[Any] = None
    #: False leaves an input in its dtype where somebody else brings the adapter's weights to that, as they are called
    cast_input_dtype_enabled: bool = True

    #: the rank of each adapter here, of methods that have one
    r = Setting[int]()

    def of_module(self, name: str) -> Any:
        is_changed = name in (self.op.weight_name, self.op.bias_name) and self.acting()
        return self._seen()[name == self.op.bias_name] if is_changed else getattr(self._modules["base_layer"], name)

    # ---- what a method writes

    def create(self, name: str, config: Any) -> None:
        """Makes the tensors of adapter `name`, on any device and in any dtype: the mechanism moves them.

        `config` is as it is for this module, with the values that patterns have for it; `check` sees it so, too.
        """

    def draw(self, name: str, config: Any) -> None:
        """Makes the fixed tensors of adapter `name`, which its configuration and the base weight determine.

        Called after `create`, and on a real device even where that is not. What is made of `start_matrix` has no memory
        where a file is about to bring it.
        """

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        """Gives tensors of adapter `name` the sizes of a file that is about to be loaded, where only that tells them.

        Args:
            name: the adapter.
            path: this layer's name.
            find: the file's tensor of that name below this layer (`"boft_R"`), None if it has none.

        Raises:
            ValueError, RuntimeError: what the file holds does not fit this layer.
        """

    def renew(self, slot: str, name: str, shape: Sequence[int]) -> None:
        """A parameter of another shape in place of the one in a slot, its values open."""
        entries = getattr(self, slot)
        old = entries[name]
        entries[name] = nn.Parameter(old.new_empty(shape), requires_grad=old.requires_grad)

    def loaded(self, name: str) -> None:
        """Called when tensors of adapter `name`, shared ones too, have come from a file; some may be missing."""

    def dropout_of(self, name: str) -> float:
        """The probability of dropout on the input of adapter `name`, at present; token ids have none."""
        held = self.dropout_setting
        return held[name] if held is not None and self.training and self.op.kind != "Embedding" else 0.0

    def check_merge(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where the adapter cannot become part of the weight."""
        if self.cannot_merge:
            raise NotImplementedError(self.cannot_merge)

    @classmethod
    def check(cls, config: Any, key: str, module: nn.Module, op: BaseOp) -> None:
        """Raises ValueError where `config` cannot go on this module; asked before anything is changed."""

    def change_base(self, name: str) -> Any:
        """Changes the base weight, if the start of adapter `name` asks for it; when the adapter is complete.

        Returns what the storage needs to undo it; None where nothing was changed.
        """
        return None

    # ---- the module underneath

    @property
    def weight(self) -> Tensor:
        """The base module's weight, packed as it may be; the one in effect where it is read rather than called."""
        if self.is_read and self.acting():
            return self._seen()[0]
        below: Any = self.below
        return self.own_weight if below is None else below.weight

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias, or None; in effect where `weight` is."""
        if self.is_read and self.acting():
            return self._seen()[1]
        below: Any = self.below
        return self.get_base_bias() if below is None else below.bias

    def _seen(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as a module around reads them."""
        for name in () if self.with_attention else self.acting():
            try:
                self.check_merge(name)
            except (NotImplementedError, ValueError) as error:
                raise NotImplementedError(
                    f"The module around this {type(self.get_base_layer()).__name__} reads its weight and does not call"
                    f" it, so adapter {name!r} acts there only as a change of the weight. {error} Leave the module out"
                    " of the adapter's targets."
                ) from None
        return self.effective()

    # ---- the life of an adapter

    def add_adapter(
        self, name: str, config: Any, planned: Mapping[str, Any] | None = None, own: Any = None, **settings: Any
    ) -> None:
        """Makes adapter `name` and puts it where the base weight is; it is not active yet.

        Args:
            name: its name.
            config: its configuration.
            planned: settings that `create` finds made, see `Method.plan_settings`.
            own: the configuration as it is for this module, if that differs; `create` gets it.
            settings: further arguments of `create`.
        """
        device = self.place()[0]
        self.new_record(name, config, own)
        for setting, value in (planned or {}).items():
            self.settings.setdefault(setting, {})[name] = value
        # `get_default_device()` of torch 2.4 knows nothing of `with torch.device(...)`.
        with replaced(self, "waits_for_file", torch.empty(0).is_meta):
            # Beside a weight without memory, tensors would lose their values at once: they are made without as well.
            with device if device is not None and device.type == "meta" else nullcontext():
                self.create(name, config if own is None else own, **settings)
            self._draw(name, config)
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad = False
        if not self.lacks(name):  # else loading will bring them
            self.move(name, device)
        elif device is not None and device.type != "meta":
            for _, tensor in self._fixed(name):
                tensor.data = tensor.data if tensor.is_meta else tensor.data.to(device)
        if name in self._active:
            self.refresh()

    def lacks(self, name: str) -> bool:
        """Whether tensors of an adapter have no memory yet."""
        return any(tensor.is_meta for tensor in self.tensors(name))

    def fill_in(self, name: str, config: Any, own: Any, **settings: Any) -> None:
        """Gives those tensors of an adapter that have no memory the values of a fresh adapter."""
        before = tensors_in(self.containers(), name)
        if any(tensor.is_meta for _, tensor in self._fixed(name)):
            self._draw(name, config)
        if self.lacks(name):  # so for what `create` makes
            self.create(name, own, **settings)
        self.move(name, self.place()[0])
        keep_values(before, tensors_in(self.containers(), name))

    def _draw(self, name: str, config: Any) -> None:
        """Makes the fixed tensors; all with values, unless a file has all those that would be without."""
        with torch.device("cpu"):
            self.draw(name, config)
            without = [slot for slot, tensor in self._fixed(name) if tensor.is_meta]
            if self.waits_for_file and not all(self.slots[slot].is_stored(config, slot) for slot in without):
                self.__dict__["waits_for_file"] = False
                self.draw(name, config)

    def _fixed(self, name: str) -> list[tuple[str, Tensor]]:
        """The fixed tensors of an adapter, by slot."""
        held: dict[str, Any] = {slot: self._modules[slot] for slot in self.own_slots if not self.slots[slot].trained}
        fixed = ((slot, entries[name]) for slot, entries in held.items() if name in entries)
        return [(slot, entry) for slot, entry in fixed if isinstance(entry, Tensor)]

    def restore_base(self, before: Any) -> None:
        """Gives the base weight back that `change_base` changed."""
        base = self.get_base_layer()
        with onloaded(base):
            storage_of(base, self.op.weight_name).restore(base, self.op.weight_name, before)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off, merged ones too; what was trainable before is so again after."""
        if enabled == (not self._disable_adapters):
            return
        merging.switch(self, enabled)
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters in effect; takes and returns what that takes and returns.

        `adapter_names`, one name per sample, gives each sample an adapter of its own.
        """
        names = kwargs.pop("adapter_names", None) if kwargs else None
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if "_hf_hook" in self._modules["base_layer"].__dict__:
            self.bring_back()
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
            warn("Already unmerged: nothing to do.")
            return
        merging.unmerge(self)

    def names_to_merge(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        """Which adapters of this layer a merge of `adapter_names` (None: of the active ones) concerns."""
        here = [name for name in (self._active if adapter_names is None else as_names(adapter_names)) if self.has(name)]
        merged = [name for name in here if name in self.merged_adapters]
        if merged:
            warn(f"Adapter {', '.join(merged)} is merged already.")
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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's effect is a change of a weight matrix, which a LoRA can have too."""
        if not self.has(adapter_name) or isinstance(self.op, NormOp):
            return False
        try:
            self.check_merge(adapter_name)
        except (NotImplementedError, ValueError):
            return False
        return True

    # ---- scale: `ScaledLayer` has one

    def set_scale(self, adapter: str, scale: float) -> None:
        """Warns that adapters of this method have no scale, if it is to be another than 1."""
        if scale != 1 and self.has(adapter):
            warn(f"A scale is not supported by {self.type_name}: adapter {adapter!r} acts in full.")

    def scale_layer(self, scale: float) -> None:
        """Warns that adapters of this method have no scale, if it is to be another than 1."""
        for name in self.live():
            AdapterLayer.set_scale(self, name, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """As `scale_layer`; without `scale` there is nothing to undo."""
        AdapterLayer.scale_layer(self, 1.0 if scale is None else scale)

    # ---- what status shows

    #: always a list: code that looks into layers knows it so
    active_adapter = Part.active_adapters
    _active_adapter = active_adapter

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> its slots that are not trained, where all would be as a rule."""
        return {}

    @property
    def type_name(self) -> str:
        """What status calls this kind of layer."""
        file, name = type(self).__module__.rpartition(".")[2], type(self).__name__
        return self.label.format(file=file, name=name, kind=self.op.kind)

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, self.type_name, 1)
