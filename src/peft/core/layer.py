"""One adapted module: what the adapters on it are to its weight, and to its forward pass.

`AdapterLayer` is the mechanism that every method shares. A method says which tensors an adapter has (`create`) and how
it changes the weight (`transform`, or `delta` if it adds to it). Where the change can be applied more cheaply than by
computing the changed weight, it also says how (`add` to the output, or `adapt` the call).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core import merging
from peft.core.base_op import BaseOp, NormOp, ParameterOp, base_op
from peft.core.part import Part, as_names
from peft.core.routing import Route
from peft.core.running import RUN_BASE, RUN_CHAIN, RUN_WEIGHT, run_routed, run_with_weight
from peft.core.storage import onloaded, place_of, storage_of
from peft.errors import PeftWarning


class AdapterLayer(Part):
    """A base module with named adapters of one method.

    The base module is `base_layer`; if that is an `AdapterLayer` itself (several methods on one module), this layer's
    adapters act on the outcome of that one's. The tensors of adapter `name` are `getattr(self, slot)[name]` for each
    slot in `adapter_layer_names`.

    What a method writes:
        create: makes the tensors of an adapter.
        transform / delta: the adapter's change of the weight matrix [out, in].
        transform_bias: its change of the bias, if it has any.
        add / adapt with `cheap`: a forward that need not compute the changed weight.
    """

    #: kinds of base module (see `base_op`) that the method works on
    kinds: ClassVar[frozenset[str]] = frozenset(
        ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "Parameter")
    )
    #: what the adapter layer is called in messages and status
    label: ClassVar[str] = ""

    parameter_name: str | None
    #: whether the module around reads `weight` and `bias` instead of calling (attention's output projection)
    is_read: bool
    in_expert: bool
    _merged: merging.Merged
    _live: list[str]
    _mode: int

    def __init__(self, base_layer: nn.Module, parameter_name: str | None = None, op: BaseOp | None = None):
        super().__init__()
        self._modules["base_layer"] = base_layer
        found = op or base_op(self.get_base_layer(), parameter_name)
        if found is None:
            raise ValueError(f"{type(self.get_base_layer()).__name__} has no weight that an adapter can change.")
        for slot in self.adapter_layer_names:
            self._modules[slot] = self.container(slot)
        self.__dict__.update({setting: {} for setting in self.other_param_names}, op=found)
        self.__dict__.update(
            parameter_name=parameter_name, is_read=False, in_expert=False, _merged=merging.Merged(), _live=[],
            _mode=RUN_BASE,
        )  # fmt: skip

    # ---- what a method writes

    def container(self, slot: str) -> nn.Module:
        """An empty container for one slot."""
        return nn.ParameterDict()

    def create(self, name: str, config: Any) -> None:
        """Makes the tensors of adapter `name`, on any device and in any dtype: the mechanism moves them."""
        raise NotImplementedError

    def delta(self, name: str) -> Tensor:
        """What an additive adapter adds to the weight: [out, in]."""
        raise NotImplementedError

    def transform(self, name: str, weight: Tensor) -> Tensor:
        """The weight [out, in] as adapter `name` changes it."""
        return weight + self.delta(name)

    def transform_bias(self, name: str, bias: Tensor | None) -> Tensor | None:
        """The bias [out] as adapter `name` changes it."""
        return bias

    def cheap(self, name: str) -> bool:
        """Whether `add` or `adapt` serves for this adapter in place of `transform`."""
        return False

    def add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """`result` with the adapter's own product with `x` added; for additive methods with a cheap forward."""
        raise NotImplementedError

    def adapt(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output with this adapter on top of `below`, the module with what comes before it."""
        return self.add(name, x, below(x, *args, **kwargs))

    def check_merge(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where the adapter cannot become part of the weight."""

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
        return [child for child in children if isinstance(child, AdapterLayer) and child.is_read]

    @property
    def weight(self) -> Tensor:
        """The base module's weight, packed as it may be; the one in effect where it is read rather than called."""
        if self.is_read and self._mode != RUN_BASE:
            return self.effective()[0]
        base, name = self.get_base_layer(), self.op.weight_name
        held = base._parameters.get(name)
        return storage_of(base, name).held(base, name) if held is None else held

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias, or None; in effect where `weight` is."""
        return self.effective()[1] if self.is_read and self._mode != RUN_BASE else self.get_base_bias()

    def get_base_bias(self) -> Tensor | None:
        """The base module's own bias, or None."""
        bias = getattr(self.get_base_layer(), self.op.bias_name, None) if self.op.bias_name else None
        return None if bias is None or not bias.numel() else bias  # Transformer Engine's layers have an empty one

    def get_base_weight(self) -> Tensor:
        """The base weight as a plain tensor in the module's shape, whatever it is stored as."""
        base = self.get_base_layer()
        return storage_of(base, self.op.weight_name).read(base, self.op.weight_name)

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

    def add_adapter(self, name: str, config: PeftConfig | None, **settings: Any) -> None:
        """Makes adapter `name` and puts it where the base weight is; it is not active yet."""
        device = self.place()[0]
        # Beside a weight without memory, tensors would lose their values at once: they are made without as well.
        if device is not None and device.type == "meta":
            with device:
                self.create(name, config, **settings)
        else:
            self.create(name, config, **settings)
        parameters = list(self.adapter_parameters(name))
        for parameter in parameters:
            parameter.requires_grad = False
        if not any(parameter.is_meta for parameter in parameters):  # else loading will bring them
            self.move(name, device)
        if name in self._active:
            self._refresh()

    def unsettle(self, before: Any) -> None:
        """Gives the base weight back that `settle` changed."""
        base = self.get_base_layer()
        with onloaded(base):
            storage_of(base, self.op.weight_name).restore(base, self.op.weight_name, before)

    def fill_in(self, name: str, config: Any, settings: dict[str, Any]) -> None:
        """Gives those tensors of an adapter that have no memory the values of a fresh adapter."""
        before = list(self.adapter_parameters(name))
        self.create(name, config, **settings)
        self.move(name, *place_of(self.get_base_layer()))
        for old, new in zip(before, self.adapter_parameters(name), strict=True):
            new.data = new.data.to(old.dtype) if old.is_meta else old.data
            new.requires_grad_(old.requires_grad)

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
        merging.leave_out(self, adapter_name)
        was_active = adapter_name in self._active
        super().delete_adapter(adapter_name)
        left = self.adapter_names()
        if was_active and not self._active and left:
            self.set_adapter(left[0])

    # ---- forward

    def _refresh(self) -> None:
        live = [name for name in self._active if self.has(name) and name not in self._merged.names]
        self.__dict__["_live"] = live  # `cheap` may depend on it
        if self._disable_adapters or not live:
            mode = RUN_BASE
        elif all(self.cheap(name) for name in live):
            mode = RUN_CHAIN
        else:
            mode = RUN_WEIGHT
        self.__dict__["_mode"] = mode

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters in effect; takes and returns what that takes and returns.

        `adapter_names`, one name per sample, gives each sample an adapter of its own.
        """
        names = kwargs.pop("adapter_names", None) if kwargs else None
        route = self._route if names is None else Route(names)
        if route is not None and not self._disable_adapters:
            return self._forward_routed(route, x, *args, **kwargs)
        if self._mode == RUN_CHAIN:
            return self._chain(self._live, x, *args, **kwargs)
        if self._mode == RUN_BASE:
            return self.base_layer(x, *args, **kwargs)
        return run_with_weight(self, self._live, x, *args, **kwargs)

    def _chain(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapters one on top of the other, the first next to the base module."""
        *before, last = names
        below: Any = self._modules["base_layer"]
        for name in before:
            below = partial(self.adapt, name, below)
        return self.adapt(last, below, x, *args, **kwargs)

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the samples of each adapter with that adapter."""
        return run_routed(self, route, x, *args, **kwargs)

    @property
    def is_additive(self) -> bool:
        """Whether the method says what a cheap adapter adds to the output."""
        return type(self).add is not AdapterLayer.add

    def add_routed(self, route: Route, groups: Sequence[tuple[str, Tensor]], x: Tensor, result: Tensor) -> Tensor:
        """`result` with each sample's adapter added, for additive methods; `groups` are adapters and their samples."""
        dim, result = self.op.batch_dim, result.clone()
        for name, index in groups:
            changed = self.add(name, x.index_select(dim, index), result.index_select(dim, index))
            result.index_copy_(dim, index, changed.to(result.dtype))
        return result

    def effective(self, names: Sequence[str] | None = None, through: bool = True) -> tuple[Tensor, Tensor | None]:
        """Weight (in the module's shape) and bias as these adapters make them.

        They act on what the adapter layers below make of the base weight; without `through`, on the base weight.
        """
        below = self.below
        if through and below is not None and not isinstance(self.op, ParameterOp):
            native, bias = below.effective(None if below._mode != RUN_BASE else [])
        else:
            native, bias = self.get_base_weight(), self.get_base_bias()
        matrix = self.op.matrix(native)
        for name in self._live if names is None else names:
            dtype = self.dtype_of(name)
            matrix = self.transform(name, matrix.to(dtype) if dtype is not None and dtype != matrix.dtype else matrix)
            bias = self.transform_bias(name, bias)
        if bias is not None and bias.dtype != native.dtype:
            bias = bias.to(native.dtype)
        return self.op.unmatrix(matrix, native).to(native.dtype), bias

    def weight_to_run(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the base module is to be run with: `effective`, or what stands for it."""
        return self.effective(names)

    # ---- merging

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are part of the base weight at present."""
        return self._merged.names

    @property
    def merged(self) -> bool:
        """Whether some adapter is part of the base weight at present."""
        return bool(self._merged.names)

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        return self._merged.nbytes(self.get_base_layer())

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        keep: bool = True,
        own: bool = False,
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
        if not self.merged and not self._merged.paused:
            warnings.warn("Already unmerged: nothing to do.", PeftWarning, stacklevel=2)
            return
        self._merged.undo(self.get_base_layer())
        self._refresh()

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Which adapters of this layer a merge of `adapter_names` (None: of the active ones) concerns."""
        wanted = self._active if adapter_names is None else as_names(adapter_names)
        here = [name for name in wanted if self.has(name)]
        merged = [name for name in here if name in self._merged.names]
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

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with these adapters; for methods that need not make whole matrices on the way."""
        return self.effective(names, through=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` changes the base weight by, in the module's shape and dtype."""
        with onloaded(self.get_base_layer()), merging.without_dropout(self):
            weight = self.get_base_weight()
            return self.effective([adapter])[0] - weight

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
        return f"{self.label}.{self.op.kind}" if self.label else type(self).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, self.type_name, 1)
