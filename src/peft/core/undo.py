"""Changes that are taken back if what they belong to ends by an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

#: while adapters are added and then filled: what takes those added back out
_UNDO: ContextVar[ExitStack | None] = ContextVar("_UNDO", default=None)


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Takes the adapters that are added while it lasts back out if it ends by an error."""
    with ExitStack() as undo:
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


def hand_over(undo: ExitStack) -> None:
    """What `undo` would have done is not needed any more, unless [`all_or_nothing`] around it ends by an error."""
    kept, later = undo.pop_all(), _UNDO.get()
    if later is not None:
        later.push(kept)
