"""Changes that are taken back: if what they belong to ends by an error, or when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any


class _Undo(ExitStack):
    """What takes added adapters back out, and gives filled ones their contents back."""

    #: whether it has something to take back
    filled = False


#: while adapters are added and then filled
_UNDO: ContextVar[_Undo | None] = ContextVar("_UNDO", default=None)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Takes the adapters that are added while it lasts back out if it ends by an error."""
    with _Undo() as undo:
        token = _UNDO.set(undo)
        try:
            yield
        finally:
            _UNDO.reset(token)
        hand_over(undo)


@contextmanager
def undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` if it ends by an error, or if [`all_or_nothing`] around it does."""
    with ExitStack() as stack:
        stack.callback(undo)
        yield
        hand_over(stack)


def as_before(thing: Any) -> Callable[[], None]:
    """What gives an object the attributes back that it has now."""
    before = dict(thing.__dict__)

    def put_back() -> None:
        for name in thing.__dict__.keys() - before.keys():
            del thing.__dict__[name]
        thing.__dict__.update(before)

    return put_back


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For a while, an object has `value` as its attribute `name`."""
    before = {key: own for key, own in owner.__dict__.items() if key == name}
    owner.__dict__[name] = value
    try:
        yield
    finally:
        del owner.__dict__[name]
        owner.__dict__.update(before)


def hand_over(undo: ExitStack) -> None:
    """What `undo` would have done is not needed any more, unless [`all_or_nothing`] around it ends by an error."""
    kept, later = undo.pop_all(), _UNDO.get()
    if later is not None:
        later.push(kept)
        later.filled = True


def is_adding() -> bool:
    """Whether an adapter was added in an [`all_or_nothing`] that has not ended, which would take it back out."""
    undo = _UNDO.get()
    return undo is not None and undo.filled
