"""Adapters merged into all layers of a model, and adapter layers taken off it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peft.core import merge as merging
from peft.core.around import see_to_fast_paths
from peft.core.auxiliary import ModulesToSaveWrapper
from peft.core.layer import AdapterLayer
from peft.core.method import Adapters
from peft.core.part import Part, as_names
from peft.core.places import take_away_everywhere
from peft.core.storage.flat import check_uncut
from peft.core.tokens import TrainableTokensLayer
from peft.core.tying import tied_embedding_modules
from peft.core.walk import live_key, put_back, with_progress
from peft.core.whole import alone
from peft.core.wrappers import held
from peft.errors import listed, warn


def check_merge(tuner: Adapters, adapter_names: Sequence[str] | None) -> None:
    """Warns of names that do not exist; raises NotImplementedError where some layer cannot merge an adapter."""
    names = _names_or_active(tuner, adapter_names)
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        warn(f"Adapter {', '.join(unknown)} does not exist and is not merged.")
    _check_not_cut(tuner)
    for layer in tuner.adapter_layers():
        for name in names:
            if layer.has(name) and name not in layer.merged_adapters:
                layer.check_mergeable(name)


def _check_not_cut(tuner: Adapters) -> None:
    """Raises RuntimeError where FSDP1 has the base weights in parts."""
    layers = ((layer.get_base_layer(), layer.op.weight_name) for layer in tuner.adapter_layers())
    held = {f"{name} of a {type(base).__name__}": getattr(base, name, None) for base, name in layers if name}
    check_uncut(tuner.model, held)


def _names_or_active(tuner: Adapters, names: Sequence[str] | None) -> list[str]:
    return tuner.active_adapters if names is None else as_names(names)


def check_finite(tuner: Adapters, adapter_names: Sequence[str] | None) -> None:
    """Raises ValueError where merging would write what is not finite."""
    names = _names_or_active(tuner, adapter_names)
    for layer in tuner.adapter_layers():
        here = [name for name in names if layer.has(name) and name not in layer.merged_adapters]
        if here:
            merging.check_finite(layer, here)


def merge_all(
    tuner: Adapters, adapter_names: Sequence[str] | None, safe: bool, keep: bool = True, progressbar: bool = False
) -> None:
    """Merges adapters in all layers; for good unless `keep`."""
    # Inner layers first: what they make of the weight is what the outer ones change.
    shared, layers = _shared_weights(tuner.model), list(tuner.adapter_layers())[::-1]
    last = {id(layer.ledger): layer for layer in layers}  # those before it around its module need the original
    for layer in with_progress(layers, progressbar, "Merging"):
        own = layer.ledger.own or _is_shared(layer, shared)
        layer.merge(safe, adapter_names, keep or last[id(layer.ledger)] is not layer, own)


def unmerge_all(tuner: Adapters) -> None:
    """Takes out of all layers what is merged, or would be again when the adapters are switched on."""
    merged = [layer for layer in tuner.adapter_layers() if layer.merged or layer.ledger.of(layer, paused=True)]
    if not merged:
        warn("No adapter is merged: nothing to do.")
    _check_not_cut(tuner)
    for layer in merged:
        layer.unmerge()


def take_out(layers: Iterable[AdapterLayer], adapter_name: str) -> None:
    """Takes an adapter out of all weights, which comes before it is deleted: layers may have rows in common."""
    for layer in layers:
        merging.unmerge(layer, [adapter_name])


def delete(tuner: Adapters, adapter_name: str) -> None:
    """Takes an adapter out of all parts; if it was the only active one, the first that is left becomes active."""
    method = tuner.method(tuner.peft_config[adapter_name])
    del tuner.peft_config[adapter_name]
    active = tuner.active_adapters
    left = [name for name in active if name != adapter_name]
    gone, waiting = not left, list[str]()
    if gone and tuner.peft_config:
        left = [next(iter(tuner.peft_config))]
    take_out(tuner.adapter_layers(), adapter_name)
    for key, part in tuner.parts():
        # A module that the deleted adapter did not train stays as it is, as in huggingface/peft.
        takes_over = isinstance(part, AdapterLayer) or part.has(adapter_name)
        part.delete_adapter(adapter_name)
        if gone and takes_over and any(map(len, part.containers())):
            part.set_adapter(left, bool(left) and tuner.peft_config[left[0]].inference_mode)
        elif gone and not takes_over and left and part.has(left[0]):
            waiting.append(key)
    if gone and left and active:
        rest = f", but not its {listed(waiting)}, until set_adapter({left[0]!r})" if waiting else ""
        warn(f"Adapter {adapter_name!r} was active; {left[0]!r} is now{rest}.")
    method.forget_shared(adapter_name)
    tuner._active = left
    method.removed(adapter_name)


def unload(
    tuner: Adapters,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Takes all parts off the model, after merging for good if `merge`, and returns it."""
    with alone(tuner):
        model: nn.Module = tuner.model
        tied = tied_embedding_modules(model) if merge else []
        alike = _kept_alike(tuner, tied, adapter_names)
        if merge:
            merge_all(tuner, adapter_names, safe_merge, keep=False, progressbar=progressbar)
        _take_off(tuner, merge, adapter_names, progressbar and not merge)
        for key in tied[1:] if alike else ():
            model.get_submodule(key).weight = model.get_submodule(tied[0]).weight
        config: Any = getattr(model, "config", None)
        if tied and getattr(config, "tie_word_embeddings", False) and tied_embedding_modules(model) != tied:
            config.tie_word_embeddings = False  # else they become one again on loading
            warn("Merging gave embeddings and output layer weights of their own: tie_word_embeddings is now False.")
        see_to_fast_paths(model)
        gone = [(method, name) for method in tuner.methods() for name in tuner.peft_config]
        model.__dict__.pop("peft_config", None)
        tuner.peft_config, tuner._parts = {}, None
        for method, name in gone:
            method.removed(name)
        return model


