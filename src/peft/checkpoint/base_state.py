"""The state dict of a base model that has adapters, by the names that its tensors have without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peft.checkpoint.state import IncompatibleKeys
from peft.core.biases import TrainedBiases
from peft.core.targets import base_of, model_modules
from peft.core.walk import parts_of


def _base_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model, each with what the names of its tensors begin with, as often as it has a name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, module in model_modules(base):
        if not isinstance(module, TrainedBiases):
            yield f"{path}." if path else "", base_of(module)


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the base model has, or would have, without adapters; merged ones are in its values.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Returns:
        Tensors by their names in the base model; the same as `state_dict()` gives for it alone.
    """
    state: dict[str, Tensor] = {}
    for prefix, module in _base_modules(model):
        module._save_to_state_dict(state, prefix, keep_vars=False)
        for biases in module.children():
            if isinstance(biases, TrainedBiases):
                state.update({prefix + name: value.detach() for name, value in biases.of(None).items()})
    return state


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Puts the state dict of a base model into one that has adapters, which stay as they are.

    All names and shapes are checked before the first tensor is copied.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: tensors by their names in the base model.
        strict: raise where names are missing, or unknown.

    Returns:
        `missing_keys` and `unexpected_keys`.

    Raises:
        RuntimeError: names do not agree (`strict`), or shapes do not.
        ValueError: adapters are merged, so that the weights are not the base model's alone.
    """
    if any(part.merged_adapters for _, part in parts_of(model)):
        raise ValueError("The base model's weights have adapters merged into them; call unmerge_adapter() first.")
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    errors = []
    if strict and missing:
        errors.append(f"missing: {', '.join(missing)}")
    if strict and unexpected:
        errors.append(f"unexpected: {', '.join(unexpected)}")
    for key, value in state_dict.items():
        there = own.get(key)
        if isinstance(there, Tensor) and isinstance(value, Tensor) and there.shape != value.shape:
            errors.append(f"size mismatch for {key}: got {tuple(value.shape)}, the model has {tuple(there.shape)}")
    for prefix, module in _base_modules(model) if not errors else ():
        module._load_from_state_dict(dict(state_dict), prefix, {}, False, [], [], errors)
    if errors:
        raise RuntimeError(f"The state dict does not fit {type(model).__name__}:\n  " + "\n  ".join(errors))
    return IncompatibleKeys(missing, unexpected)
