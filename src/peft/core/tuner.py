"""Plans applied to a model, and the life of adapters over all its layers."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core.auxiliary import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensLayer,
    save_modules,
)
from peft.core.base_op import AttentionOp
from peft.core.layer import AdapterLayer
from peft.core.plan import (
    ALL_LINEAR,
    Plan,
    all_linear,
    default_targets,
    make_plan,
    state_dict_targets,
    target_name,
)
from peft.core.routing import BASE, Route
from peft.core.tokens import token_rows, train_tokens
from peft.core.tying import tie_configuration, tied_embedding_modules, warn_of_tied_targets
from peft.errors import PeftWarning

Part = AdapterLayer | AuxiliaryTrainingWrapper
#: dtypes that adapters are not trained in
UPCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


#: while adapters are added and then filled: what takes those added back out
_UNDO: ContextVar[ExitStack | None] = ContextVar("_UNDO", default=None)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Takes the adapters that are added while it lasts back out if it ends by an error."""
    with ExitStack() as undo:
        token = _UNDO.set(undo)
        try:
            yield
        finally:
            _UNDO.reset(token)
        hand_over(undo)


@contextmanager
def undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` if it ends by an error, or if [`all_or_nothing`] around it does."""
    with ExitStack() as stack:
        stack.callback(undo)
        yield
        hand_over(stack)


def hand_over(undo: ExitStack) -> None:
    """What `undo` would have done is not needed any more, unless [`all_or_nothing`] around it ends by an error."""
    kept, later = undo.pop_all(), _UNDO.get()
    if later is not None:
        later.push(kept)


def parts_of(model: nn.Module) -> list[tuple[str, Part]]:
    """All adapter layers and trained modules in a model by name, outer ones before what they wrap."""
    return [
        (name, module)
        for name, module in live_modules(model)
        if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper))
    ]


def live_modules(model: nn.Module, copies: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without what adapters are made of; without `copies`, also without modules trained in full.

    So the walk takes as long with a hundred adapters as with none.
    """
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = module._modules
        if isinstance(module, AdapterLayer):
            children = {"base_layer": module.base_layer}
        elif isinstance(module, ModulesToSaveWrapper) and not copies:
            children = {"original_module": module.original_module}
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the base model by name; those that several modules hold come several times."""
    for path, module in live_modules(model, copies=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}", parameter


def check_active(parts: Iterable[Part], names: Sequence[str]) -> None:
    """Raises ValueError where these adapters cannot be active together."""
    for part in parts:
        if isinstance(part, AuxiliaryTrainingWrapper):
            part.check_active(names)


def model_config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as a dictionary; empty where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    return config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, dict) else {}


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name in the parent) of the module called `key`."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


class BaseTuner(nn.Module):
    """A model with adapters of one method on its layers.

    Args:
        model: the base model, changed in place.
        peft_config: the configuration of the first adapter, or configurations by name.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make the adapter's tensors without memory (on the meta device), to be loaded next.
        state_dict: an adapter's tensors; their names decide which modules get the adapter.

    Raises:
        ValueError, TypeError, NotImplementedError: the configuration does not fit the model; the model is as before.
    """

    #: beginning of the names of the method's tensors
    prefix: str = ""
    #: the layer of the method
    layer_class: ClassVar[type[AdapterLayer]] = AdapterLayer
    #: containers on this object that hold tensors which all layers of an adapter share
    shared_names: tuple[str, ...] = ()
    #: whether merging for good also takes off the wrappers of modules that are trained in full
    unwraps_saved: ClassVar[bool] = True
    #: path from this object to the base model
    holder: ClassVar[str] = "model"
    #: whether a model outside `PeftModel` can hold the method (its shared tensors need a place to live)
    injectable: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
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
        self.prepare_shared()
        if configs.get(adapter_name) is not None:
            self.inject_adapter(
                self.model,
                adapter_name,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
                config=configs[adapter_name],
            )

    # ---- what a method may write

    def hold(self, model: nn.Module) -> None:
        """Takes in the base model."""
        self.model = model

    def members(self, adapter_name: str, config: Any) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """The saved adapters that a new adapter is made of, which are loaded before it.

        Returns:
            Name of each -> where to look for it, in that order: (folder or repository, options of loading).

        Raises:
            ValueError: the new adapter does not fit the model.
        """
        return {}

    def owner(self, adapter_name: str) -> str | None:
        """The adapter that this one is a member of; it is saved in a subfolder of that one's folder."""
        return None

    def prepare_shared(self) -> None:
        """Makes the containers of shared tensors; called once."""

    def complete_config(self, config: Any, model_config: dict[str, Any]) -> None:
        """Fills in what a configuration leaves open, beside its targets."""

    def check_config(self, adapter_name: str, config: Any) -> None:
        """Raises ValueError where an adapter does not go together with those that are there."""

    @classmethod
    def start_is_replaceable(cls, config: Any) -> bool:
        """Whether loading may leave out an adapter's start: it may not where that changes the base model."""
        return True

    def prepare(self, plan: Plan, config: Any, adapter_name: str) -> None:
        """Makes what the layers of an adapter share; called when the plan is settled, before the first layer."""

    def layer_settings(self, config: Any, key: str) -> dict[str, Any]:
        """What the adapter on module (or parameter) `key` gets beyond the configuration (a rank of its own, say)."""
        return {}

    def make_layer(self, config: Any, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        """A layer of the method around `target`, without adapters yet."""
        return self.layer_class(target, parameter_name)

    def tie(self, layer: AdapterLayer, to: AdapterLayer, adapter_name: str) -> None:
        """Makes an adapter on one module the same as that on the module it shares its weight with."""
        raise ValueError(
            f"{type(self).__name__} cannot keep the adapters of tied modules the same (ensure_weight_tying)."
        )

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
        check_adapter_name(adapter_name)
        with _no_garbage_collection(), ExitStack() as undo:
            undo.callback(_put_back, config, dict(config.__dict__))
            config = self._prepare_adapter_config(config, model_config_of(model))
            self._check_new_adapter_config(config, adapter_name)
            if config.target_modules == ALL_LINEAR:
                config.target_modules = all_linear(model, config.modules_to_save or ())
            low_cpu_mem_usage = low_cpu_mem_usage and self.start_is_replaceable(config)
            restructured = self._prepare_model(config, model)
            if restructured is not None:
                undo.callback(restructured)
            also_target, also_save = tie_configuration(config, model)
            only = state_dict_targets(state_dict, self.prefix) if state_dict is not None else None
            plan = make_plan(model, config, self.layer_class, only=only, also_target=also_target, also_save=also_save)
            tokens = token_rows(config, model)
            warn_of_tied_targets(plan.module_names, config, model)
            before, disabled = Before(self, model), self.disabled
            undo.callback(self._undo, model, adapter_name, before)
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                self.prepare(plan, config, adapter_name)
                for target in plan.targets:
                    parent, name = target.parent, target.child
                    module = getattr(parent, name) if name else parent  # a layer by now, if it was a target before
                    extra = {} if target.parameter_name is None else {"parameter_name": target.parameter_name}
                    self._create_and_replace(
                        config, adapter_name, module, name, parent, current_key=target.key, **extra
                    )
                tied = tied_embedding_modules(model) if getattr(config, "ensure_weight_tying", False) else []
                save_modules(model, plan.save, adapter_name, tied)
                train_tokens(model, adapter_name, tokens)
            self._parts = None
            self.targeted_module_names = list(dict.fromkeys(self.targeted_module_names + plan.module_names))
            self.targeted_parameter_names = list(dict.fromkeys(self.targeted_parameter_names + plan.parameter_names))
            self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            self._tie_layers(model, tied, adapter_name)
            self.peft_config[adapter_name] = config
            self._mark_only_adapters_as_trainable(model)
            if not self.active_adapters:
                self.set_adapter(adapter_name, inference_mode=config.inference_mode)
            old = {id(part) for _, part in before.parts}
            for part in (part for _, part in self.parts() if id(part) not in old):
                part.set_adapter(self.active_adapters, config.inference_mode)
                part.enable_adapters(not disabled)
            model.peft_config = self.peft_config  # type: ignore[assignment]
            for layer in self.layers():
                changed = layer.settle(adapter_name)
                if changed is not None:
                    undo.callback(layer.unsettle, changed)
            hand_over(undo)

    def _undo(self, model: nn.Module, adapter_name: str, before: Before) -> None:
        """Takes an adapter that could not be added back out."""
        old = {id(part) for _, part in before.parts}
        self._parts = None
        for key, part in reversed(self.parts()):
            if id(part) in old:
                part.delete_adapter(adapter_name)
            elif key.rpartition(".")[2] != "token_adapter":
                parent, _, name = get_submodules(model, key)
                setattr(parent, name, part.base_layer if isinstance(part, AdapterLayer) else part.original_module)
        for container in self.shared_names:
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        self._parts = None
        self.peft_config.pop(adapter_name, None)
        before.restore(self, model)

    def _prepare_adapter_config(self, config: Any, model_config: dict[str, Any]) -> Any:
        """Fills in the defaults for the model type."""
        if config.target_modules is None and not getattr(config, "target_parameters", None):
            config.target_modules = default_targets(config.peft_type, model_config.get("model_type"), self.model)
            config._targets_are_defaults = True
        self.complete_config(config, model_config)
        return config

    def _check_new_adapter_config(self, config: Any, adapter_name: str | None = None) -> None:
        """Raises where an adapter does not go together with those that are there."""
        bias = getattr(config, "bias", "none")
        own = f"{self.prefix.rstrip('_').split('_')[0]}_only"
        if bias not in ("none", "all", own):
            raise NotImplementedError(f"bias={bias!r} is not known; use 'none', 'all' or {own!r}.")
        others = [name for name in self.peft_config if name != adapter_name]
        if bias != "none" and others:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias; {', '.join(others)} is there"
                " already. Set bias to"
                " 'none' for all adapters."
            )
        for name in others:
            if getattr(self.peft_config[name], "bias", "none") != "none":
                raise ValueError(
                    f"{type(self).__name__} supports only 1 adapter with bias, and {name!r} trains biases already."
                )
        self.check_config(adapter_name or "", config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> Callable[[], None] | None:
        """Changes the model's own structure before it gets adapters, where a configuration asks for it.

        Returns what undoes that.
        """
        return None

    def _live_key(self, model: nn.Module, key: str) -> str:
        """The name that the module `key` of the plain model has now, adapter layers on its way counted in."""
        if not self.parts():
            return key
        module, path = model, []
        for name in key.split(".") if key else ():
            while isinstance(module, AdapterLayer):
                module = module.base_layer
                path.append("base_layer")
            module = getattr(module, name)
            path.append(name)
        return ".".join(path)

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
        settings = self.layer_settings(peft_config, named)
        layer = self._find_layer(target, parameter_name)
        if layer is None:
            layer = self.make_layer(peft_config, target, parameter_name, current_key)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(adapter_name, peft_config, **settings)
        if isinstance(layer.op, AttentionOp):
            # Its output projection is a module that is read, not called, and gets a layer of its own. What the
            # configuration says of the attention module (a rank, say) holds for both.
            attention: Any = layer.get_base_layer()
            self._create_and_replace(
                peft_config, adapter_name, attention.out_proj, "out_proj", attention, current_key=current_key
            )
            attention.out_proj.is_read = True

    def _find_layer(self, module: nn.Module, parameter_name: str | None) -> AdapterLayer | None:
        """The layer of this method among those that wrap a module."""
        while isinstance(module, AdapterLayer):
            if isinstance(module, self.layer_class) and module.parameter_name == parameter_name:
                return module
            module = module.base_layer
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts `new_module`, which wraps `child`, in its place."""
        new_module.__dict__["training"] = child.training  # it has no adapters yet, and `train()` would walk through it
        setattr(parent, child_name, new_module)

    def _tie_layers(self, model: nn.Module, keys: Sequence[str], adapter_name: str) -> None:
        layers = [self._find_layer(model.get_submodule(self._live_key(model, key)), None) for key in keys]
        here = [layer for layer in layers if layer is not None and layer.has(adapter_name)]
        for layer in here[1:]:
            self.tie(layer, here[0], adapter_name)

    def fill_in(self, adapter_name: str) -> None:
        """Gives tensors of an adapter that are still without memory the values of a fresh adapter."""
        for key, part in self.parts():
            if not isinstance(part, AdapterLayer) or not part.has(adapter_name):
                continue
            if any(parameter.is_meta for parameter in part.adapter_parameters(adapter_name)):
                config = self.peft_config[adapter_name]
                part.fill_in(adapter_name, config, self.layer_settings(config, target_name(key, part)))
        if getattr(self.peft_config[adapter_name], "ensure_weight_tying", False):
            self._tie_layers(self.model, tied_embedding_modules(self.model), adapter_name)

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file, of whatever version, by the names that this one has for them.

        Where an adapter is of a size that only its file tells, it gets that size here.

        Raises:
            ValueError: the file is too old to be read.
        """
        return tensors

    @classmethod
    def write_tensors(cls, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's tensors as files have them, where that is not as they are; what `read_tensors` reads."""
        return tensors

    def without_start(
        self, adapter_name: str, tensors: dict[str, Tensor], content: dict[str, Any], initial: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An adapter that works on the original base model, where its initialisation changed the base weights.

        Args:
            adapter_name: the adapter's name.
            tensors, content: the adapter and its configuration, as they would be saved.
            initial: the adapter's tensors before training.

        Raises:
            ValueError: the initialisation changes nothing, so there is nothing to convert.
        """
        raise ValueError(
            "path_initial_model_for_weight_conversion is for initialisations that change the base weights;"
            " that of adapter"
            f" {adapter_name!r} does not. Save without it."
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Brings an adapter to the dtype it is trained in: its base weight's, but float32 in place of halves."""
        for _, part in self.parts():
            if isinstance(part, AdapterLayer) and part.has(adapter_name):
                _, dtype = part.place()
                if autocast_adapter_dtype and dtype in UPCAST_DTYPES:
                    dtype = torch.float32
                if dtype is not None and part.dtype_of(adapter_name) != dtype:
                    part.move(adapter_name, dtype=dtype)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes the base model; trains the biases that the configurations ask for."""
        for _, parameter in base_parameters(model):
            parameter.requires_grad = False
        for config in self.peft_config.values():
            bias = getattr(config, "bias", "none")
            if bias == "all":
                saved = [part for _, part in self.parts() if isinstance(part, ModulesToSaveWrapper)]
                originals = {id(p) for part in saved for p in part.original_module.parameters()}
                for name, parameter in base_parameters(model):
                    if name.endswith("bias") and id(parameter) not in originals:
                        parameter.requires_grad = True
            elif bias != "none":
                for _, part in self.parts():
                    if isinstance(part, self.layer_class) and part.bias is not None:
                        part.bias.requires_grad = True

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

    def check_names(self, names: str | Sequence[str], error: type[Exception] = ValueError) -> list[str]:
        """`names` as a list.

        Raises:
            ValueError: some adapter does not exist.
        """
        names = [names] if isinstance(names, str) else list(names)
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            raise error(f"Adapter {', '.join(missing)} not found; there are {', '.join(self.peft_config) or 'none'}.")
        return names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones; trainable unless `inference_mode`, all others not.

        Raises:
            ValueError: an adapter does not exist, or two of them train the same module in full.
        """
        names = self.check_names(adapter_name)
        parts = [part for _, part in self.parts()]
        check_active(parts, names)
        for part in parts:
            part.set_adapter(names, inference_mode)
        self._active = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not."""
        names = self.check_names(adapter_names)
        for _, part in self.parts():
            part.set_requires_grad(names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on again; what was trainable before is so again."""
        for _, part in self.parts():
            part.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Lets the model act as its base model; keeps which adapters were active and trainable."""
        for _, part in self.parts():
            part.enable_adapters(False)

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
        del self.peft_config[adapter_name]
        active = self.active_adapters
        left = [name for name in active if name != adapter_name]
        gone = not left
        if gone and self.peft_config:
            left = [next(iter(self.peft_config))]
            if active:
                saved = (part for _, part in self.parts() if isinstance(part, AuxiliaryTrainingWrapper))
                in_full = any(part.has(left[0]) for part in saved)
                more = f" What it trains in full is not: call set_adapter({left[0]!r})." if in_full else ""
                warnings.warn(
                    f"Adapter {adapter_name!r} was active; {left[0]!r} is now.{more}", PeftWarning, stacklevel=2
                )
        for _, part in self.parts():
            part.delete_adapter(adapter_name)
            if gone and isinstance(part, AdapterLayer) and part.has_any():
                part.set_adapter(left)
        for container in self.shared_names:
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        self._active = left

    @contextmanager
    def routed(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """While it lasts, each sample of a batch gets the adapter named at its place (`"__base__"`: none).

        Raises:
            ValueError: a name is unknown, adapters are merged, or the model is in training mode.
        """
        if adapter_names is None:
            yield
            return
        self.check_names([name for name in dict.fromkeys(adapter_names) if name != BASE])
        if self.training:
            raise ValueError("adapter_names (mixed batches) cannot be used in training mode; call model.eval() first.")
        if any(part.merged_adapters for _, part in self.parts()):
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")
        route = Route(adapter_names)
        for _, part in self.parts():
            part.route(route)
        try:
            yield
        finally:
            for _, part in self.parts():
                part.route(None)

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
        done: list[tuple[AdapterLayer, list[str]]] = []
        shared = self._shared_weights()
        try:
            # Inner layers first: what they make of the weight is what the outer ones change.
            for layer in reversed(list(self.layers())):
                before = list(layer.merged_adapters)
                layer.merge(safe_merge, adapter_names, own=layer._merged_own or self._is_shared(layer, shared))
                if layer.merged_adapters != before:
                    done.append((layer, before))
        except Exception:
            for layer, before in reversed(done):
                own = layer._merged_own
                layer.unmerge()
                if before:
                    layer.merge(adapter_names=before, own=own)
            raise

    def unmerge_adapter(self) -> None:
        """Gives the base weights back as they were before merging, bit for bit."""
        merged = [layer for layer in self.layers() if layer.merged or layer._merged_before_disable]
        if not merged:
            warnings.warn("No adapter is merged: nothing to do.", PeftWarning, stacklevel=2)
        for layer in merged:
            layer.unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether [`convert_to_lora`] can turn an adapter into a LoRA: all its changes are changes of weights."""
        layers = [layer for layer in self.layers() if layer.has(adapter_name)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def merge_memory(self) -> int:
        """Bytes kept to undo the present merge."""
        return sum(layer.merge_memory() for layer in self.layers())

    def _shared_weights(self) -> set[int]:
        """Parameters that several modules hold (tied embeddings, replicated layers)."""
        seen: set[int] = set()
        shared: set[int] = set()
        for module in self.model.modules():
            for parameter in module._parameters.values():
                (shared if id(parameter) in seen else seen).add(id(parameter))
        return shared

    @staticmethod
    def _is_shared(layer: AdapterLayer, shared: set[int]) -> bool:
        # Tied modules with trained tokens share those as well, so they stay tied.
        return id(layer.weight) in shared and not isinstance(layer, TrainableTokensLayer)

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            warnings.warn(f"Adapter {', '.join(unknown)} does not exist and is not merged.", PeftWarning, stacklevel=3)
        for layer in self.layers():
            for name in names:
                if layer.has(name) and name not in layer.merged_adapters:
                    layer.check_mergeable(name)

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
            for layer in self.layers():
                names = [n for n in (self.active_adapters if adapter_names is None else adapter_names) if layer.has(n)]
                if names:
                    layer.merged_weight([n for n in names if n not in layer.merged_adapters], safe=True)
        return self._unload_and_optionally_merge(merge=True, progressbar=progressbar, adapter_names=adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was, without adapter layers; merged adapters are taken out first."""
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        parts = list(reversed(self.parts()))
        shared = self._shared_weights() if merge else set()
        tied = self._tied_alike(self.active_adapters if adapter_names is None else adapter_names) if merge else []
        for key, part in with_progress(parts, progressbar, "Merging" if merge else "Unloading"):
            if isinstance(part, AdapterLayer):
                if merge:
                    part.merge(safe_merge, adapter_names, keep=False, own=self._is_shared(part, shared))
                plain = part.base_layer
            elif merge and not self.unwraps_saved:
                warnings.warn(
                    f"{type(self).__name__} leaves {key!r} in its {type(part).__name__}, with what was trained"
                    " in effect; its `current_module()` is the plain module.",
                    PeftWarning,
                    stacklevel=4,
                )
                continue
            else:
                plain = part.unload(merge, adapter_names)
            if key.rpartition(".")[2] == "token_adapter":
                continue
            parent, _, name = get_submodules(self.model, key)
            setattr(parent, name, plain)
        for key in tied[1:]:
            self.model.get_submodule(key).weight = self.model.get_submodule(tied[0]).weight
        self._parts = None
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        return self.model

    def _tied_alike(self, names: Sequence[str]) -> list[str]:
        """The modules tied to the input embedding, if these adapters change them and keep them the same."""
        tied = tied_embedding_modules(self.model)
        there = [self._find_layer(self.model.get_submodule(self._live_key(self.model, key)), None) for key in tied]
        here = {name for layer in there if layer is not None for name in names if layer.has(name)}
        alike = all(getattr(self.peft_config[name], "ensure_weight_tying", False) for name in here)
        return tied if here and alike else []

    # ---- being the model

    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Stands around a forward pass; takes out of `kwargs` what is the method's, not the model's."""
        return nullcontext()

    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Stands around a generation, which is many forward passes."""
        return self.around_forward(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.around_forward(args, kwargs):
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__:
                raise
            return getattr(self.model, name)

    def key_map(self, adapter_name: str) -> dict[str, str]:
        """Names of tensors that all layers of an adapter share: as files have them -> as this object has them."""
        return {slot: f"{slot}.{adapter_name}" for slot in self.shared_names if adapter_name in getattr(self, slot)}


class Before:
    """What an adapter that cannot be added must leave as it was, beside the modules themselves."""

    def __init__(self, tuner: BaseTuner, model: nn.Module):
        self.parts = tuner.parts()
        self._states = [(part, part.active_adapters) for _, part in self.parts]
        self._active = tuner.active_adapters
        self._targets = list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)
        self._trained = [(parameter, parameter.requires_grad) for _, parameter in base_parameters(model)]
        self._has_record = "peft_config" in model.__dict__

    def restore(self, tuner: BaseTuner, model: nn.Module) -> None:
        for part, active in self._states:
            if part.active_adapters != active:
                part.set_adapter(active)
        tuner._active = self._active
        tuner.targeted_module_names, tuner.targeted_parameter_names = self._targets
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)
        if not self._has_record and "peft_config" in model.__dict__:
            del model.peft_config


def _put_back(thing: Any, attributes: dict[str, Any]) -> None:
    """Gives an object the attributes that it had."""
    thing.__dict__.clear()
    thing.__dict__.update(attributes)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While it lasts, cyclic garbage is left: tens of thousands of new modules make Python look for it all the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def with_progress(items: list[Any], show: bool, label: str) -> Any:
    """`items`, with a progress bar while they are walked through if `show`."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label)


def check_adapter_name(name: str) -> None:
    """Raises ValueError where a string cannot name an adapter."""
    if not isinstance(name, str) or not name or "." in name or name == BASE:
        raise ValueError(f"{name!r} cannot name an adapter: a name is a string without dots, and not {BASE!r}.")
