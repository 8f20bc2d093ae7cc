"""A model with adapters: their life over all its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core import injection, unloading
from peft.core.around import is_read
from peft.core.base_op import AttentionOp
from peft.core.biases import check_mixture
from peft.core.call import calling, current, remember_for_backward
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.part import Part, as_names
from peft.core.routing import BASE, Route, without_samples
from peft.core.targets import check_target_module_exists, has_default_targets
from peft.core.walk import model_config_of, parts_of
from peft.core.watch import watch_anew
from peft.core.whole import whole
from peft.errors import PeftWarning

#: dtypes that adapters are not trained in
UPCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


class BaseTuner(nn.Module):
    """A model with adapters on its layers; what is special about their method is asked of a [`Method`].

    Args:
        model: the base model, changed in place.
        peft_config: the configuration of the first adapter, or configurations by name.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make the adapter's tensors without memory (on the meta device), to be loaded next.
        state_dict: an adapter's tensors; their names decide which modules get the adapter.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.

    Raises:
        ValueError, TypeError, NotImplementedError: the configuration does not fit the model; the model is as before.
    """

    #: beginning of the names of the method's tensors
    prefix: ClassVar[str] = ""
    #: the layer of the method
    layer_class: ClassVar[type[AdapterLayer]] = AdapterLayer
    #: what the method says about a whole model
    method_class: ClassVar[type[Method]] = Method
    #: path from this object to the base model
    holder: ClassVar[str] = "model"

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ):
        super().__init__()
        self.hold(model)
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.peft_config: dict[str, Any] = {}
        self._parts: list[tuple[str, Part]] | None = None
        record = getattr(model, "peft_config", None)
        if record is not None and not isinstance(record, PeftConfig):
            # A model that carries injected adapters keeps its own record of them.
            self.peft_config = record
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        #: PEFT type -> what its method says
        self._methods: dict[str, Method] = {}
        self._stays = isinstance(peft_config, dict)  # one that is made for an injection is thrown away
        if configs.get(adapter_name) is not None:
            config = configs[adapter_name]
            self.inject_adapter(
                self.model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict, config=config
            )

    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> Any:
        return check_target_module_exists(config, key)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dictionary; of type "custom" where it has none."""
        return model_config_of(model) or {"model_type": "custom"}

    def hold(self, model: nn.Module) -> None:
        """Takes in the base model."""
        self.model = model

    # ---- what its method says

    def method(self, config: Any) -> Method:
        """The method of an adapter with this configuration."""
        if not self._methods:
            self._methods[""] = self.method_class(self, self.layer_class, self.prefix)
        return self._methods[""]

    def methods(self) -> list[Method]:
        """The methods of all adapters."""
        return [self.method(config) for config in self.peft_config.values()] and list(self._methods.values())

    # ---- adding an adapter

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        config: Any = None,
    ) -> None:
        """Adds an adapter: plans, checks, and only then changes the model.

        Args:
            model: the base model.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
            low_cpu_mem_usage: make tensors on the meta device.
            state_dict: tensors whose names decide which modules get the adapter.
            config: its configuration; `self.peft_config[adapter_name]` if None.
        """
        config = config or self.peft_config[adapter_name]
        # Some packages replace it, for kinds of modules of their own.
        any_kind = type(self)._create_and_replace is not _CREATE_AND_REPLACE
        injection.inject(
            self, model, adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict, any_kind
        )

    def _prepare_adapter_config(self, config: Any, model_config: dict[str, Any]) -> Any:
        """Fills in the defaults for the model type."""
        method = self.method(config)
        known = has_default_targets(config.peft_type, model_config.get("model_type"))
        if config.target_modules is None and getattr(config, "target_parameters", None) and not known:
            config.target_modules = set()
        elif config.target_modules is None:
            method.choose_targets(config, model_config)
            config._targets_are_defaults = True
        method.complete_config(config, model_config)
        return config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts an adapter on one module: on the layer of this method that is there, or on a new one around it."""
        named = current_key if parameter_name is None else f"{current_key}.{parameter_name}"
        method = self.method(peft_config)
        settings = method.layer_settings(peft_config, named)
        layer = self._find_layer(target, parameter_name, method.layer_class)
        if layer is None:
            layer = method.make_layer(peft_config, target, parameter_name, current_key)
            layer.share(method.shared)
            layer.without_samples, layer.is_read = without_samples(current_key), is_read(self.model, current_key)
            self._replace_module(parent, target_name, layer, target)
        planned = method.planned.get((id(layer.get_base_layer()), parameter_name))
        method.add(layer, adapter_name, peft_config, planned, settings)
        if isinstance(layer.op, AttentionOp):
            # Its output projection is a module that is read, not called, and gets a layer of its own. What the
            # configuration says of the attention module (a rank, say) holds for both.
            attention: Any = layer.get_base_layer()
            self._create_and_replace(
                peft_config, adapter_name, attention.out_proj, "out_proj", attention, current_key=current_key
            )
            attention.out_proj.is_read = attention.out_proj.with_attention = True

    def _find_layer(
        self, module: nn.Module, parameter_name: str | None, kind: type[AdapterLayer]
    ) -> AdapterLayer | None:
        """The layer of a method among those that wrap a module."""
        while isinstance(module, AdapterLayer):
            if isinstance(module, kind) and module.parameter_name == parameter_name:
                return module
            module = module.base_layer
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts `new_module`, which wraps `child`, in its place."""
        new_module.__dict__["training"] = child.training  # it has no adapters yet, and `train()` would walk through it
        setattr(parent, child_name, new_module)

    def fill_in(self, adapter_name: str) -> None:
        """Gives tensors of an adapter that are still without memory the values of a fresh adapter."""
        injection.fill_in(self, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Brings an adapter to the dtype it is trained in: its base weight's, but float32 in place of halves."""
        shared: torch.dtype | None = None  # what layers share is as in the first of them
        for _, part in self.parts():
            if isinstance(part, AdapterLayer) and part.has(adapter_name):
                _, dtype = part.place()
                if autocast_adapter_dtype and dtype in UPCAST_DTYPES:
                    dtype = torch.float32
                shared = shared or dtype
                if dtype is not None and part.dtype_of(adapter_name) != dtype:
                    part.move(adapter_name, dtype=dtype)
        for method in self._methods.values():
            method.cast_shared(adapter_name, shared)

    # ---- adapters and their state

    def parts(self) -> list[tuple[str, Part]]:
        """Adapter layers and trained modules of the model by name; found once and remembered."""
        if self._parts is None:
            self._parts = parts_of(self.model)
        return self._parts

    def layers(self) -> Iterator[AdapterLayer]:
        """The adapter layers, outer ones before what they wrap."""
        return (part for _, part in self.parts() if isinstance(part, AdapterLayer))

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(getattr(self, "_active", ()))

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def check_names(self, names: str | Sequence[str]) -> list[str]:
        """`names` as a list.

        Raises:
            ValueError: some adapter does not exist.
        """
        names = as_names(names)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            there_are = ", ".join(self.peft_config) or "none"
            raise ValueError(f"Adapter {', '.join(missing)} not found; there are {there_are}.")
        return names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones; trainable unless `inference_mode`, all others not.

        Raises:
            ValueError: none is named or one does not exist, or two of them train the same module in full.
        """
        names = self.check_names(adapter_name)
        if not names:
            raise ValueError("set_adapter() needs the name of an adapter; disable_adapter() does without any.")
        parts = [part for _, part in self.parts()]
        for part in parts:
            part.check_active(names)
        with whole(self, names):
            for part in parts:
                part.set_adapter(names, inference_mode)
            self._active = names
        watch_anew(self)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not."""
        names = self.check_names(adapter_names)
        for _, part in self.parts():
            part.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on again; what was trainable before is so again."""
        self._switch(True)

    def disable_adapter_layers(self) -> None:
        """Lets the model act as its base model; keeps which adapters were active and trainable."""
        self._switch(False)

    def _switch(self, on: bool) -> None:
        with whole(self, ()):
            for _, part in self.parts():
                part.enable_adapters(on)

    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off."""
        return any(part.disable_adapters for _, part in self.parts())

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"Adapter {adapter_name!r} does not exist; there are {', '.join(self.peft_config) or 'none'}."
            )
        with whole(self, deleting=True):
            unloading.delete(self, adapter_name)
        self.__dict__.pop("_watches", None)  # another of this name may come

    def forget_shared(self, method: Method, adapter_name: str) -> None:
        """Removes what the layers of an adapter share."""
        containers: list[Any] = list(method.shared.values())
        for container in containers:
            if adapter_name in container:
                del container[adapter_name]

    @contextmanager
    def routed(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """While it lasts, each sample of a batch gets the adapter named at its place (`"__base__"`: none).

        Raises:
            ValueError: a name is unknown, or adapters are merged.
        """
        if adapter_names is None:
            yield
            return
        self.check_names([name for name in dict.fromkeys(adapter_names) if name != BASE])
        check_mixture(self.parts(), {*adapter_names, *self.active_adapters})
        with calling(route=Route(adapter_names)):
            yield

    # ---- merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Makes adapters (the active ones if None) part of the base weights; `unmerge_adapter` undoes it bit for bit.

        For that, the original of every merged weight is kept: as much memory again as those weights take
        (`merge_memory()` says how much). A call that raises leaves all weights as they were.

        Raises:
            ValueError: `safe_merge`, and some weight would not be finite.
            NotImplementedError: some adapter cannot be merged.
        """
        self._check_merge(adapter_names)
        if self.disabled:
            warnings.warn(
                "The adapters are disabled, and merged all the same: until they are unmerged, the model does not act as"
                " its base model.",
                PeftWarning,
                stacklevel=2,
            )
        unloading.merge_all(self, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Gives the base weights back as they were before merging, bit for bit."""
        with whole(self, ()):
            unloading.unmerge_all(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether [`convert_to_lora`] can turn an adapter into a LoRA: all its changes are changes of weights."""
        layers = [layer for layer in self.layers() if layer.has(adapter_name)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        return sum(layer.merge_memory() for layer in self.layers())

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        unloading.check_merge(self, adapter_names)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Makes adapters part of the base weights for good and gives the base model back, without adapter layers.

        Args:
            progressbar: show one.
            safe_merge: check first that all outcomes are finite.
            adapter_names: which; the active ones if None.

        Raises:
            ValueError: `safe_merge`, and some weight would not be finite.
            NotImplementedError: some adapter cannot be merged.
        """
        self._check_merge(adapter_names)
        if safe_merge:
            unloading.check_finite(self, adapter_names)
        return self._unload_and_optionally_merge(merge=True, progressbar=progressbar, adapter_names=adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapter layers; merged adapters are taken out first."""
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()
        return self._unload_and_optionally_merge(merge=False)

    _unload_and_optionally_merge = unloading.unload

    # ---- being the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with calling():
            return self._forward(self.methods(), args, kwargs)

    def _forward(self, methods: Sequence[Method], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output inside of what these methods put around it."""
        if methods:
            with methods[0].around_forward(args, kwargs):
                return methods[0].after_forward(self._forward(methods[1:], args, kwargs))
        watch, call = self.__dict__.get("_watch"), current()
        output = self.model(*args, **kwargs) if watch is None else watch.run(self, args, kwargs)
        if call and torch.is_grad_enabled():
            remember_for_backward(output, call)
        return output

    @contextmanager
    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """Stands around a generation, which is many forward passes."""
        with ExitStack() as stack:
            for method in self.methods():
                stack.enter_context(method.around_generate(args, kwargs))
            yield

    def key_map(self, adapter_name: str) -> dict[str, str]:
        """Names of tensors that layers of an adapter share: as files have them -> as this object has them."""
        config = self.peft_config[adapter_name]
        return self.method(config).key_map(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_methods", "peft_config") or "_modules" not in self.__dict__:
                raise
        if not name.startswith("_"):
            for method in self.__dict__.get("_methods", {}).values():
                if hasattr(method, name):
                    return getattr(method, name)
        return getattr(self.model, name)


_CREATE_AND_REPLACE = BaseTuner._create_and_replace
