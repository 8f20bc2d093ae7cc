"""A change of state goes through all parts of a model, or through none: an error on the way takes it back, and no pass
that another thread has begun sees some parts before and some after it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from peft.core import merge as merging
from peft.core.layer import AdapterLayer
from peft.core.part import Part
from peft.core.storage.shared import part_of
from peft.core.undo import undone_on_error
from peft.core.walk import parts_of
from peft.errors import warn


class _Pass:
    """A pass that is under way in this thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class _Passes:
    """Those of one model. What ends without a word, by an interrupt, is not waited for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running: WeakSet[_Pass] = WeakSet()


_PASSES: WeakKeyDictionary[nn.Module, _Passes] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # a forked process has none of the other threads, which would never end there
    os.register_at_fork(after_in_child=_PASSES.clear)
#: seconds after which a thread that waits for the passes of others says so
_PATIENCE = 10.0


def passing(holder: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, no other thread changes the state of the adapters that this object holds; see `whole`."""
    return nullcontext() if torch.compiler.is_compiling() else _passing(holder)


@contextmanager
def _passing(holder: nn.Module) -> Iterator[None]:
    passes, own = _PASSES.setdefault(holder, _Passes()), _Pass()
    with passes.changed:
        passes.running.add(own)
    try:
        yield
    finally:
        with passes.changed:
            passes.running.discard(own)
            passes.changed.notify_all()


@contextmanager
def alone(holder: nn.Module) -> Iterator[None]:
    """Waits for the passes of other threads to end; while it lasts, none begins. In a pass it does not wait."""
    passes, me = _PASSES.setdefault(holder, _Passes()), threading.get_ident()
    said = time.monotonic() + _PATIENCE
    with passes.changed:
        while passes.running and all(other.thread != me for other in passes.running):
            passes.changed.wait(0.1)
            if time.monotonic() > said:
                said = float("inf")
                warn(
                    "The state of the adapters changes when the passes that other threads have begun are over; one has"
                    " not ended yet. It never will if it waits for this thread, as a generation does whose reader"
                    " changes adapters before all is read."
                )
        yield


#: what says which adapters of a part act, and which are trained
_STATE = ("_active", "_trained", "_disable_adapters", "_trained_before_disable")
_state_of = attrgetter(*_STATE)


@contextmanager
def whole(
    holder: Any,
    parts: Iterable[Part],
    names: Sequence[str] = (),
    deleted: bool = False,
    held: Sequence[Any] = (),
) -> Iterator[None]:
    """Gives all parts back the state they had if it ends by an error, an interrupt too; see `alone`.

    Args:
        holder: the tuner, or the model with soft prompts: what knows the configurations and which adapters are active.
        parts: the parts of its model.
        names: adapters that become active, so that these or those before may become trainable or cease to be.
        deleted: whether an adapter goes, so that any may become active.
        held: what has tensors of the adapters by name beside the parts: modules and dictionaries.
    """
    with alone(holder):
        parts, active = list(parts), holder._active
        # Lists over all parts, and few objects for each: a model may have tens of thousands of them.
        states = [_state_of(part) for part in parts]
        ledgers = [(part, part.ledger.entries, part.ledger.paused) for part in parts if isinstance(part, AdapterLayer)]
        put_back = _entries_of([*held, holder.peft_config, *(_contents_of(parts) if deleted else ())])
        touched = ((part, name) for part in parts for name in _touched(part, names, deleted))
        parameters = [parameter for part, name in touched for parameter in part.adapter_parameters(name)]
        parameters += [p for module in held if isinstance(module, nn.Module) for p in module.parameters()]
        learned = [parameter.requires_grad for parameter in parameters]
        try:
            yield
        except BaseException:
            put_back()
            for part, state in zip(parts, states, strict=True):
                _let_learn(part._trained_before_disable, True)
                vars(part).update(zip(_STATE, state, strict=True))
                _let_learn(part._trained_before_disable, False)
            # When all have theirs: layers around one module merge for each other.
            for layer, entries, paused in ledgers:
                if layer.ledger.entries != entries:
                    merging.rewrite(layer, entries)
                layer.ledger.paused = paused
            for parameter, requires_grad in zip(parameters, learned, strict=True):
                parameter.requires_grad_(requires_grad)
            for part in parts:
                part.refresh()
            holder._active = active
            raise


def _contents_of(parts: Iterable[Part]) -> Iterator[Any]:
    """What holds the tensors, configurations and settings that adapters have on parts."""
    for part in parts:
        yield from (*part.containers(), part.configs, *part.settings.values())


def _touched(part: Part, names: Sequence[str], deleted: bool) -> Iterable[str]:
    """The adapters whose parameters may become trainable or cease to be."""
    return part.adapter_names() if deleted else {*names, *part._active, *part._trained} if names else ()


def _let_learn(parameters: Iterable[nn.Parameter], learns: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(learns)


@contextmanager
def contents_kept(model: Any, name: str, more: Iterable[Tensor] = (), values: bool = True) -> Iterator[None]:
    """Gives an adapter the tensors, values, settings and configuration back that it had if it ends by an error.

    Args:
        model: the model.
        name: the adapter, or the name of none.
        more: further tensors whose values come back.
        values: False for an adapter that is taken out in that case anyway: the values of `more` alone.
    """
    parts = [part for _, part in parts_of(model) if part.has(name)] if values else []
    held: list[Any] = [container for part in parts for container in (*part.containers(), *part.all_containers())]
    if values and "prompt_encoder" in model._modules:
        held.append(model._modules["prompt_encoder"])
    entries = [container[name] for container in held if name in container]
    inside = [module for entry in entries if isinstance(entry, nn.Module) for module in entry.modules()]
    settings = [by_adapter for part in parts for by_adapter in (*part.settings.values(), part.configs)]
    held += [*inside, *map(vars, inside), *settings, *([vars(model.peft_config[name])] if values else ())]
    tensors = [*more, *entries, *(by_adapter.get(name) for by_adapter in settings)]
    tensors += [tensor for module in inside for tensor in (*module._parameters.values(), *module._buffers.values())]
    own = {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_meta}
    before = [(part, part.clone()) for part in map(part_of, own.values())]
    put_back = _entries_of(held)

    def take_back() -> None:
        put_back()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        for part in parts:
            part.refresh()

    with undone_on_error(take_back):
        yield


def _entries_of(containers: Sequence[Any]) -> Callable[[], None]:
    """What gives containers the entries back that they have now, in their order."""
    inside = list(_dicts_of(containers))
    before = [dict(entries) for entries in inside]

    def put_back() -> None:
        for entries, those in zip(inside, before, strict=True):
            entries.clear()
            entries.update(those)

    return put_back


def _dicts_of(containers: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """What containers hold their entries in."""
    for container in containers:
        if isinstance(container, nn.Module):
            kinds = ("_modules", "_parameters", "_buffers", "_keys")
            yield from (container.__dict__[kind] for kind in kinds if kind in container.__dict__)
        else:
            yield container
