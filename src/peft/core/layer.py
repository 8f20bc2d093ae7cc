"""One adapted module: the adapters on it, what they do in a forward pass, and merging.

`AdapterLayer` is the mechanism that every method shares. A method says which tensors an adapter has (`create`) and how
it changes the weight (`transform`, or `delta` if it adds to it). Where the change can be applied more cheaply than by
computing the changed weight, it also says how (`add` to the output, or `adapt` the call).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core.base_op import BaseOp, NormOp, ParameterOp, base_op
from peft.core.routing import BASE, Route, join_rows
from peft.core.storage import is_plain, onloaded, place_of, storage_of
from peft.errors import PeftWarning
from peft.ops.lora import compute_dtype, lora_linear

#: ways a layer can run, decided when its state changes
_RUN_BASE, _RUN_CHAIN, _RUN_WEIGHT = range(3)


class AdapterLayer(nn.Module):
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

    #: per-adapter containers of tensors or modules that are trained and saved
    adapter_layer_names: tuple[str, ...] = ()
    #: per-adapter plain dictionaries of settings
    other_param_names: tuple[str, ...] = ()
    #: kinds of base module (see `base_op`) that the method works on
    kinds: ClassVar[frozenset[str]] = frozenset(
        ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "Parameter")
    )
    #: what the adapter layer is called in messages and status
    label: ClassVar[str] = ""

    if TYPE_CHECKING:
        # torch says of every attribute of a module that it is a tensor or a module.
        def __getattr__(self, name: str) -> Any: ...

    parameter_name: str | None
    is_read: bool
    merged_adapters: list[str]
    _active: list[str]
    _live: list[str]
    _disable_adapters: bool
    _before_merge: dict[str, Any]
    _merged_before_disable: list[str]
    _merged_own: bool
    _trained_before_disable: list[nn.Parameter]
    _route: Route | None
    _mode: int

    def __init__(self, base_layer: nn.Module, parameter_name: str | None = None, op: BaseOp | None = None):
        super().__init__()
        # Straight into __dict__, here and below: a large model has tens of thousands of layers, and assigning to a
        # module is slow.
        self._modules["base_layer"] = base_layer
        found = op or base_op(self.get_base_layer(), parameter_name)
        if found is None:
            raise ValueError(f"{type(self.get_base_layer()).__name__} has no weight that an adapter can change.")
        for slot in self.adapter_layer_names:
            self._modules[slot] = self.container(slot)
        self.__dict__.update({setting: {} for setting in self.other_param_names}, op=found)
        self.__dict__.update(self._initial_state(parameter_name))

    @staticmethod
    def _initial_state(parameter_name: str | None) -> dict[str, Any]:
        return {
            "parameter_name": parameter_name,
            # set where the module around reads `weight` and `bias` instead of calling (attention's output projection)
            "is_read": False,
            "merged_adapters": [],
            "_active": [],
            "_live": [],
            "_disable_adapters": False,
            "_before_merge": {},
            "_merged_before_disable": [],
            "_merged_own": False,
            "_trained_before_disable": [],
            "_route": None,
            "_mode": _RUN_BASE,
        }

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

    def frozen_linear(self, below: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight [out, in] and bias of the base module in the dtype that a product with `x` is computed in.

        None where the module is more than that product, is trained, or is not `below`: then that has to be called.
        """
        base: Any = self.base_layer
        if below is not self.base_layer or not _is_frozen_dense(base):
            return None
        dtype, weight, bias = compute_dtype(x), self.op.matrix(base.weight), base.bias
        if weight.dtype != dtype:
            if dtype == x.dtype:  # no autocast: the base itself says what it thinks of the mixture
                return None
            weight = weight.to(dtype)
        return weight, bias if bias is None else bias.to(dtype)

    def run_low_rank(
        self, a: Tensor, b: Tensor, p: float, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The output of `below` plus (drop(x) A^T) B^T, in one with the base module's own product where that may be.

        Args:
            a: [r, in].
            b: [out, r].
            p: probability of dropout on the adapter's input.
            below: the module with what comes before this adapter; called with the rest.
        """
        frozen, dtype = self.frozen_linear(below, x), compute_dtype(x)
        if frozen is None:
            return self.add_low_rank(a, b, p, x, below(x, *args, **kwargs))
        return lora_linear(x.to(dtype), *frozen, None, a.to(dtype), b.to(dtype), 1.0, p)

    def add_low_rank(self, a: Tensor, b: Tensor, p: float, x: Tensor, result: Tensor) -> Tensor:
        """`result` [..., out] plus (drop(x) A^T) B^T; it may be written to."""
        dtype = compute_dtype(x)
        result = result.to(dtype)
        overwrite = result.is_contiguous() and not is_watched(self.base_layer)
        return lora_linear(x.to(dtype), None, None, result, a.to(dtype), b.to(dtype), 1.0, p, overwrite=overwrite)

    def check_merge(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where the adapter cannot become part of the weight."""

    def check_mergeable(self, name: str) -> None:
        """Raises NotImplementedError or ValueError where adapter `name` or the base weight does not allow merging."""
        self.check_merge(name)
        base = self.get_base_layer()
        storage_of(base, self.op.weight_name).check_write(base, self.op.weight_name)

    @classmethod
    def check(cls, config: Any, key: str, module: nn.Module, op: BaseOp) -> None:
        """Raises ValueError where `config` cannot go on this module; asked before anything is changed."""

    # ---- the module underneath

    def get_base_layer(self) -> Any:
        """The base module under all adapter layers."""
        layer = self._modules["base_layer"]
        while isinstance(layer, AdapterLayer):
            layer = layer._modules["base_layer"]
        return layer

    @property
    def weight(self) -> Tensor:
        """The base module's weight, packed as it may be; the one in effect where it is read rather than called."""
        if self.is_read and self._mode != _RUN_BASE:
            return self.effective()[0]
        base, name = self.get_base_layer(), self.op.weight_name
        held = base._parameters.get(name)
        return storage_of(base, name).held(base, name) if held is None else held

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias, or None; in effect where `weight` is."""
        return self.effective()[1] if self.is_read and self._mode != _RUN_BASE else self.get_base_bias()

    def get_base_bias(self) -> Tensor | None:
        """The base module's own bias, or None."""
        return getattr(self.get_base_layer(), self.op.bias_name, None) if self.op.bias_name else None

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.op.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return self.op.out_features

    def get_base_weight(self) -> Tensor:
        """The base weight as a plain tensor in the module's shape, whatever it is stored as."""
        base = self.get_base_layer()
        return storage_of(base, self.op.weight_name).read(base, self.op.weight_name)

    # ---- adapters and their state

    def containers(self) -> list[Any]:
        """What holds the tensors of the adapters by name, one container per slot."""
        modules = self._modules  # past `__getattr__`, which takes longer than all the rest of most callers
        return [modules[slot] for slot in self.adapter_layer_names]

    def adapter_names(self) -> list[str]:
        """The adapters on this layer, in the order they came."""
        return list(dict.fromkeys(name for entries in self.containers() for name in entries))

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names())

    def add_adapter(self, name: str, config: PeftConfig | None, **settings: Any) -> None:
        """Makes adapter `name` and puts it where the base weight is; it is not active yet."""
        device = self.place()[0]
        # Beside a weight without memory, tensors would lose their values at once: they are made without as well.
        with device if device is not None and device.type == "meta" else nullcontext():
            self.create(name, config, **settings)
        parameters = list(self.adapter_parameters(name))
        for parameter in parameters:
            parameter.requires_grad = False
        if not any(parameter.is_meta for parameter in parameters):  # else loading will bring them
            self.move(name, device)
        if name in self._active:
            self._refresh()

    def place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and floating dtype of the base module, where tensors beside it belong."""
        base = self.get_base_layer()
        weight = base._parameters.get(self.op.weight_name)
        if weight is not None and weight.is_floating_point() and "_hf_hook" not in base.__dict__:
            return weight.device, weight.dtype
        return place_of(base)

    def settle(self, name: str) -> Any:
        """Changes the base weight, if the start of adapter `name` asks for it; when the adapter is complete.

        Returns what the storage needs to undo it; None where nothing was changed.
        """
        return None

    def unsettle(self, before: Any) -> None:
        """Gives the base weight back that `settle` changed."""
        base = self.get_base_layer()
        with onloaded(base):
            storage_of(base, self.op.weight_name).restore(base, self.op.weight_name, before)

    def move(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Moves the tensors of an adapter; those on the meta device become empty ones elsewhere."""
        for entries in self.containers():
            if name not in entries:
                continue
            entry = entries[name]
            if isinstance(entry, nn.Module):
                if all(_is_at(parameter, device, dtype) for parameter in _parameters_of(entry)):
                    continue
                if device is not None and device.type != "meta" and any(p.is_meta for p in entry.parameters()):
                    entry.to_empty(device=device)
                elif any(True for _ in entry.parameters()) or any(True for _ in entry.buffers()):
                    entry.to(device=device, dtype=dtype)
            else:
                moved = _moved(entry.data, device, dtype)
                if moved is not entry.data:
                    entries[name] = (
                        type(entry)(moved, requires_grad=entry.requires_grad)
                        if isinstance(entry, nn.Parameter)
                        else moved
                    )

    def fill_in(self, name: str, config: Any, settings: dict[str, Any]) -> None:
        """Gives those tensors of an adapter that have no memory the values of a fresh adapter."""
        before = list(self.adapter_parameters(name))
        self.create(name, config, **settings)
        self.move(name, *place_of(self.get_base_layer()))
        for old, new in zip(before, self.adapter_parameters(name), strict=True):
            new.data = new.data.to(old.dtype) if old.is_meta else old.data
            new.requires_grad_(old.requires_grad)

    def adapter_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of one adapter."""
        parameters: list[nn.Parameter] = []
        for entries in self.containers():
            if name in entries:
                entry = entries[name]
                if isinstance(entry, nn.Module):
                    parameters += _parameters_of(entry)
                elif isinstance(entry, nn.Parameter):
                    parameters.append(entry)
        return parameters

    def trainable_parameters(self, name: str) -> Iterable[nn.Parameter]:
        """Those of them that training changes; all unless the method says otherwise."""
        return self.adapter_parameters(name)

    def key_map(self, name: str) -> dict[str, str]:
        """Names of an adapter's tensors below this layer: as files have them -> as the live module has them."""
        keys = {}
        for slot in self.adapter_layer_names:
            entries = getattr(self, slot)
            if name in entries:
                entry = entries[name]
                leaves = [f".{leaf}" for leaf in _state_names(entry)] if isinstance(entry, nn.Module) else [""]
                keys.update({f"{slot}{leaf}": f"{slot}.{name}{leaf}" for leaf in leaves})
        return keys

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
        """Whether the layer acts as its base module alone."""
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether some adapter is part of the base weight at present."""
        return bool(self.merged_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones, in this order; trainable unless `inference_mode`, the others not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self._active:
            if name not in names:
                self.set_requires_grad(name, False)
        for name in names:
            self.set_requires_grad(name, not inference_mode)
        self.__dict__["_active"] = names
        self._refresh()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            parameters = list(self.trainable_parameters(name))
            for parameter in parameters:
                parameter.requires_grad_(requires_grad)
            if self._trained_before_disable:  # what is said while they are disabled counts afterwards
                self._trained_before_disable = without(self._trained_before_disable, parameters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters of the layer on or off; what was trainable before is so again after."""
        if enabled == (not self._disable_adapters):
            return
        if enabled:
            for parameter in self._trained_before_disable:
                parameter.requires_grad_(True)
            self._trained_before_disable = []
            if self._merged_before_disable:
                merged, self._merged_before_disable = self._merged_before_disable, []
                self.merge(adapter_names=merged, own=self._merged_own)
        else:
            if self.merged:
                merged = list(self.merged_adapters)
                self.unmerge()
                self._merged_before_disable = merged
            self._trained_before_disable = [
                p for name in self.adapter_names() for p in self.adapter_parameters(name) if p.requires_grad
            ]
            for parameter in self._trained_before_disable:
                parameter.requires_grad_(False)
        self._disable_adapters = not enabled
        self._refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        A merged adapter is taken out of the base weight first.
        """
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            if others:
                self.merge(adapter_names=others, own=self._merged_own)
        self._merged_before_disable = [name for name in self._merged_before_disable if name != adapter_name]
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            entries = getattr(self, attribute)
            if adapter_name in entries:
                del entries[adapter_name]
        if adapter_name in self._active:
            self._active.remove(adapter_name)
            left = self.adapter_names()
            if not self._active and left:
                self.set_adapter(left[0])
        self._refresh()

    def _refresh(self) -> None:
        """Decides what the next forward passes do; called whenever the state changes."""
        live = [name for name in self._active if self.has(name) and name not in self.merged_adapters]
        self.__dict__["_live"] = live  # `cheap` may depend on it
        if self._disable_adapters or not live:
            mode = _RUN_BASE
        elif all(self.cheap(name) for name in live):
            mode = _RUN_CHAIN
        else:
            mode = _RUN_WEIGHT
        self.__dict__["_mode"] = mode

    def has(self, name: str) -> bool:
        """Whether adapter `name` is on this layer."""
        for entries in self.containers():  # noqa: SIM110 - asked of every layer in every change of state
            if name in entries:
                return True
        return False

    def has_any(self) -> bool:
        """Whether there is some adapter on this layer."""
        return any(len(entries) > 0 for entries in self.containers())

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the active adapters in effect; takes and returns what that takes and returns.

        `adapter_names`, one name per sample, gives each sample an adapter of its own.
        """
        if "adapter_names" in kwargs:
            names = kwargs.pop("adapter_names")
            if names is not None:
                return self._forward_routed(Route(names), x, *args, **kwargs)
        if self._route is not None:
            return self._forward_routed(self._route, x, *args, **kwargs)
        if self._mode == _RUN_CHAIN:
            return self._chain(self._live, x, *args, **kwargs)
        if self._mode == _RUN_BASE:
            return self.base_layer(x, *args, **kwargs)
        return self._run_with_weight(self._live, x, *args, **kwargs)

    def _chain(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapters one on top of the other, the first next to the base module."""
        if not names:
            return self.base_layer(x, *args, **kwargs)
        *before, last = names
        below = self.base_layer if not before else lambda x, *a, **k: self._chain(before, x, *a, **k)
        return self.adapt(last, below, x, *args, **kwargs)

    def _run_with_weight(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module run with the weight that the adapters make of its own."""
        base = self.get_base_layer()
        with onloaded(base):
            weight, bias = self.weight_to_run(names)
            if isinstance(self.op, ParameterOp) and self.base_layer is not base:
                # Another parameter of the module has an adapter too, so the layers below must run as well.
                path, layer = self.op.weight_name, self.base_layer
                while isinstance(layer, AdapterLayer):
                    path, layer = f"base_layer.{path}", layer.base_layer
                return torch.func.functional_call(self.base_layer, {path: weight}, (x, *args), kwargs)
            if x.is_floating_point() and weight.dtype != x.dtype and not is_plain(base, self.op.weight_name):
                # Packed weights have no dtype of their own to compute in.
                dtype = compute_dtype(x)
                weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
            return self.op.run(base, weight, bias, x, *args, **kwargs)

    def weight_to_run(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that the base module is to be run with: `effective`, or what stands for it."""
        return self.effective(names)

    def can_run_with_weight(self, below: Callable[..., Any], x: Tensor) -> bool:
        """Whether an adapter in place `below` may run as changed weight: nothing comes before it, and nothing is lost.

        In half precision, a change that is small beside the weight would be rounded away.
        """
        weight = self.weight
        return (
            below is self.base_layer
            and is_plain(self.get_base_layer(), self.op.weight_name)
            and weight.dtype.itemsize >= 4
            and compute_dtype(x) == weight.dtype
        )

    def effective(self, names: Sequence[str] | None = None, through: bool = True) -> tuple[Tensor, Tensor | None]:
        """Weight (in the module's shape) and bias as these adapters make them.

        They act on what the adapter layers below make of the base weight; without `through`, on the base weight.
        """
        names = self._live if names is None else names
        if through and isinstance(self.base_layer, AdapterLayer) and not isinstance(self.op, ParameterOp):
            below = self.base_layer
            native, bias = below.effective(None if below._mode != _RUN_BASE else [])
        else:
            native, bias = self.get_base_weight(), self.get_base_bias()
        matrix = self.op.matrix(native)
        for name in names:
            dtype = self.dtype_of(name)
            matrix = self.transform(name, matrix.to(dtype) if dtype is not None and dtype != matrix.dtype else matrix)
            bias = self.transform_bias(name, bias)
        if bias is not None and bias.dtype != native.dtype:
            bias = bias.to(native.dtype)
        return self.op.unmatrix(matrix, native).to(native.dtype), bias

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype that an adapter is kept in, if its parameters have one."""
        return next((p.dtype for p in self.adapter_parameters(name)), None)

    def route(self, route: Route | None) -> None:
        """Sets which adapter each sample of the next forward passes gets; None ends it."""
        self._route = route

    def _forward_routed(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the samples of each adapter with that adapter."""
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        dim = self.op.batch_dim
        rows = x.shape[dim]
        groups = route.groups(rows, x.device, self.op.rounds)
        here = [(name, index) for name, index in groups if name != BASE and self.has(name)]
        if not here:
            return self.base_layer(x, *args, **kwargs)
        if len(groups) == 1:
            return self._run(groups[0][0], x, *args, **kwargs)
        if type(self).add is not AdapterLayer.add and all(self.cheap(name) for name, _ in here):
            # Additive: the base module runs once over all samples.
            return self.add_routed(route, here, x, self.base_layer(x, *args, **kwargs))
        parts = []
        for name, index in groups:
            some_args, some_kwargs = self.op.select(index, rows, (x, *args), kwargs)
            parts.append((index, self._run(name, *some_args, **some_kwargs)))
        return join_rows(parts, dim, rows)

    def add_routed(self, route: Route, groups: Sequence[tuple[str, Tensor]], x: Tensor, result: Tensor) -> Tensor:
        """`result` with each sample's adapter added, for additive methods; `groups` are adapters and their samples."""
        dim, result = self.op.batch_dim, result.clone()
        for name, index in groups:
            changed = self.add(name, x.index_select(dim, index), result.index_select(dim, index))
            result.index_copy_(dim, index, changed.to(result.dtype))
        return result

    def _run(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All of `x` with one adapter, or with none."""
        names = [name] if name != BASE and self.has(name) else []
        with self._below_with(name, names):
            if not names:
                return self.base_layer(x, *args, **kwargs)
            run = self._chain if self.cheap(name) else self._run_with_weight
            return run(names, x, *args, **kwargs)

    @contextmanager
    def _below_with(self, name: str, names: list[str]) -> Iterator[None]:
        """While it lasts, the layers underneath give all samples adapter `name`, as this one does.

        Args:
            name: the adapter's name, or the one that stands for none.
            names: it, if it is on this layer.
        """
        below = self.base_layer
        inner = [child for child in below.children() if isinstance(child, AdapterLayer) and child.is_read]
        before = [(child._live, child._mode) for child in inner]
        for child in inner:
            child._live, child._mode = names, _RUN_WEIGHT if names else _RUN_BASE
        route = below._route if isinstance(below, AdapterLayer) else None
        if isinstance(below, AdapterLayer) and route is not None:
            below._route = Route([name])
        try:
            yield
        finally:
            for child, (live, mode) in zip(inner, before, strict=True):
                child._live, child._mode = live, mode
            if isinstance(below, AdapterLayer):
                below._route = route

    # ---- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What adapter `adapter` changes the base weight by, in the module's shape and dtype."""
        with onloaded(self.get_base_layer()), self._without_dropout():
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

    def merged_weight(self, names: Sequence[str], safe: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with these adapters, as merging writes them.

        Raises:
            ValueError: `safe`, and they would not be finite.
        """
        with torch.no_grad(), self._without_dropout():
            weight, bias = self.merged_tensors(names)
        if safe and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(
                f"NaN or infinite values would be merged by adapter {', '.join(names)}; the weights are left"
                " as they are."
            )
        return weight, bias

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What `merged_weight` checks; for methods that need not make whole matrices on the way."""
        return self.effective(names, through=False)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """While it lasts, the change of the weight is what it is in evaluation."""
        training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = training

    def names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Which adapters of this layer a merge of `adapter_names` (None: of the active ones) concerns."""
        wanted = self._active if adapter_names is None else adapter_names
        names = [name for name in wanted if self.has(name)]
        merged = [name for name in names if name in self.merged_adapters]
        if merged:
            warnings.warn(f"Adapter {', '.join(merged)} is merged already.", PeftWarning, stacklevel=3)
        names = [name for name in names if name not in merged]
        for name in names:
            self.check_mergeable(name)
        return names

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
        if not names:
            return
        base = self.get_base_layer()
        with onloaded(base):
            weight, bias = self.merged_weight(names, safe_merge)
            self._write(self.op.weight_name, weight, keep, own)
            if bias is not None and bias is not self.get_base_bias():
                self._write(self.op.bias_name or "", bias, keep, own)
        self.merged_adapters.extend(names)
        self._merged_own = own
        self._refresh()

    def _write(self, name: str, value: Tensor, keep: bool, own: bool) -> None:
        base = self.get_base_layer()
        before = storage_of(base, name).write(base, name, value, own)
        if keep:
            self._before_merge.setdefault(name, before)

    def unmerge(self) -> None:
        """Gives the base weight back as it was before merging, bit for bit."""
        if not self.merged and not self._merged_before_disable:
            warnings.warn("Already unmerged: nothing to do.", PeftWarning, stacklevel=2)
            return
        self._merged_before_disable = []
        base = self.get_base_layer()
        with onloaded(base):
            for name, before in self._before_merge.items():
                storage_of(base, name).restore(base, name, before)
        self._before_merge = {}
        self.merged_adapters = []
        self._refresh()

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        base = self.get_base_layer()
        return sum(storage_of(base, name).nbytes(before) for name, before in self._before_merge.items())

    # ---- what status shows

    @property
    def type_name(self) -> str:
        """What status calls this kind of layer."""
        return f"{self.label}.{self.op.kind}" if self.label else type(self).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, self.type_name, 1)


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """`module.parameters()`, without a walk where there is nothing to walk through."""
    own = module._parameters.values() if not module._modules else module.parameters()
    return [parameter for parameter in own if parameter is not None]


def _state_names(module: nn.Module) -> Iterable[str]:
    """The keys of `module.state_dict()`, without making one where a plain linear layer has nothing else in it."""
    if type(module) is nn.Linear and not module._state_dict_hooks and not module._modules and not module._buffers:
        return [name for name, parameter in module._parameters.items() if parameter is not None]
    return [name for name, value in module.state_dict().items() if isinstance(value, Tensor)]


def without(parameters: Iterable[nn.Parameter], those: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """`parameters` without `those`; by identity, for tensors compare by value."""
    left_out = {id(parameter) for parameter in those}
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def is_watched(module: nn.Module) -> bool:
    """Whether hooks on a module see what goes in and out, so that it has to be called."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _is_frozen_dense(module: Any) -> bool:
    """Whether a base module is a linear layer that may be computed here rather than called."""
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    if is_watched(module) or "forward" in module.__dict__ or module.weight.requires_grad:
        return False
    return type(module.weight) is nn.Parameter and (module.bias is None or not module.bias.requires_grad)


def _is_at(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    return (device is None or tensor.device == device) and (dtype is None or tensor.dtype == dtype)


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else None  # indices stay what they are
    if tensor.is_meta and device is not None and device.type != "meta":
        return torch.empty_like(tensor, device=device, dtype=dtype)
    return tensor.to(device=device, dtype=dtype)
