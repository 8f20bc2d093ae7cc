"""A base model and its named adapters: what there is, and the life of an adapter on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peft.config import PeftConfig, check_is_config
from peft.core import status
from peft.core.auxiliary import ModulesToSaveWrapper, save_modules
from peft.core.method import Method
from peft.core.part import Part, check_adapter_name, known
from peft.core.targets import modules_named
from peft.core.tuner import BaseTuner
from peft.core.undo import all_or_nothing, as_before, undone_on_error
from peft.core.walk import live_key, parts_of, put_back
from peft.core.whole import alone, whole
from peft.errors import warn
from peft.html import table
from peft.integrations.transformers import convert_peft_config_for_transformers
from peft.registry import method_of, value_of
from peft.tuners.prompts.base import PromptHost


class AdaptedModel(PromptHost):
    """A base model with adapters: what can be asked of it, and how they come, act and go."""

    base_model: Any
    peft_type: Any
    _peft_config: dict[str, Any] | None
    #: heads of the base model that are new for each task: trained and stored with the adapter where they are found
    heads: ClassVar[tuple[str, ...]] = ()
    #: which soft prompt is active
    _active: Sequence[str] = ()

    @classmethod
    def _class_for(cls, task_type: str | None) -> Any:
        """The class for models of a task."""
        return cls

    @property
    def peft_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The configurations by adapter name."""
        return self.base_model.peft_config if self._peft_config is None else self._peft_config

    @property
    def _tuner(self) -> BaseTuner | None:
        return self.base_model if isinstance(self.base_model, BaseTuner) else None

    @property
    def _holder(self) -> nn.Module:
        """What knows which adapters act: the tuner, or this model with soft prompts."""
        return self if self._tuner is None else self._tuner

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._active) if self._tuner is None else self._tuner.active_adapters

    @property
    def active_adapter(self) -> Any:
        """Name of the active adapter; a list if there are several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @active_adapter.setter
    def active_adapter(self, name: str | list[str]) -> None:
        self.set_adapter(name)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter acts: one is active, and adapters are not switched off."""
        off = self._prompt_disabled if self._tuner is None else self._tuner.disabled
        return not off and bool(self.active_adapters)

    @property
    def active_peft_config(self) -> Any:
        """Configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train in full; None if there are none."""
        configs = self.peft_config.values()
        return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()} or None

    @property
    def config(self) -> Any:
        """The base model's configuration; no attribute where that has none."""
        return self.get_base_model().config

    def get_base_model(self) -> nn.Module:
        """The base model, with its adapter layers."""
        return self._tuner.model if self._tuner is not None else self.base_model

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                    raise
                return getattr(self.base_model, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def _repr_html_(self) -> str:
        """The adapters, for notebooks."""
        trainable, total = self.get_nb_trainable_parameters()
        caption = f"{type(self).__name__} on {type(self.get_base_model()).__name__}: {trainable:,d} of {total:,d}"
        active = self.active_adapters
        rows = [
            (name, value_of(config.peft_type), "yes" if name in active else "no", getattr(config, "r", ""))
            for name, config in self.peft_config.items()
        ]
        return table(f"{caption} parameters are trained", ("adapter", "method", "active", "rank"), rows)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The status of every adapted module, see [`get_layer_status`]."""
        return status.get_layer_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` works: not for soft prompts, nor where a layer's method has no such form."""
        return self._tuner is not None and self._tuner.supports_lora_conversion(adapter_name)

    def get_model_status(self) -> status.TunerModelStatus:
        """The status of all adapters together, see [`get_model_status`]."""
        return status.get_model_status(self)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        check_is_config(peft_config)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"All adapters of a PeftModel have the same PEFT type: this one has {value_of(self.peft_type)}, the new"
                f" adapter {value_of(peft_config.peft_type)}. Use get_peft_model(..., mixed=True) to mix methods."
            )
        if is_trainable:
            check_trainable(peft_config)

    # ---- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter of the same method, not active yet.

        Raises:
            ValueError: the name is taken, the method is another, or the configuration does not fit.
        """
        check_adapter_name(adapter_name, self.peft_config)
        self._check_new_adapter_config(peft_config, is_trainable=False)
        self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add(self, name: str, config: PeftConfig, low_cpu_mem_usage: bool, autocast: bool, first: bool = False) -> None:
        """Adds an adapter with the saved ones that it is made of; all of them, or none."""
        warn_of_name(name, config)
        model = self.base_model if first else self.get_base_model()
        with undone_on_error(as_before(config)), alone(self._holder), all_or_nothing():
            if self.heads and hasattr(config, "modules_to_save"):
                config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *self.heads]))
            if config.is_prompt_learning:
                self._add_prompt(name, config)
                return
            convert_peft_config_for_transformers(config, model)
            tuner_class = self._tuner_class(config)
            has_members = tuner_class.method_class.members is not Method.members
            if first:
                here = {} if has_members else {name: config}
                self.base_model = tuner_class(model, here, name, low_cpu_mem_usage=low_cpu_mem_usage)
            if not first or has_members:
                self._load_members(name, config)
                self.base_model.inject_adapter(model, name, autocast, low_cpu_mem_usage, config=config)
            elif not autocast:
                self.base_model._cast_adapter_dtype(name, False)

    def _tuner_class(self, config: PeftConfig) -> Any:
        """The class of the tuner for an adapter with this configuration."""
        return method_of(config.peft_type or "").model_class

    def _add_prompt(self, name: str, config: PeftConfig) -> None:
        trained = [(parameter, parameter.requires_grad) for parameter in self.base_model.parameters()]
        active = self._active

        def take_back() -> None:
            self.peft_config.pop(name, None)
            self._delete_prompt_encoder(name)
            for key, part in parts_of(self.base_model):
                if isinstance(part, ModulesToSaveWrapper):
                    part.delete_adapter(name)
                    if not part.modules_to_save:
                        put_back(self.base_model, key, part.original_module)
            self._active = active
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

        with undone_on_error(take_back):
            self.peft_config[name] = config
            self._setup_prompt_encoder(name)
            keys = modules_named(self.base_model, getattr(config, "modules_to_save", None) or ())
            save_modules(self.base_model, {key: live_key(self.base_model, key) for key in keys}, name)
            if not self._active:
                self.set_adapter(name, config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter (or several) the active one; trainable unless `inference_mode`, all others not.

        Raises:
            ValueError: there is no such adapter.
        """
        if self._tuner is not None:
            self._tuner.set_adapter(adapter_name, inference_mode)
            return
        names = known(adapter_name, self.peft_config)
        if len(names) != 1:
            raise ValueError(f"One soft prompt at a time can be active, not {len(names)} ({', '.join(names)}).")
        frozen = inference_mode or self.peft_config[names[0]].inference_mode
        with self._whole(names) as parts:
            for other, encoder in self.prompt_encoder.items():
                encoder.requires_grad_(other == names[0] and not frozen)
            for part in parts:
                part.set_adapter(names, frozen)
            self._active = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, active or not.

        Raises:
            TypeError: the adapter is a soft prompt.
        """
        if self._tuner is None:
            raise TypeError("set_requires_grad() is for adapters on layers; this model has a soft prompt.")
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the only active one, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter.
        """
        if self._tuner is not None:
            self._tuner.delete_adapter(adapter_name)
            return
        known(adapter_name, self.peft_config)
        with self._whole(deleted=True) as parts:
            del self.peft_config[adapter_name]
            self._delete_prompt_encoder(adapter_name)
            for part in parts:
                part.delete_adapter(adapter_name)
            if adapter_name in self._active:
                self._active = ()
                if self.peft_config:
                    self.set_adapter(next(iter(self.peft_config)))

    @contextmanager
    def _whole(self, names: Sequence[str] = (), deleted: bool = False) -> Iterator[list[Part]]:
        """Stands around a change of the state of soft prompts and of the parts beside them: all of it, or none."""
        parts = [part for _, part in parts_of(self.base_model)]
        with whole(self, parts, names, deleted, [self.prompt_encoder]):
            yield parts

    def _load_members(self, adapter_name: str, config: PeftConfig) -> None:
        """Loads the saved adapters that a new one is made of, if its method is of that kind."""
        raise NotImplementedError


def check_trainable(config: PeftConfig) -> None:
    """Raises ValueError where a prompt is to be trained further whose file does not hold what is trained."""
    encoder: Any = method_of(config.peft_type or "").model_class
    # Of keys and values, files hold all that is trained, unless a projection makes them.
    if config.is_prompt_learning and (encoder.adds_tokens or getattr(config, "prefix_projection", False)):
        raise ValueError(
            "A prompt learning adapter that is loaded cannot be trainable; what made it is not saved. Prompts of keys"
            " and values can, those of CARTRIDGE and of PREFIX_TUNING without a projection."
        )


def warn_of_name(adapter_name: str, config: PeftConfig) -> None:
    """Warns of a name of an adapter that is part of the names of its tensors, whatever the adapter is called."""
    prefix = method_of(config.peft_type or "").prefix
    if adapter_name in prefix:
        warn(
            f"An adapter called {adapter_name!r} is easily mistaken for the beginning of its tensors' names,"
            f" {prefix!r}; better choose another name."
        )
