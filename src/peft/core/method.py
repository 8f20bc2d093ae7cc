"""A model with its adapters, and what a method says about all of it; what it says about one module is in `layer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import PeftConfig
from peft.core.layer import AdapterLayer
from peft.core.part import Part, keep_values, known, tensors_in
from peft.core.plan import Plan
from peft.core.slots import Buffers, FixedSlot, Slot, stored_names
from peft.core.storage import place_of
from peft.core.targets import default_targets
from peft.core.walk import in_files, parts_of


def _find(tensors: Mapping[str, Tensor], starts: Sequence[str], name: str) -> Tensor | None:
    """The tensor of that name below one of the places."""
    return next((tensors[start + name] for start in starts if start + name in tensors), None)


class Method:
    """The questions that a tuner asks of a method, with the answers of one that has nothing special to say.

    A tuner has one for each PEFT type of its adapters. Public functions of it can be called on the tuner, too.

    Args:
        tuner: the tuner.
        layer_class: the layer of the method.
        prefix: beginning of the names of the method's tensors.
    """

    #: fields of the configuration that all adapters of a model have to agree in
    common_fields: ClassVar[tuple[str, ...]] = ()
    #: whether merging for good also takes off the wrappers of modules that are trained in full
    unwraps_saved: ClassVar[bool] = True
    #: slots whose tensors have nothing to do in some layers, and get no gradient there
    idle_slots: ClassVar[tuple[str, ...]] = ()
    #: the PEFT type of its adapters, where others may be injected beside them
    peft_type: Any = None
    _hooks: tuple[Any, ...] = ()

    def __init__(self, tuner: Adapters, layer_class: type[AdapterLayer], prefix: str):
        self.tuner, self.layer_class, self.prefix = tuner, layer_class, prefix
        #: slot -> container of the tensors that layers share, by adapter
        self.shared: dict[str, Any] = {}
        #: base module and name of its parameter -> what `plan_settings` says of the layer, while an adapter is added
        self.planned: dict[tuple[int, str | None], dict[str, Any]] = {}
        slots = {name: slot for name, slot in layer_class.slots.items() if slot.shared}
        if slots:
            there = next((layer for layer in tuner.adapter_layers() if isinstance(layer, layer_class)), None)
            for name, slot in slots.items():
                self.shared[name] = slot.container() if there is None else getattr(there, name)
                setattr(tuner, name, self.shared[name])

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return self.tuner.model

    @property
    def configs(self) -> dict[str, Any]:
        """The configurations of the method's adapters."""
        mine = {name: config for name, config in self.tuner.peft_config.items() if self.tuner.method(config) is self}
        return {name: config for name, config in mine.items() if self.peft_type in (None, config.peft_type)}

    # ---- before the first layer

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

    def choose_targets(self, config: Any, model_config: dict[str, Any]) -> None:
        """Sets `target_modules` where a configuration leaves them to the type of the model.

        Raises:
            ValueError: there are none for it.
        """
        config.target_modules = default_targets(config.peft_type, model_config.get("model_type"), self.model)

    def complete_config(self, config: Any, model_config: dict[str, Any]) -> None:
        """Fills in what a configuration leaves open, beside its targets."""

    def drawing(self, config: Any) -> AbstractContextManager[None]:
        """Around the making of an adapter's tensors: where the random numbers come from."""
        return nullcontext()

    def check_config(self, adapter_name: str, config: Any) -> None:
        """Raises ValueError where an adapter does not go together with those that are there."""
        others = [other for name, other in self.configs.items() if name != adapter_name]
        for field in self.common_fields:
            if len({getattr(other, field) for other in (*others, config)}) > 1:
                kind, there, new = config.peft_type.value, getattr(others[0], field), getattr(config, field)
                raise ValueError(
                    f"All {kind} adapters of a model need the same {field}: {there!r} is there, {adapter_name!r} has"
                    f" {new!r}."
                )

    @classmethod
    def start_is_replaceable(cls, config: Any) -> bool:
        """Whether loading may leave out an adapter's start: it may not where that changes the base model."""
        return True

    def prepare_model(self, config: Any, model: nn.Module) -> Callable[[], None] | None:
        """Changes the model's own structure before it gets adapters, where a configuration asks for it.

        Returns what undoes that.
        """
        return None

    def check_plan(self, plan: Plan, config: Any) -> None:
        """Called when it is settled which modules get an adapter, before any of them does.

        Raises:
            ValueError: the configuration does not fit them, taken together.
        """

    def share(self, plan: Plan, config: Any, adapter_name: str) -> dict[str, Any]:
        """Makes what the layers of an adapter share; called when the plan is settled, before the first layer.

        Returns:
            Slot -> a tensor, or tensors by the name of a group of layers. They are moved to the device of the base.
        """
        return {}

    def plan_settings(self, plan: Plan, config: Any) -> dict[str, dict[str, Any]]:
        """What depends on all layers that an adapter gets: its place among them, the group that it shares with.

        Returns:
            Name of a layer in `plan.layers` -> settings of the adapter there, which its `create` and `draw` may use;
            `groups` among them, where layers share by groups.
        """
        return {}

    def note_plan(self, plan: Plan, config: Any) -> None:
        """Works out what depends on the place of each layer among all."""
        settings = self.plan_settings(plan, config)
        layers = [layer for layer in plan.layers if layer.name in settings]
        self.planned = {(id(layer.base), layer.parameter_name): settings[layer.name] for layer in layers}

    def make_shared(self, plan: Plan, config: Any, adapter_name: str) -> None:
        """Makes what the layers of an adapter share, on the device of the base, and works out the place of each.

        What a file is about to bring, all of it, may be made without memory.
        """
        self.note_plan(plan, config)
        if not self.shared or not plan.targets:
            return
        plan.waits_for_file &= all(self.slot(name).is_stored(config, name) for name in self.shared)
        with torch.device("cpu"):  # also where the adapter itself is made without memory: it may not be in the file
            made = self.share(plan, config, adapter_name)
        device = place_of(plan.targets[0].base)[0]
        for name, value in made.items():
            slot = self.slot(name)
            if isinstance(slot, FixedSlot):
                slot.prepare(self.shared[name], name, adapter_name, config)
            if isinstance(value, Mapping):  # by groups of layers
                kept = slot.in_state(config, name)
                value = nn.ParameterDict(value.items()) if slot.trained else Buffers(value, kept)
            stays = device is None or device.type == "meta" or _is_blank(value)
            self.shared[name][adapter_name] = value if stays else value.to(device)

    def make_shared_again(self, adapter_name: str) -> None:
        """Makes what the layers of an adapter share and no file has brought."""
        before = tensors_in(self.shared.values(), adapter_name)
        if any(tensor.is_meta for tensor in before):
            self.make_shared(Plan.of_layers(self.tuner.parts(), adapter_name), self.configs[adapter_name], adapter_name)
            self.planned = {}
            keep_values(before, tensors_in(self.shared.values(), adapter_name))

    def forget_shared(self, adapter_name: str) -> None:
        """Removes what the layers of an adapter share."""
        for container in self.shared.values():
            if adapter_name in container:
                del container[adapter_name]

    def watch_calls(self, wanted: bool, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """While it is wanted, two hooks stand around the base model, whoever calls it; both get its keywords too."""
        if wanted and not self._hooks:
            self._hooks = (
                self.model.register_forward_pre_hook(before, with_kwargs=True),
                self.model.register_forward_hook(after, with_kwargs=True, always_call=True),
            )
        elif not wanted:
            for hook in self._hooks:
                hook.remove()
            self._hooks = ()

    # ---- layer by layer

    def layer_settings(self, config: Any, key: str) -> dict[str, Any]:
        """What the adapter on module (or parameter) `key` has as its own, as further arguments of its `create`."""
        return {}

    def is_for(self, config: Any, key: str, layer: AdapterLayer) -> bool:
        """Whether a layer of the method that is on module `key` takes an adapter with this configuration."""
        return True

    def make_layer(self, config: Any, target: nn.Module, parameter_name: str | None, key: str) -> AdapterLayer:
        """A layer of the method around `target`, without adapters yet."""
        return self.layer_class(target, parameter_name)

    def add(self, layer: AdapterLayer, adapter_name: str, config: Any, key: str, planned: Any) -> None:
        """Makes an adapter on the layer of module (or parameter) `key`, with what `plan_settings` says."""
        layer.add_adapter(adapter_name, config, planned, config.at(key), **self.layer_settings(config, key))

    def tie(self, layer: AdapterLayer, to: AdapterLayer, adapter_name: str) -> None:
        """Makes an adapter on one module the same as that on the module it shares its weight with."""
        raise ValueError(
            f"{type(self).__name__} cannot keep the adapters of tied modules the same (ensure_weight_tying)."
        )

    def added(self, adapter_name: str) -> None:
        """Called when an adapter is complete on all its layers, or has got its tensors from a file."""

    def removed(self, adapter_name: str) -> None:
        """Called when an adapter has been deleted, or (with all others) taken off the model."""

    def cast_shared(self, adapter_name: str, dtype: torch.dtype | None) -> None:
        """Brings the trained tensors that the layers of an adapter share to a dtype."""
        for slot, container in self.shared.items():
            if dtype is not None and self.slot(slot).trained and adapter_name in container:
                held = container[adapter_name]
                for parameter in [held] if isinstance(held, Tensor) else held.parameters():
                    parameter.data = parameter.data.to(dtype)

    # ---- while the model runs

    def around_forward(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Stands around a forward pass; takes out of `kwargs` what is the method's, not the model's."""
        return nullcontext()

    def around_generate(self, args: Sequence[Any], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Stands around a generation, which is many forward passes."""
        return self.around_forward(args, kwargs)

    def check_before_training(self) -> None:
        """Warns of what should have been done before the active adapters are trained; called once."""

    def after_forward(self, output: Any) -> Any:
        """The model's output, as the method wants it (with a penalty added to the loss, say)."""
        return output

    # ---- in files

    def key_map(self, adapter_name: str, config: Any) -> dict[str, str]:
        """Names of tensors that layers of an adapter share: as files have them -> as the tuner has them."""
        return stored_names(self.shared, self.layer_class.slots, adapter_name, config)

    def slot(self, name: str) -> Slot:
        """A slot of the method's layers."""
        return self.layer_class.slots[name]

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a file, of whatever version, by the names that this one has for them.

        Raises:
            ValueError: the file is too old to be read, or does not fit.
        """
        for path, layer in parts_of(model):
            if isinstance(layer, AdapterLayer) and type(layer).fit is not AdapterLayer.fit and layer.has(adapter_name):
                # Models that adapters were put into directly have no `base_model.model` in their names.
                name = in_files(model, adapter_name, path)
                layer.fit(adapter_name, path, partial(_find, tensors, (f"{name}.", f"base_model.model.{name}.")))
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
            "path_initial_model_for_weight_conversion is for initialisations that change the base weights; that of"
            f" adapter {adapter_name!r} does not. Save without it."
        )


class Adapters(nn.Module):
    """A model and the adapters on it: which there are, where, and what their methods say.

    The model class of a method names what belongs to it: `class HRAModel(BaseTuner, layer=HRALayer, prefix="hra_")`.

    Args:
        model: the base model.
    """

    #: beginning of the names of the method's tensors
    prefix: ClassVar[str] = ""
    #: the layer of the method
    layer_class: ClassVar[type[AdapterLayer]] = AdapterLayer
    #: what the method says about a whole model
    method_class: ClassVar[type[Method]] = Method
    #: path from this object to the base model
    holder: ClassVar[str] = "model"
    #: whether layers share tensors, which the tuner holds
    uses_shared_state: ClassVar[bool] = False

    def __init_subclass__(
        cls, layer: type[AdapterLayer] | None = None, method: type[Method] | None = None, prefix: str = "", **rest: Any
    ) -> None:
        super().__init_subclass__(**rest)
        cls.layer_class, cls.method_class = layer or cls.layer_class, method or cls.method_class
        cls.prefix = prefix or cls.prefix
        cls.uses_shared_state = any(slot.shared for slot in cls.layer_class.slots.values())

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hold(model)
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        record = getattr(model, "peft_config", None)
        # A model that carries injected adapters keeps its own record of them.
        self.peft_config: dict[str, Any] = {} if record is None or isinstance(record, PeftConfig) else record
        self._parts: list[tuple[str, Part]] | None = None
        self._active: list[str] = []
        #: PEFT type -> what its method says
        self._methods: dict[str, Method] = {}

    def hold(self, model: nn.Module) -> None:
        """Takes in the base model."""
        self.model = model

    def method(self, config: Any) -> Method:
        """The method of an adapter with this configuration."""
        if not self._methods:
            self._methods[""] = self.method_class(self, self.layer_class, self.prefix)
            self._methods[""].peft_type = config.peft_type
        return self._methods[""]

    def methods(self) -> list[Method]:
        """The methods of all adapters."""
        return [self.method(config) for config in self.peft_config.values()] and list(self._methods.values())

    def parts(self) -> list[tuple[str, Part]]:
        """Adapter layers and trained modules of the model by name; found once and remembered."""
        if self._parts is None:
            self._parts = parts_of(self.model)
        return self._parts

    def adapter_layers(self) -> Iterator[AdapterLayer]:
        """The adapter layers, outer ones before what they wrap."""
        return (part for _, part in self.parts() if isinstance(part, AdapterLayer))

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active)

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
        return known(names, self.peft_config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones, see `BaseTuner`."""
        raise NotImplementedError

    @property
    def disabled(self) -> bool:
        """Whether the adapters are switched off."""
        return any(part.disable_adapters for _, part in self.parts())

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


def _is_blank(value: Any) -> bool:
    """Whether a tensor, or one of those of groups or of a module, has no memory."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    return any(tensor.is_meta for tensor in ([value] if isinstance(value, Tensor) else value.values()))
