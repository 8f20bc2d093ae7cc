"""A change of state goes through all parts of a model, or through none: an error on the way takes it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft.core import merge as merging
from peft.core.layer import AdapterLayer
from peft.core.method import Adapters
from peft.core.part import Part

_STATE = ("_active", "_trained", "_disable_adapters", "_trained_before_disable")


@contextmanager
def whole(tuner: Adapters, names: Sequence[str] | None = None, deleting: bool = False) -> Iterator[None]:
    """Gives all parts back the state they had if it ends by an error, an interrupt too.

    Args:
        tuner: what holds them.
        names: adapters that become active, so that these or those before may become trainable or cease to be; none if
            empty, any if None.
        deleting: whether one is deleted.
    """
    shared = [container for method in tuner.methods() for container in method.shared.values()] if deleting else []
    back = [_held(container) for container in [*shared, tuner.peft_config]]
    back += [_state_of(part, names, deleting) for _, part in tuner.parts()]
    active = tuner.active_adapters
    try:
        yield
    except BaseException:
        for take_back in back:
            take_back()
        tuner._active = active
        raise


def _state_of(part: Part, names: Sequence[str] | None, deleting: bool) -> Callable[[], None]:
    """What gives a part the state back that it has now."""
    state = {key: copy.copy(getattr(part, key)) for key in _STATE}
    touched = part.adapter_names() if names is None else {*names, *part._active, *part._trained} if names else ()
    grads = [(p, p.requires_grad) for name in touched for p in part.adapter_parameters(name)]
    containers = (*part.containers(), part.configs, *part.settings.values()) if deleting else ()
    held = [_held(container) for container in containers]
    ledger = part.ledger if isinstance(part, AdapterLayer) else None
    entries, paused = (ledger.entries, ledger.paused) if ledger else ([], [])

    def take_back() -> None:
        for put_back in held:
            put_back()
        off = state["_disable_adapters"]
        for parameter in state["_trained_before_disable"] if off else part._trained_before_disable:
            parameter.requires_grad_(not off)
        for key, value in state.items():
            setattr(part, key, value)
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
        if isinstance(part, AdapterLayer) and ledger is not None:
            if ledger.entries != entries:
                merging.rewrite(part, entries)
            ledger.paused = paused
        part.refresh()

    return take_back


def _held(container: Any) -> Callable[[], None]:
    """What gives a container the entries back that it has now, in their order."""
    inside = (container,)
    if isinstance(container, nn.Module):
        kept = ("_modules", "_parameters", "_buffers", "_keys")
        inside = tuple(container.__dict__[key] for key in kept if key in container.__dict__)
    before = [dict(entries) for entries in inside]

    def put_back() -> None:
        for entries, those in zip(inside, before, strict=True):
            entries.clear()
            entries.update(those)

    return put_back
