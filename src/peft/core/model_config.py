"""What base models and their configurations call things."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn

#: a field of `PromptLearningConfig` -> its names in the configurations of base models
MODEL_CONFIG_NAMES: dict[str, tuple[str, ...]] = {
    "token_dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
}
#: where a configuration made of several keeps that of the text model
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "encoder")

#: what models call the keys and values of earlier tokens: those of transformers "cache" from 5.24 on
CACHE_NAMES = ("cache", "past_key_values")


def cache_in(inputs: Any) -> Any:
    """The keys and values of earlier tokens among a model's inputs or outputs, a mapping; None if there are none."""
    return next((inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None), None)


def take_cache(inputs: dict[str, Any]) -> Any:
    """`cache_in`, and takes it out of the inputs, whatever it is called there."""
    found = cache_in(inputs)
    for name in CACHE_NAMES:
        inputs.pop(name, None)
    return found


def cache_name(model: nn.Module) -> str | None:
    """What a model, or what it passes its inputs on to, calls the keys and values that it takes, if any."""

    def arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(module).forward).parameters

    passed_on = any(argument.kind is argument.VAR_KEYWORD for argument in arguments(model).values())
    takers = model.modules() if passed_on else [model]
    return next((name for module in takers for name in CACHE_NAMES if name in arguments(module)), None)


def is_checkpointed(model: nn.Module) -> bool:
    """Whether a model of transformers makes its activations anew in the backward pass."""
    new = "is_activation_checkpointing"  # newer versions warn of the other name
    return bool(getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing", False))


def model_config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as a dictionary; empty where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return dict(config) if isinstance(config, dict) else {}


def read_model_config(model: Any, *fields: str) -> Any:
    """The first of these fields (of `PromptLearningConfig`, say) that the base model's configuration has; else None."""

    def entry(section: Any, name: str) -> Any:
        return section.get(name) if isinstance(section, Mapping) else getattr(section, name, None)

    config = getattr(model, "config", None)
    sections = [entry(config, name) for name in TEXT_SECTIONS] + [config]
    places = ((section, field) for field in fields for section in sections if section is not None)
    values = (entry(section, name) for section, field in places for name in MODEL_CONFIG_NAMES.get(field, (field,)))
    return next((value for value in values if value is not None), None)


def embeddings_of(model: Any, side: str = "input") -> nn.Module | None:
    """The module that `model.get_input_embeddings()` gives (for `side="output"`, `get_output_embeddings()`).

    None where there is none to be had: models of pictures and sounds lack the method, or raise whatever they meet.
    """
    try:
        found = getattr(model, f"get_{side}_embeddings")()
    except Exception:
        return None
    return found if isinstance(found, nn.Module) else None
