"""A base model and its named adapters: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from peft.config import PeftConfig, check_is_config
from peft.core import status
from peft.core.tuner import BaseTuner
from peft.html import table
from peft.registry import method_of
from peft.tuners.prompts.base import PromptHost


class AdaptedModel(PromptHost):
    """What can be asked of a base model with adapters; what is done with them is up to `PeftModel`."""

    base_model: Any
    peft_type: Any
    _peft_config: dict[str, Any] | None
    _active: Sequence[str]

    @classmethod
    def _class_for(cls, task_type: str | None) -> Any:
        """The class for models of a task."""
        return cls

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter."""
        raise NotImplementedError

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter (or several) the active one."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, Any]:  # type: ignore[override]
        """The configurations by adapter name."""
        return self.base_model.peft_config if self._peft_config is None else self._peft_config

    @property
    def _tuner(self) -> BaseTuner | None:
        return self.base_model if isinstance(self.base_model, BaseTuner) else None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        if self._tuner is not None:
            return self._tuner.active_adapters
        return list(self._active)

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
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

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
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

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
                f"All adapters of a PeftModel have the same PEFT type: this one has {value_of(self.peft_type)},"
                " the new adapter"
                f" {value_of(peft_config.peft_type)}. Use get_peft_model(..., mixed=True) to mix methods."
            )
        if is_trainable:
            check_trainable(peft_config)


def check_trainable(config: PeftConfig) -> None:
    """Raises ValueError where a prompt is to be trained further whose file does not hold what is trained."""
    encoder: Any = method_of(config.peft_type or "").model_class
    if config.is_prompt_learning and not encoder.is_whole_in_files(config):
        raise ValueError(
            "A prompt learning adapter that is loaded cannot be trainable; what made it is not saved. Prompts of keys"
            " and values can, those of CARTRIDGE and of PREFIX_TUNING without a projection."
        )


def value_of(member: Any) -> Any:
    """The value of an enum's member; other things as they are."""
    return getattr(member, "value", member)
