"""Tied weights: an embedding and an output layer that are one tensor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.core.model_config import embeddings_of
from peft.core.targets import check_target_module_exists, ends_with, model_modules, saved_as
from peft.core.wrappers import held
from peft.errors import warn


def tied_embedding_modules(model: Any) -> list[str]:
    """Names of the modules that share the input embedding's weight, the embedding first; empty if none does."""
    embedding = embeddings_of(model)
    weight = None if embedding is None else _plain_weight(embedding)
    if weight is None:
        return []
    tied = [key for key, module in model_modules(model) if key and _plain_weight(module) is weight]
    first = input_embedding_name(model)
    return sorted(tied, key=lambda key: key != first) if len(tied) > 1 else []


def input_embedding_name(model: Any) -> str:
    """The name of the model's input embedding; `embed_tokens` where the model does not say which it is."""
    embedding = held(embeddings_of(model))
    return next((key for key, module in model_modules(model) if module is embedding), "embed_tokens")


def _plain_weight(module: nn.Module) -> Any:
    """A module's own weight, whatever wraps it and is merged into it; None where it has none."""
    while True:
        module = held(module)
        inside, ledger = module._modules, module.__dict__.get("ledger")
        inner = inside.get("base_layer")
        kept = ledger and ledger.originals.get("weight")
        if inner is None or isinstance(kept, nn.Parameter):  # merged into a weight of its own
            return module._parameters.get("weight") if inner is None else kept
        module = inner


def tie_configuration(config: Any, model: nn.Module) -> tuple[list[str], list[str]]:
    """With `ensure_weight_tying`, lets a configuration that names one of several tied modules mean all of them.

    Returns the names of modules to adapt beyond those that `target_modules` names, and of modules to train in full
    beyond those that `modules_to_save` names.
    """
    if not getattr(config, "ensure_weight_tying", False):
        return [], []
    tied = tied_embedding_modules(model)
    if not tied:
        warn("ensure_weight_tying has no effect: the model ties no weights.")
        return [], []
    saved = config.modules_to_save or ()
    # The usual names mean the embeddings of models that call them otherwise too (GPT-2's wte).
    if any(saved_as(key, saved) for key in tied) or any(name.endswith(("embed_tokens", "lm_head")) for name in saved):
        config.modules_to_save = sorted({*saved, tied[0]})
        return [], [key for key in tied if not saved_as(key, saved)]
    named = copy.copy(config)
    named.layers_to_transform = None  # no embedding is in one of the layers
    if any(check_target_module_exists(named, key) for key in tied):
        if not isinstance(config.target_modules, str):
            # The embedding stands for all of them; what means others alone would have their weights stored as well.
            others = [key for key, _ in model_modules(model) if key not in tied[1:]]

            def means(entry: str, keys: list[str]) -> bool:
                return any(ends_with(key, {entry}) for key in keys)

            kept = {entry for entry in config.target_modules if means(entry, others) or not means(entry, tied)}
            config.target_modules = kept | {tied[0]}
        return [key for key in tied if not check_target_module_exists(config, key)], []
    if not getattr(config, "trainable_token_indices", None):
        warn(f"ensure_weight_tying has no effect: {', '.join(tied)}, which share a weight, are no targets.")
    return [], []


def warn_of_tied_targets(targets: Sequence[str], config: Any, model: nn.Module) -> None:
    """Says what happens when one of several modules that are the same tensor gets an adapter."""
    tied, get = tied_embedding_modules(model), dict(model_modules(model)).get
    hit = [key for key in tied if key in targets] or [
        key for key in tied if config.modules_to_save and saved_as(key, config.modules_to_save)
    ]
    one = {id(get(key)) for key in hit}
    if hit and not getattr(config, "ensure_weight_tying", False) and len({id(get(key)) for key in tied}) > 1:
        others = [key for key in tied if key not in hit and id(get(key)) not in one]
        warn(
            f"{', '.join(hit)} shares its weight with {', '.join(others) or 'each other'} (tied embeddings), and the"
            " adapter changes it alone. Merging gives it a weight of its own; to save the merged model so, set"
            " config.tie_word_embeddings=False, or else the copies become one again on loading."
            " ensure_weight_tying=True keeps them the same."
        )
