"""Adapters of several methods on one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.config import PeftConfig, check_is_config
from peft.core.method import Method
from peft.core.tuner import BaseTuner
from peft.model import PeftModel
from peft.registry import METHODS, method_of, value_of


class MixedModel(BaseTuner):
    """A model with adapters of several methods. What is a method's own is asked of a tuner of that method.

    Where two methods adapt the same module, the layer of the later one wraps that of the earlier: its adapters act on
    the outcome of the others.
    """

    prefix = "mixed_"

    def method(self, config: Any) -> Method:
        name = value_of(config.peft_type)
        if name not in self._methods:
            made: Any = method_of(name).model_class
            self._methods[name] = made.method_class(self, made.layer_class, made.prefix)
        return self._methods[name]

    def add_weighted_adapter(self, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Combines adapters of one method, as that method does it.

        Raises:
            ValueError: they are of several methods, or an adapter does not exist.
            NotImplementedError: adapters of their method cannot be combined.
        """
        kinds = {value_of(self.peft_config[name].peft_type) for name in self.check_names(adapters)}
        if len(kinds) != 1:
            raise ValueError(f"Adapters of one method can be combined, not of {', '.join(sorted(kinds)) or 'none'}.")
        method = self.method(self.peft_config[adapters[0]])
        if not hasattr(method, "add_weighted_adapter"):
            raise NotImplementedError(f"Adapters of {kinds.pop()} cannot be combined.")
        return method.add_weighted_adapter(adapters, *args, **kwargs)


class PeftMixedModel(PeftModel):
    """A base model with adapters of several methods, each under a name of its own.

    Any of them can be active together; they act in the order in which their methods came. Made by
    `get_peft_model(..., mixed=True)`. Saving is not supported; adapters are loaded one by one.

    Args:
        model: the base model, changed in place; its weights are frozen.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        low_cpu_mem_usage: make the adapter's tensors without memory (on the meta device), to be loaded next.

    Raises:
        ValueError, TypeError, NotImplementedError: the method cannot be mixed, or the configuration does not fit; the
            model is as before.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any):
        self._check_new_adapter_config(peft_config, is_trainable=False)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _tuner_class(self, config: PeftConfig) -> Any:
        return MixedModel

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        check_is_config(peft_config)
        if not method_of(peft_config.peft_type or "").mixed:
            raise ValueError(
                f"{value_of(peft_config.peft_type)} cannot be part of a PeftMixedModel (mixed=True); these can:"
                f" {', '.join(name for name, row in METHODS.items() if row.mixed)}."
            )

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Removes adapters. If none of the active ones is left, the first that is left becomes active.

        Raises:
            ValueError: there is no such adapter.
        """
        for name in self.base_model.check_names(adapter_name):
            super().delete_adapter(name)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Saving is not supported for PeftMixedModel.")

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Not supported, as saving is not.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Model card creation is not supported for PeftMixedModel.")
