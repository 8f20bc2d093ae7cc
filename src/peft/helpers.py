"""Small tools around a model with adapters."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn

from peft.config import read_config_file
from peft.core.layer import AdapterLayer
from peft.errors import PeftWarning


def update_forward_signature(model: Any) -> None:
    """Gives `model.forward`, where it is `forward(*args, **kwargs)`, the base model's signature and docstring.

    Args:
        model: a [`PeftModel`]; only this object changes, not its class.
    """
    _take_over_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Gives `model.generate` the base model's signature and docstring. See `update_forward_signature`."""
    _take_over_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Gives methods of `model` the base model's signatures and docstrings.

    Args:
        model: a [`PeftModel`]; only this object changes, not its class.
        method: `"forward"`, `"generate"` or `"all"`.

    Raises:
        ValueError: another `method`.
    """
    names = {"forward": ("forward",), "generate": ("generate",), "all": ("forward", "generate")}
    if method not in names:
        raise ValueError(f"Unknown method {method!r}: choose {', '.join(map(repr, names))}.")
    for name in names[method]:
        _take_over_signature(model, name)


def _take_over_signature(model: Any, name: str) -> None:
    original = getattr(model.get_base_model(), name, None)
    of_class = getattr(type(model), name, None)
    if original is None or of_class is None:
        return
    kinds = {parameter.kind for parameter in list(inspect.signature(of_class).parameters.values())[1:]}
    if kinds != {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return  # it has named arguments of its own

    # Through the class, so that a copy of the model calls itself and not the model it was copied from.
    @wraps(original, updated=())
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    del call.__wrapped__
    call.__signature__ = _with_self(inspect.signature(original))  # type: ignore[attr-defined]
    model.__dict__[name] = MethodType(call, model)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def check_if_peft_model(model_name_or_path: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds a saved adapter. False also where the hub cannot be asked."""
    try:
        return "peft_type" in read_config_file(model_name_or_path)
    except ValueError:
        return False


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While it lasts, the scaling of all adapters is multiplied by a number; between 0 and 1 it weakens them.

    For LoRA this interpolates between base model and fine-tuned model (wise-ft, arXiv:2109.01903).

    Args:
        model: a model with adapters that have a scaling.
        multiplier: the factor.

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: no adapter in the model has a scaling.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier must be a float, got {type(multiplier).__name__}.")
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, AdapterLayer) and getattr(module, "scaling", None)
    ]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter layers with a scaling, such as those of LoRA.")
    if any(layer.merged for layer in layers):
        warnings.warn(
            "Adapters that are merged into the base weights keep their scale: unmerge_adapter() first.",
            PeftWarning,
            stacklevel=3,
        )
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * multiplier for name, scale in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """While it lasts, adapter layers leave the dtype of their input alone, as diffusers' layerwise casting needs.

    They always do: it is the adapter's weights that are brought to the dtype of the input, never the other way round.
    So there is nothing to switch off or on again, and callers may go on saying what they rely on.

    Args:
        model: a model with adapters.
        active: False asks for no change.
    """
    yield
