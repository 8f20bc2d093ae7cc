"""Adapters combined into a new one: what is the same for every method that can do so.

A method computes the new adapter's tensors first; then the adapter is added like any other, and filled with them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.part import Part, check_adapter_name, known
from peft.core.targets import matching_entry, model_modules, target_name
from peft.core.tokens import TrainableTokensLayer
from peft.core.undo import all_or_nothing
from peft.errors import warn


def exact_targets(model: nn.Module, keys: Iterable[str], rules: Iterable[Any] = ()) -> set[str] | str:
    """`target_modules` that mean the modules `keys` of a model and no others.

    That is the first of `rules` that does, else their full names, else (where one module's name is the end of
    another's) a regular expression.
    """
    wanted = set(keys)
    modules = [key for key, _ in model_modules(model)]
    for rule in (*rules, wanted):
        if rule and {key for key in modules if matching_entry(rule, key)} == wanted:
            return rule
    return "|".join(re.escape(key) for key in sorted(wanted))


def joined_targets(rules: Sequence[Any]) -> set[str] | str | None:
    """What means everything that any of several `target_modules` means; None for a mixture of names and patterns."""
    if all(isinstance(rule, str) for rule in rules):
        return "|".join(f"({rule})" for rule in dict.fromkeys(rules))
    return None if any(isinstance(rule, str) for rule in rules) else {name for rule in rules for name in rule or ()}


def check_combination(
    method: Method, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> tuple[list[str], list[float]]:
    """The adapters to combine and their weights, as many as there are of both.

    Raises:
        ValueError: there is no such adapter, they train the same module in full, or the new name is taken.
    """
    known(adapters, method.configs)
    check_adapter_name(adapter_name, method.tuner.peft_config)
    if not adapters or not weights:
        raise ValueError("At least one adapter and its weight are needed.")
    if len(adapters) != len(weights):
        used = min(len(adapters), len(weights))
        warn(f"{len(adapters)} adapters and {len(weights)} weights were given; only the first {used} of both are used.")
    names = list(adapters)[: len(weights)]
    if any(method.configs[name].target_parameters for name in names):
        raise ValueError("Adapters with target_parameters (on an nn.Parameter) cannot be combined.")
    _owners(method, names)
    return names, [float(weight) for weight in weights][: len(names)]


def _owners(method: Method, names: Sequence[str]) -> list[tuple[Part, str]]:
    """Modules that one of the adapters trains in full (or rows of them), and which does."""
    owners = []
    for key, part in method.tuner.parts():
        here = [name for name in dict.fromkeys(names) if part.is_beside(name)]
        if len(here) > 1:
            setting = "trainable_token_indices" if isinstance(part, TrainableTokensLayer) else "modules_to_save"
            raise ValueError(
                f"{', '.join(here)} all train {key!r} itself ({setting}), and there is no sum of that. At most one"
                " of the adapters to combine may; the new adapter takes it over as it is."
            )
        owners += [(part, name) for name in here]
    return owners


def layers_with(method: Method, names: Sequence[str]) -> dict[AdapterLayer, str]:
    """The method's layers that have any of the adapters, and what configurations call what they are on."""
    return {
        part: target_name(path, part)
        for path, part in method.tuner.parts()
        if isinstance(part, method.layer_class) and any(part.has(name) for name in names)
    }


def combined_config(method: Method, names: Sequence[str], layers: Mapping[AdapterLayer, str]) -> Any:
    """A configuration like that of the first adapter, for just the modules that any of the adapters is on."""
    configs = [method.configs[name] for name in names]
    config = copy.deepcopy(configs[0])
    config.target_modules = exact_targets(
        method.model, layers.values(), [joined_targets([c.target_modules for c in configs])]
    )
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = sorted({name for c in configs for name in c.modules_to_save or ()}) or None
    tokens = [c.trainable_token_indices for c in configs if getattr(c, "trainable_token_indices", None)]
    if tokens:
        config.trainable_token_indices = tokens[0]
    return config


def add_combined(
    method: Method,
    adapter_name: str,
    names: Sequence[str],
    config: Any,
    tensors: Mapping[AdapterLayer, Mapping[str, Tensor]],
) -> None:
    """Adds an adapter with these tensors, by layer and then by the name that files have for them; all or nothing.

    What one of the adapters `names` trains beside the layers, it takes over.
    """
    owners = _owners(method, names)
    with all_or_nothing():
        method.tuner.inject_adapter(method.model, adapter_name, config=config)
        for layer, values in tensors.items():
            layer.move(adapter_name, dtype=next(layer.dtype_of(name) for name in names if layer.has(name)))
            fill(layer, {live: values[key] for key, live in layer.key_map(adapter_name).items()})
        for part, owner in owners:
            state, before = part.state_dict(), part.key_map(owner)
            fill(part, {live: state[before[key]] for key, live in part.key_map(adapter_name).items()})


@torch.no_grad()
def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors of a module, by their names below it."""
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        getattr(module.get_submodule(path), attribute).copy_(value)
