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
from peft.core.targets import base_of, ends_with, model_places
from peft.core.undo import as_before
from peft.core.walk import live_modules
from peft.core.wrappers import TrainableTokensWrapper, held

#: an attribute of a model: the modules that its input embedding is in place of, as (holder, name there, module)
_UNITED = "_united_embeddings"


def unite_embeddings(model: Any, plan: Plan, config: Any, undo: ExitStack) -> None:
    """Puts the input embedding, if it gets an adapter or is trained in full, in place of those that are the same.

    T5 and BART look tokens up in `encoder.embed_tokens` and `decoder.embed_tokens`, modules with the weight of
    `shared`, which nobody calls. Modules that are named themselves are left alone. `undo` gets what undoes it.

    Raises:
        ValueError: of two adapters, one names the embedding, and the other one of those.
    """
    embedding = _base(embeddings_of(model))
    weight, united = getattr(embedding, "_parameters", {}).get("weight"), model.__dict__.get(_UNITED, [])
    if not united and not plan.save and not any(target.base is embedding for target in plan.targets):
        return
    places = list(model_places(model))
    rows = getattr(config, "trainable_token_indices", None)
    adapted = {*(target.key for target in plan.targets), *plan.save}
    named = adapted | {key for key, *_ in places if ends_with(key, rows if isinstance(rows, Mapping) else ())}
    taken = {(holder, name) for holder, name, _ in united}
    there = [key for key, _, holder, name in places if key in named and (holder, name) in taken]
    on_it = any(_base(module) is embedding and key in adapted.difference(there) for key, module, *_ in places)
    if there and not on_it:
        raise ValueError(
            f"The input embedding has an adapter and is in place of {there[0]!r}, so that cannot have one of its own:"
            " name the input embedding."
        )
    if not on_it or weight is None:
        return
    others = [
        (key, holder, name)
        for key, module, holder, name in places
        if type(base := _base(module)) is type(embedding) and base is not embedding
        and base._parameters.get("weight") is weight and key not in named
    ]  # fmt: skip
    apart = [key for key, holder, name in others if isinstance(holder, Part) or _is_adapted(holder, name)]
    if apart:
        raise ValueError(
            f"{apart[0]!r} has the weight of the input embedding, and parts of its own, so an adapter on the input"
            " embedding would not act there: name the same module for both."
        )
    undo.callback(as_before(model))
    setattr(model, _UNITED, [*united, *((holder, name, _base(holder._modules[name])) for _, holder, name in others)])
    for _, holder, name in others:
        undo.callback(holder._modules.__setitem__, name, holder._modules[name])
        holder._modules[name] = embedding


def _base(module: Any) -> Any:
    """The module of the base model that is in a place."""
    return base_of(held(module)) if module is not None else None


def _is_adapted(holder: nn.Module, name: str) -> bool:
    """Whether the module in a place has adapters, beyond rows that are those of the embedding as well."""
    parts: list[Any] = [part for part in (holder, *holder.get_submodule(name).modules()) if isinstance(part, Part)]
    return any(part.adapter_names() and not getattr(part, "is_tied", False) for part in parts)


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
    """Puts in all places of parts what is left where they were, and modules back that the embedding stood for."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            part: Any = child.wrapped if isinstance(child, TrainableTokensWrapper) else child
            if isinstance(part, Part) and left.get(part) is not None:
                module._modules[name] = left[part]
    part_embeddings(model, ExitStack())


def part_embeddings(model: nn.Module, undo: ExitStack) -> None:
    """Puts the modules back that the input embedding is in place of, if it has no adapter any more."""
    united = model.__dict__.get(_UNITED, [])
    if not united or any(_is_adapted(holder, name) for holder, name, _ in united):
        return
    undo.callback(as_before(model))
    delattr(model, _UNITED)
    for holder, name, module in united:
        undo.callback(holder._modules.__setitem__, name, holder._modules[name])
        module.weight = holder._modules[name].weight
        holder._modules[name] = module
