"""Modules that have several places in a model: what is put in one of them is in all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from peft.core.biases import TrainedBiases
from peft.core.model_config import embeddings_of
from peft.core.part import Part
from peft.core.plan import Plan
from peft.core.targets import base_of
from peft.core.walk import live_key, live_modules
from peft.core.wrappers import TrainableTokensWrapper


def unite_embeddings(model: Any, plan: Plan, undo: ExitStack) -> None:
    """Puts the input embedding, if it gets an adapter or is trained in full, in place of those that are the same.

    T5 and BART look tokens up in `encoder.embed_tokens` and `decoder.embed_tokens`, modules with the weight of
    `shared`, which nobody calls. Modules that are named themselves are left alone. `undo` gets what undoes it.
    """
    embedding: Any = embeddings_of(model)
    named = {id(target.base) for target in plan.targets} | {
        id(base_of(model.get_submodule(live_key(model, key)))) for key in plan.save
    }
    weight = getattr(embedding, "_parameters", {}).get("weight")
    if id(embedding) not in named or weight is None:
        return
    others = [
        (holder, name, child)
        for _, holder in live_modules(model)
        for name, child in holder._modules.items()
        if child is not None and type(child) is type(embedding) and child._parameters.get("weight") is weight
        and id(child) not in named
    ]  # fmt: skip
    for holder, name, child in others:
        undo.callback(holder._modules.__setitem__, name, child)
        holder._modules[name] = embedding


def put_everywhere(model: nn.Module) -> None:
    """Puts parts in all places of the modules that they are around or stand for."""
    holders = [module for _, module in live_modules(model) if not isinstance(module, Part)]
    outer: dict[int, nn.Module | None] = {}
    for holder in holders:
        for child in holder._modules.values():
            inner: Any = child
            if isinstance(child, (Part, TrainableTokensWrapper)) and not isinstance(child, TrainedBiases):
                while isinstance(inner, (Part, TrainableTokensWrapper)):
                    inner = inner.wrapped
                outer[id(inner)] = child
    for holder in holders:
        for name, child in holder._modules.items():
            if id(child) in outer:
                holder._modules[name] = outer[id(child)]


def take_away_everywhere(model: nn.Module, left: Mapping[Part, nn.Module | None]) -> None:
    """Puts in all places of parts what is left where they were."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            part: Any = child.wrapped if isinstance(child, TrainableTokensWrapper) else child
            if isinstance(part, Part) and left.get(part) is not None:
                module._modules[name] = left[part]
