"""Regular expressions for names, matched in a bounded time, whoever wrote them.

`re` cannot be stopped, and for an expression such as `(a+)+$` it may try exponentially many ways. The package `regex`
can; a name takes it about ten times as long, so `re` matches what has few repeats.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

#: characters that an expression may have
_LONGEST = 200_000
#: an expression with more repeats, or with a repeated group, is not left to `re`
_FEW_REPEATS, _REPEAT, _REPEATED_GROUP = 3, re.compile(r"(?<!\()[*+?{]"), re.compile(r"\)[*+{]")
#: seconds that matching may take at once; what each match adds to what is left of them, as does the time between two
_MOST_SECONDS, _SECONDS_EACH = 1.0, 5e-6


class PatternError(ValueError):
    """A regular expression that is none, or that takes too long."""


class _Left(threading.local):
    """The seconds that a thread has left for matching, and when it last matched."""

    seconds = _MOST_SECONDS
    since = 0.0


_left = _Left()


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a regular expression matches all of `text`.

    Raises:
        PatternError: it is no regular expression, or matching takes too long.
    """
    compiled = _compiled(pattern)
    left = min(_MOST_SECONDS, _left.seconds + _SECONDS_EACH + time.monotonic() - _left.since)
    start = time.thread_time()
    try:
        match = compiled.fullmatch(text) if isinstance(compiled, re.Pattern) else compiled.fullmatch(text, timeout=left)
        _left.seconds = left - (time.thread_time() - start)
    except TimeoutError:
        _left.seconds = 0.0
    _left.since = time.monotonic()
    if _left.seconds <= 0:
        _left.seconds = _MOST_SECONDS
        raise PatternError(f"{_short(pattern)} takes too long to match; write it more simply")
    return match is not None


def get_pattern_key(entries: Iterable[str], key: str) -> str:
    """The first of `entries` (regular expressions for the end of a name) that fits `key`; `key` if none does."""
    return next((entry for entry in entries if fullmatch(rf"(.*\.)?({entry})", key)), key)


def check(pattern: str) -> None:
    """Raises PatternError if `pattern` is no regular expression."""
    if not re.fullmatch(r"[\w.]*", pattern):
        _compiled(pattern)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


@lru_cache(maxsize=1 << 16)  # a rank for each module of a large model is more than `re` remembers
def _compiled(pattern: str) -> re.Pattern[str] | regex.Pattern[str]:
    if len(pattern) > _LONGEST:
        raise PatternError(f"{_short(pattern)} has {len(pattern):,} characters, {_LONGEST:,} at most are matched")
    try:
        compiled = re.compile(pattern)
        if len(_REPEAT.findall(pattern)) <= _FEW_REPEATS and not _REPEATED_GROUP.search(pattern):
            return compiled
        import regex  # takes a while, and few need it

        return regex.compile(pattern)
    except RecursionError:
        raise PatternError(f"{_short(pattern)} is nested too deeply") from None
    except Exception as error:  # each package has its own
        raise PatternError(f"{_short(pattern)} is no regular expression: {error}") from None
