"""Regular expressions for names, matched in a time that cannot blow up, whoever wrote them.

`re` tries one way after another, which for an expression such as `(a+)+$` are exponentially many. What could take long
there is matched here by following all ways at once, character by character (Thompson, 1968).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

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
#: states that an expression may have
_STATES = 20_000

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
        return len(_Machine(tree).states) * _LENGTH
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
            elif len(inner) == 1 and _bare(inner[0])[0] in _ONE:
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


def _bare(item: Any) -> Any:
    """An item without groups around it that only hold it."""
    while item[0] is _constants.SUBPATTERN and len(item[1][3]) == 1 and not (item[1][1] or item[1][2]):
        item = item[1][3][0]
    return item


class _TooHard(Exception):
    pass


class _State(NamedTuple):
    """A place in an expression: what has to hold to go on (None: nothing), and where to.

    `test` is a compiled expression for one character (`takes`) or for the place between two; or a machine for what
    follows, which has to match if `wanted` and must not otherwise.
    """

    test: Any
    takes: bool
    wanted: bool
    to: list[int]


class _Machine:
    """An expression as states, all of which may be followed at once."""

    def __init__(self, tree: Any, items: Any = None):
        self.states: list[_State] = [_State(None, False, True, [])]  # the end
        self._tree = tree
        self.start = self._add(tree if items is None else items, 0)

    def _state(self, test: Any, to: list[int], takes: bool = False, wanted: bool = True) -> int:
        if len(self.states) > _STATES:
            raise _TooHard("it is too large")
        self.states.append(_State(test, takes, wanted, to))
        return len(self.states) - 1

    def _add(self, items: Iterable[Any], to: int) -> int:
        """The state from which `items` lead to the state `to`."""
        for kind, value in reversed(list(items)):
            if kind in _ONE or kind is _constants.AT:
                single = _parser.SubPattern(self._tree.state, [(kind, value)])
                test = _compiler.compile(single, self._tree.state.flags)
                to = self._state(test, [to], takes=kind in _ONE)
            elif kind in _REPEATS:
                least, most, inner = value
                to = self._repeat(least, most, inner, to)
            elif kind is _constants.BRANCH:
                to = self._state(None, [self._add(branch, to) for branch in value[1]])
            elif kind is _constants.SUBPATTERN and not (value[1] or value[2]):
                to = self._add(value[3], to)
            elif kind in _LOOKS and value[0] == 1:
                to = self._state(_Ahead(self._tree, value[1]), [to], wanted=kind is _constants.ASSERT)
            else:
                raise _TooHard(f"{str(kind).lower()} in it")
        return to

    def _repeat(self, least: int, most: int, inner: Any, to: int) -> int:
        if most is _constants.MAXREPEAT:
            loop = self._state(None, [to])
            self.states[loop].to.append(self._add(inner, loop))
            to = loop
        else:
            end = to
            for _ in range(int(most) - least):
                to = self._state(None, [end, self._add(inner, to)])
        for _ in range(least):
            to = self._add(inner, to)
        return to

    def fullmatch(self, text: str) -> bool:
        return len(text) in self._ends(text, 0)

    def _ends(self, text: str, position: int) -> list[int]:
        """Where the expression may end that begins at `position`."""
        current, ends = {self.start}, []
        while current:
            current = self._without_taking(current, text, position)
            if 0 in current:
                ends.append(position)
            if position == len(text):
                break
            tests: dict[int, bool] = {}
            following: set[int] = set()
            for state in (self.states[number] for number in current):
                if state.takes:
                    if id(state.test) not in tests:
                        tests[id(state.test)] = state.test.match(text[position]) is not None
                    if tests[id(state.test)]:
                        following.update(state.to)
            current, position = following, position + 1
        return ends

    def _without_taking(self, states: set[int], text: str, position: int) -> set[int]:
        """`states`, and those that are reached from them without a further character."""
        found, waiting = set(states), list(states)
        while waiting:
            state = self.states[waiting.pop()]
            if state.takes:
                continue
            if state.test is None or (state.test.match(text, position) is not None) == state.wanted:
                waiting += set(state.to) - found
                found.update(state.to)
        return found


class _Ahead(_Machine):
    """What has to follow, or must not."""

    def match(self, text: str, position: int) -> bool | None:
        return True if self._ends(text, position) else None