def _take_off(tuner: Adapters, merged: bool, names: Sequence[str] | None, progressbar: bool) -> None:
    """Takes the parts off the model; those with modules trained in full stay if the method wants it so."""
    stay = merged and not all(method.unwraps_saved for method in tuner.methods())
    names = None if names is None else as_names(names)
    left: dict[Part, nn.Module | None] = {}
    for key, part in with_progress(tuner.parts()[::-1], progressbar, "Unloading"):
        if stay and isinstance(part, ModulesToSaveWrapper):
            warn(
                f"{type(tuner).__name__} leaves {key!r} in its {type(part).__name__}, with what was trained in"
                " effect; its `current_module()` is the plain module."
            )
        else:
            left[part] = part.unload(merged, names)
            put_back(tuner.model, key, left[part])
    take_away_everywhere(tuner.model, left)


def _shared_weights(model: nn.Module) -> set[int]:
    """Parameters that several modules hold (tied embeddings, replicated layers)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _is_shared(layer: AdapterLayer, shared: set[int]) -> bool:
    # Tied modules with trained tokens share those as well, as a rule, so they stay tied.
    return id(layer.own_weight) in shared and not (isinstance(layer, TrainableTokensLayer) and layer.has_twin)


def _kept_alike(tuner: Adapters, tied: Sequence[str], names: Sequence[str] | None) -> bool:
    """Whether these adapters change the modules tied to the input embedding, and keep them the same."""
    names, stacks = _names_or_active(tuner, names), set[tuple[Any, ...]]()
    for key in tied:
        layer: Any = tuner.model.get_submodule(live_key(tuner.model, key))
        if isinstance(layer, ModulesToSaveWrapper) and layer.active_adapters:
            return False  # what is trained in full takes their place
        layer, stack = held(layer), []
        while isinstance(layer, AdapterLayer):
            stack += [(layer.parameter_name, name) for name in names if layer.has(name)]
            layer = layer.base_layer
        stacks.add(tuple(stack))
    here = {name for stack in stacks for _, name in stack}
    configs = [tuner.peft_config[name] for name in here]
    return len(stacks) == 1 and here != set() and all(getattr(c, "ensure_weight_tying", False) for c in configs)
