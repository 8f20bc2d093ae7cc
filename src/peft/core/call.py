"""Facts of one call of a model: which adapter each sample gets, and what methods have found out about the input.

A call has its facts in one object, from where it enters the model to where it leaves it. Threads do not see each
other's. Where gradient checkpointing runs layers again in the backward pass, they see those of the call that they
belong to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peft.core.routing import Route
from peft.ops.internals import backward_pass


@dataclass
class Call:
    """What is known of one call of a model.

    Attributes:
        route: the adapter of each sample; None where all get the active ones.
        facts: what methods have noted, by a key of theirs (the tasks of the samples, say).
    """

    route: Route | None = None
    facts: dict[Any, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.route is not None or bool(self.facts)


class _State(threading.local):
    def __init__(self) -> None:  # in each thread; with defaults of the class, a compiled graph would fail its own guard
        self.call: Call | None = None
        #: the backward pass that it was set in, -1 for none
        self.within = -1
        #: what was under way before the calls that have begun
        self.outer: tuple[tuple[Call | None, int], ...] = ()


_STATE = _State()


def current() -> Call | None:
    """The call that is under way in this thread; None if there is none, or nothing to know of it."""
    call = _STATE.call
    return call if call is None or _STATE.within == backward_pass() else None


def current_route() -> Route | None:
    """The route of the call that is under way."""
    call = current()
    return None if call is None else call.route


def fact(key: Any, default: Any = None) -> Any:
    """What a method has noted of the call that is under way."""
    call = current()
    return default if call is None else call.facts.get(key, default)


def begin(call: Call) -> None:
    """Makes this call the one under way, until `end`."""
    _STATE.outer = (*_STATE.outer, (_STATE.call, _STATE.within))
    _STATE.call, _STATE.within = call, backward_pass()


def end() -> None:
    """Ends what `begin` began last."""
    *outer, (_STATE.call, _STATE.within) = _STATE.outer
    _STATE.outer = tuple(outer)


@contextmanager
def calling(**facts: Any) -> Iterator[Call]:
    """While it lasts, a call is under way that knows these facts (`route` among them) beside those known before."""
    outer = current() or Call()
    call = Call(facts.pop("route", outer.route), {**outer.facts, **facts})
    begin(call)
    try:
        yield call
    finally:
        end()


def remember_for_backward(output: Any, call: Call) -> None:
    """Sees to it that layers which run again in the backward pass of `output` see the facts of its call.

    A backward pass reaches the outputs of a call before the layers of it, and after those of any later call.
    """

    def recall(grad: Tensor) -> None:
        _STATE.call, _STATE.within = call, backward_pass()

    for tensor in with_gradient(output):
        tensor.register_hook(recall)


def with_gradient(output: Any) -> list[Tensor]:
    """What of a model's output a backward pass may begin at."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache of keys and values holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache[0][0].shape[-2] if len(cache) else 0
