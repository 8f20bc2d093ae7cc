"""Regular expressions for names, matched in a time that cannot blow up, whoever wrote them.

`re` tries one way after another, which for an expression such as `(a+)+$` are exponentially many. What could take long
there is matched here by following all ways at once, item by item.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

try:
    from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_constants as _constants
    import sre_parse as _parser

#: ways to match that `re` may try on one name; more are followed all at once
MANY_WAYS = 100_000
#: how long a name is taken to be, for counting them
_LENGTH = 64

_ONE = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.CATEGORY}
_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT}
_LOOKS = {_constants.ASSERT, _constants.ASSERT_NOT}


class PatternError(ValueError):
    """A regular expression that is none, or that could take for ever."""


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a regular expression matches all of `text`.

    Raises:
        PatternError: it is no regular expression.
    """
    compiled, machine = _prepared(pattern)
    return compiled.fullmatch(text) is not None if machine is None else machine.fullmatch(text)


def get_pattern_key(entries: Iterable[str], key: str) -> str:
    """The first of `entries` (regular expressions for the end of a name) that fits `key`; `key` if none does."""
    return next((entry for entry in entries if fullmatch(rf"(.*\.)?({entry})", key)), key)


def check(pattern: str, trusted: bool = True) -> int:
    """How many steps a match may take.

    Raises:
        PatternError: the expression is none; or, unless it is `trusted`, it could take for ever.
    """
    if re.fullmatch(r"[\w.]*", pattern):
        return 1
    tree = _parsed(pattern)
    ways = _ways(tree)
    if ways <= MANY_WAYS:
        return ways
    try:
        return _Machine(tree).steps
    except _TooHard as error:
        if trusted:
            return ways
        raise PatternError(f"{_short(pattern)} could take for ever to match ({error}); write it more simply") from None


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


@lru_cache(maxsize=64)
def _parsed(pattern: str) -> Any:
    try:
        return _parser.parse(pattern)
    except (re.error, OverflowError) as error:
        raise PatternError(f"{_short(pattern)} is no regular expression: {error}") from None
    except RecursionError:
        raise PatternError(f"{_short(pattern)} is nested too deeply") from None


@lru_cache(maxsize=1 << 16)  # a rank for each module of a large model is more than `re` remembers
def _prepared(pattern: str) -> tuple[re.Pattern[str], _Machine | None]:
    try:
        tree = _parsed(pattern)
        compiled = _compiler.compile(tree)
        return compiled, None if _ways(tree) <= MANY_WAYS else _Machine(tree)
    except _TooHard:  # of somebody's own; what comes out of a file has been checked
        return compiled, None
    except RecursionError:
        raise PatternError(f"{_short(pattern)} is nested too deeply") from None


def _ways(items: Iterable[Any]) -> int:
    """How many ways to match there are, at most, for `re` to try."""
    product = 1
    for kind, value in items:
        if kind in _REPEATS:
            least, most, inner = value
            ways = _ways(inner)
            if least == most and ways == 1:
                continue
            if most == 1:
                product *= 1 + ways
            elif _is_one(inner):
                product *= min(_LENGTH, int(most) - least + 1)
            else:
                product *= MANY_WAYS + 1
        elif kind is _constants.BRANCH:
            product *= sum(_ways(branch) for branch in value[1])
        elif kind is _constants.SUBPATTERN:
            product *= _ways(value[3])
        elif kind in _LOOKS:
            product *= _ways(value[1])
        elif kind not in _ONE and kind is not _constants.AT:
            product *= MANY_WAYS + 1  # what looks back at a group, and the like
        product = min(product, MANY_WAYS + 1)
    return product


def _is_one(items: Any) -> bool:
    """Whether items are a single character, groups around it that only hold it aside."""
    while len(items) == 1 and items[0][0] is _constants.SUBPATTERN and not (items[0][1][1] or items[0][1][2]):
        items = items[0][1][3]
    return len(items) == 1 and items[0][0] in _ONE


class _TooHard(Exception):
    pass


class _Machine:
    """An expression that leads from all places where it may begin at once to all where it may end.

    Attributes:
        steps: how many tests of a character a match may take.
    """

    def __init__(self, tree: Any):
        self._tree, self.steps = tree, 0
        self._tests: dict[int, re.Pattern[str]] = {}
        self._prepare(tree, _LENGTH)

    def _prepare(self, items: Iterable[Any], times: int) -> None:
        """Compiles what is tested at one place, for items that are met so many times."""
        for item in items:
            kind, value = item
            self.steps += times
            if kind in _ONE or kind is _constants.AT:
                single = _parser.SubPattern(self._tree.state, [item])
                self._tests[id(item)] = _compiler.compile(single, self._tree.state.flags)
            elif kind in _REPEATS:  # place by place, unless one character is repeated
                self._prepare(value[2], times if _is_one(value[2]) else _LENGTH**2)
            elif kind is _constants.BRANCH:
                for branch in value[1]:
                    self._prepare(branch, times)
            elif kind is _constants.SUBPATTERN and not (value[1] or value[2]):
                self._prepare(value[3], times)
            elif kind in _LOOKS and value[0] == 1:
                self._prepare(value[1], _LENGTH**2)
            else:
                raise _TooHard(f"{str(kind).lower()} in it")

    def fullmatch(self, text: str) -> bool:
        return len(text) in self._ends(self._tree, text, {0}, {})

    def _ends(self, items: Iterable[Any], text: str, starts: set[int], known: dict[Any, set[int]]) -> set[int]:
        """Where items may end that begin at one of `starts`; `known` says so for some items and places."""
        for item in items:
            kind, value = item
            if id(item) in self._tests:
                found = (self._tests[id(item)].match(text, start) for start in starts)
                starts = {match.end() for match in found if match}
            elif kind in _REPEATS:
                starts = self._repeated(value, text, starts, known)
            elif kind is _constants.BRANCH:
                starts = set().union(*(self._ends(branch, text, starts, known) for branch in value[1]))
            elif kind is _constants.SUBPATTERN:
                starts = self._ends(value[3], text, starts, known)
            else:  # what has to follow, or must not
                wanted = kind is _constants.ASSERT
                starts = {at for at in starts if bool(self._ends_from(value[1], text, at, known)) == wanted}
        return starts

    def _ends_from(self, items: Any, text: str, start: int, known: dict[Any, set[int]]) -> set[int]:
        key = id(items), start
        if key not in known:
            known[key] = self._ends(items, text, {start}, known)
        return known[key]

    def _repeated(self, how: Any, text: str, starts: set[int], known: dict[Any, set[int]]) -> set[int]:
        least, most, inner = how

        def once(places: set[int]) -> set[int]:
            if _is_one(inner):
                return self._ends(inner, text, places, known)
            return set().union(*(self._ends_from(inner, text, place, known) for place in places))

        for _ in range(least):
            before, starts = starts, once(starts)
            if starts == before:  # and so on for ever
                break
        ends = set(starts)
        while starts and least < most:
            starts, least = once(starts) - ends, least + 1
            ends |= starts
        return ends
