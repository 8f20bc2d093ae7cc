"""What is attached to a model, active, merged and trainable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.layer import AdapterLayer
from peft.core.part import Part
from peft.core.storage import backend_of
from peft.core.storage.shared import shape_of
from peft.core.tuner import BaseTuner
from peft.core.walk import parts_of
from peft.core.wrappers import TrainableTokensWrapper, unwrapped


@dataclass
class TunerLayerStatus:
    """One adapted module.

    Attributes:
        name: the module's name in the base model.
        module_type: the kind of adapter layer.
        enabled: whether adapters are switched on.
        active_adapters: names of the active adapters, whether or not they are on this module.
        merged_adapters: names of those that are part of the base weight at present.
        requires_grad: adapter -> whether it is trainable; "irregular" if only some of it is.
        available_adapters: names of the adapters on this module.
        devices: adapter -> kinds of device that it lies on.
        quantization_backend: how the base weight is quantised, None if it is not.
    """

    name: str
    module_type: str
    available_adapters: list[str]
    devices: dict[str, list[str]]
    requires_grad: dict[str, bool | Literal["irregular"]]
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """All of a model's adapters.

    Attributes:
        base_model_type: class of the base model.
        adapter_model_type: class of the tuner; "None" where adapters were injected.
        peft_types: adapter -> method.
        trainable_params, total_params: counts of parameters.
        num_adapter_layers: how many modules are adapted.
        enabled, active_adapters, merged_adapters, requires_grad: as for one layer; "irregular" where layers differ.
        available_adapters: names of all adapters.
        devices: adapter -> kinds of device that it lies on.
        quantization_backend: as for one layer, "irregular" where layers differ.
    """

    base_model_type: str
    adapter_model_type: str
    num_adapter_layers: int
    total_params: int
    trainable_params: int
    peft_types: dict[str, str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    requires_grad: dict[str, bool | Literal["irregular"]]
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    quantization_backend: str | None = None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; packed and sharded ones counted as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = shape_of(parameter).numel()
        if type(parameter).__name__ == "Params4bit":  # two per byte
            packed = parameter.quant_storage.itemsize if hasattr(parameter, "quant_storage") else 1
            count *= 2 * packed
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _agreed(values: list[Any]) -> Any:
    """The value that all have; "irregular" where they differ."""
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> Any:
    """The adapters that are merged on all layers that have them; "irregular" where they are merged on some only."""
    merged = list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))
    for layer in layers:
        here = [name for name in merged if name in layer.available_adapters]
        if layer.module_type != ModulesToSaveWrapper.__name__ and set(here) != set(layer.merged_adapters):
            return "irregular"
    return merged


def _tuner_and_base(model: nn.Module) -> tuple[BaseTuner | None, nn.Module]:
    """The tuner of a `PeftModel`, or that the model is, if any; and the base model."""
    tuner = model if isinstance(model, BaseTuner) else model.__dict__.get("_modules", {}).get("base_model")
    return (tuner, tuner.model) if isinstance(tuner, BaseTuner) else (None, model)


def _layer_status(name: str, part: Part) -> TunerLayerStatus:
    requires_grad, devices = {}, {}
    for adapter in part.adapter_names():
        parameters = list(part.adapter_parameters(adapter))
        requires_grad[adapter] = _agreed([p.requires_grad for p in parameters]) if parameters else False
        devices[adapter] = sorted({p.device.type for p in parameters})
    return TunerLayerStatus(
        name=name,
        module_type=part.type_name if isinstance(part, AdapterLayer) else type(part).__name__,
        enabled=not part.disable_adapters,
        active_adapters=part.active_adapters,
        merged_adapters=list(part.merged_adapters),
        requires_grad=requires_grad,
        available_adapters=sorted(part.adapter_names()),
        devices=devices,
        quantization_backend=backend_of(part) if isinstance(part, AdapterLayer) else None,
    )


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted module.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: the model has a soft prompt, or an adaption prompt.
        ValueError: the model has no adapter layers.
    """
    configs = getattr(model, "peft_config", None)
    kinds = ("is_prompt_learning", "is_adaption_prompt")
    if isinstance(configs, dict) and any(getattr(c, kind, False) for c in configs.values() for kind in kinds):
        raise TypeError("get_layer_status() is for adapters on layers; this model has a soft prompt.")
    tuner, base = _tuner_and_base(model)
    prefix = "" if tuner is None else "model."
    statuses = []
    for name, part in parts_of(base):
        if isinstance(part, (AdapterLayer, ModulesToSaveWrapper)):
            inside = isinstance(unwrapped(base.get_submodule(name)), TrainableTokensWrapper)
            statuses.append(_layer_status(prefix + name + f".{TrainableTokensWrapper.holds}" * inside, part))
    if not statuses:
        raise ValueError(
            f"No adapter layers found in {type(model).__name__}; is it a PeftModel, or were adapters injected?"
        )
    return statuses


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all of a model's adapters together.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: the model has a soft prompt, or an adaption prompt.
        ValueError: the model has no adapter layers.
    """
    layers = get_layer_status(model)
    tuner, base = _tuner_and_base(model)
    trainable, total = count_parameters(base if tuner is None else tuner)
    configs = getattr(model, "peft_config", {})
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={
            name: str(getattr(config.peft_type, "value", config.peft_type)) for name, config in configs.items()
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=_agreed([layer.active_adapters for layer in layers if layer.available_adapters] or [[]]),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _agreed([layer.requires_grad[name] for layer in layers if name in layer.requires_grad])
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])}) for name in names
        },
        quantization_backend=_agreed([layer.quantization_backend for layer in layers]),
    )
