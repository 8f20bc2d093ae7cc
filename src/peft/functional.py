"""Adapters on a model that stays what it is: functions for packages that build on this one, without a `PeftModel`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from peft.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
from peft.checkpoint import set_peft_model_state_dict as set_peft_model_state_dict
from peft.config import PeftConfig, check_is_config
from peft.core.layer import AdapterLayer
from peft.core.part import UPCAST_DTYPES, Part, as_names, check_adapter_name, known
from peft.core.tuner import BaseTuner
from peft.core.unloading import take_out
from peft.core.walk import layers_of, parts_of
from peft.errors import warn
from peft.integrations.transformers import convert_peft_config_for_transformers
from peft.registry import method_of


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Puts an adapter on a model's layers, in place, and makes it the active one.

    Its tensors have the dtype of the base weights, half precision too; `cast_adapter_dtype` brings them to float32.

    Args:
        peft_config: its configuration; kept, completed, as `model.peft_config[adapter_name]`.
        model: the base model, with or without adapters.
        adapter_name: its name.
        low_cpu_mem_usage: make its tensors without memory (on the meta device), to be loaded next.
        state_dict: an adapter's tensors; their names decide which modules get the adapter.

    Returns:
        `model`.

    Raises:
        ValueError: a soft prompt, or a method whose layers share tensors that live outside the model; or the
            configuration does not fit the model, which is then as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be the base model, an nn.Module; got {type(model).__name__}.")
    check_is_config(peft_config)
    method = method_of(peft_config.peft_type or "")
    if state_dict is not None and not any(f".{method.prefix}" in f".{key}" for key in state_dict):
        raise ValueError(
            f"state_dict has no tensors of a {method.prefix.rstrip('_')} adapter, whose names would say which modules"
            " get one; leave it out to have target_modules decide."
        )
    if method.prompt:
        raise ValueError(
            f"{peft_config.peft_type} is a soft prompt (prompt learning), which has no place inside a model: use"
            " get_peft_model."
        )
    check_adapter_name(adapter_name, getattr(model, "peft_config", {}))
    convert_peft_config_for_transformers(peft_config, model)
    return method.model_class(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict).model


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[AdapterLayer] = AdapterLayer,
) -> None:
    """Makes adapters the active ones; trainable unless `inference_mode`, all others not.

    Args:
        model: a model with adapters.
        adapter_name: one or several; they act in this order.
        inference_mode: whether they are left frozen.
        layer_cls: the kind of adapter layers that are concerned.

    Raises:
        ValueError: no layer of the model has such an adapter.
    """
    names = as_names(adapter_name)
    parts = _parts_with(model, names, layer_cls)
    tuner = _tuner_of(model)
    if tuner is not None:
        tuner.set_adapter(names, inference_mode)
        return
    for part in parts:
        part.check_active(names)
    for part in parts:
        part.set_adapter(names, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Makes adapters trainable or not, active or not.

    Raises:
        ValueError: no layer of the model has such an adapter.
    """
    names = as_names(adapter_names)
    for part in _parts_with(model, names):
        part.set_requires_grad(names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: type[AdapterLayer] = AdapterLayer
) -> list[str] | None:
    """Removes an adapter from all layers of a model. The layers stay, and so does its entry in `model.peft_config`.

    (In a `PeftModel` the entry goes too.) If it was the only active one, the first that is left becomes active.

    Args:
        model: a model with adapters.
        adapter_name: which.
        prefix: beginning of the names of its tensors. Names of adapters are unique in a model, so it is not needed.
        layer_cls: the kind of adapter layers that are concerned.

    Returns:
        The adapters that are active then; None if none is left.

    Warns:
        PeftWarning: no layer of the model has such an adapter. (No error, for transformers deletes a name twice that it
            is given twice.)
    """
    parts = _parts_with(model, [], layer_cls)
    if not any(adapter_name in part.adapter_names() for part in parts):
        warn(f"No layer has an adapter {adapter_name!r}; nothing is deleted.")
        return max((part.active_adapters for part in parts), key=len, default=[]) or None
    tuner = _tuner_of(model)
    if tuner is not None:
        tuner.delete_adapter(adapter_name)
        return tuner.active_adapters or None
    take_out((part for part in parts if isinstance(part, AdapterLayer)), adapter_name)
    for part in parts:
        part.delete_adapter(adapter_name)
    left = [part for part in parts if part.adapter_names()]
    active: list[str] = max((part.active_adapters for part in left), key=len, default=[])
    for part in left:
        if part.active_adapters != active:
            part.set_adapter(active)
    return active or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Brings an adapter that is in half precision or 8-bit floats to float32, so that it can be trained.

    Modules that are trained in full stay in the dtype of the base model, which feeds them.

    Args:
        model: a model with adapters.
        adapter_name: which.
        autocast_adapter_dtype: False leaves it as it is.
    """
    if not autocast_adapter_dtype:
        return
    for layer in layers_of(model, AdapterLayer, adapter_name).values():
        for parameter in layer.adapter_parameters(adapter_name):
            if parameter.dtype in UPCAST_DTYPES:
                parameter.data = parameter.data.float()


def _tuner_of(model: nn.Module) -> BaseTuner | None:
    """The tuner of a `PeftModel`, which keeps account of its adapters; None for a model with injected ones."""
    return next((module for module in model.modules() if isinstance(module, BaseTuner)), None)


def _parts_with(model: nn.Module, names: Sequence[str], layer_cls: type[AdapterLayer] = AdapterLayer) -> list[Part]:
    """The adapter layers and trained modules of a model.

    Raises:
        ValueError: one of `names` is on none of them.
    """
    parts = [part for _, part in parts_of(model) if isinstance(part, layer_cls) or not isinstance(part, AdapterLayer)]
    known(names, sorted({name for part in parts for name in part.adapter_names()}))
    return parts
