"""What this library raises and warns with, beyond Python's own exceptions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType

#: packages whose lines are not what a warning is about: it names the first line outside of them
_INSIDE = ("peft", "torch", "contextlib", "functools")


class PeftError(Exception):
    """Base of the errors that only this library knows."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A configuration targets modules or parameters that the model does not have."""


class AdapterFileError(PeftError, ValueError):
    """A file of an adapter is damaged, or says what a file may not say; the message names the file."""


class NoAdapterError(PeftError, ValueError):
    """Where an adapter was looked for, there is none."""


class UnknownMethodError(PeftError, KeyError):
    """A method (`peft_type`) that this version does not know."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class PeftWarning(UserWarning):
    """Something was asked for that has no effect, or an effect worth knowing about."""


class PeftRuntimeWarning(PeftWarning, RuntimeWarning):
    """Settings that match nothing in a model. A RuntimeWarning too, since that is the class that callers filter by."""


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def warn(message: str, category: type[Warning] = PeftWarning) -> None:
    """Warns of something, with the line of whoever called into this library."""
    level, frame = 1, sys._getframe()
    outer: FrameType | None = frame
    while outer is not None and outer.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, outer = level + 1, outer.f_back
    warnings.warn(message, category, stacklevel=level)
