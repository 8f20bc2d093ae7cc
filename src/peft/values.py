"""What the fields of a configuration may hold: their types, elements too, and numbers that are numbers."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache, reduce
from numbers import Integral, Real
from operator import or_
from typing import Annotated, Any, TypeVar

N = TypeVar("N")

#: integers are less than this, as those of tensors are; other numbers are no larger than a float32
_INTEGERS, _LARGEST = 2**63, 3.4e38


@dataclass(frozen=True)
class Range:
    """What the number in a field has to be: `must` in words, `holds` as a test."""

    must: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # which help and documentation show beside the type
        return self.must

    def check(self, name: str, value: Any, where: str = "") -> None:
        """Raises ValueError where the value of field `name` is a number outside."""
        if value is not None and not self.holds(value):
            raise ValueError(f"{name} {self.must}, got {value}{where}.")


@dataclass(frozen=True)
class Fits:
    """What the number in a field has to be for each module: `must` in words, `holds` as a test of it and a `BaseOp`."""

    must: str
    holds: Callable[[Any, Any], bool]

    def __repr__(self) -> str:
        return self.must

    def check(self, name: str, value: Any, op: Any, key: str, patterns: Sequence[str] = ()) -> None:
        """Raises ValueError where the value of field `name` does not fit the module `key`, which `op` describes.

        `patterns` are the fields that have values for single modules.
        """
        if not self.holds(value, op):
            also = f" {name}_pattern has it for single modules." if f"{name}_pattern" in patterns else ""
            size = f"{op.part_features} x {op.in_features}"
            raise ValueError(f"{name}={value} does not fit {key!r}, {size}: {self.must}.{also}")


#: types of fields with numbers in a range; numbers by module (see `pattern_fields`) have to be in that of the field too
PositiveInt = Annotated[int, Range("must be a positive integer", lambda number: number > 0)]
PositiveFloat = Annotated[float, Range("must be positive", lambda number: number > 0)]
NonNegativeInt = Annotated[int, Range("must be non-negative", lambda number: number >= 0)]
NonNegativeFloat = Annotated[float, Range("must be non-negative", lambda number: number >= 0)]
Fraction = Annotated[float, Range("must be at least 0 and less than 1", lambda number: 0 <= number < 1)]
Share = Annotated[float, Range("must be between 0 and 1", lambda number: 0 <= number <= 1)]
#: one of numbers that have to fit each module
Divisor = Annotated[
    PositiveInt,
    Fits("both sides have to be divisible by it", lambda n, op: op.in_features % n == op.out_features % n == 0),
]


@cache
def noted(config_class: type, of: type[N]) -> dict[str, N]:
    """What the types of a configuration's fields note of that kind (ranges, say), of those that do."""
    kinds = typing.get_type_hints(config_class, include_extras=True) if field_types(config_class) else {}
    members = ((name, member) for name, kind in kinds.items() for member in (kind, *typing.get_args(kind)))
    return {name: extra for name, member in members for extra in typing.get_args(member) if isinstance(extra, of)}


@cache
def field_types(config_class: type) -> dict[str, Any]:
    """The types of a configuration's fields; what a class from elsewhere names and does not import may be anything."""
    try:
        return {name: _as_written(kind) for name, kind in typing.get_type_hints(config_class).items()}
    except (NameError, TypeError):
        return {}


def _as_written(kind: Any) -> Any:
    """A union of classes as `int | None`, which Python makes another of where one of them has a range."""
    members = typing.get_args(kind)
    is_plain = typing.get_origin(kind) is typing.Union and all(isinstance(member, type) for member in members)
    return reduce(or_, members) if is_plain else kind


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value, with its elements, is of an annotated type. An int is a float, and a tuple or set is a list."""
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, member) for member in inside)
    if origin is typing.Literal:
        return any(is_of(value, type(entry)) for entry in inside)
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    if origin in (list, tuple, set):
        return _is_list_of(value, origin, inside)
    if is_dataclass(origin) and isinstance(value, Mapping):  # as files have it
        return True
    if origin is dict:
        return isinstance(value, Mapping) and (
            not inside or all(is_of(key, inside[0]) and is_of(entry, inside[1]) for key, entry in value.items())
        )
    if origin is str or (isinstance(origin, type) and issubclass(origin, Enum)):
        return isinstance(value, (str, os.PathLike, origin))
    return not isinstance(origin, type) or isinstance(value, origin)


def _is_list_of(value: Any, origin: Any, inside: tuple[Any, ...]) -> bool:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        return False
    if not inside or not isinstance(value, (list, tuple, set, frozenset)):
        return True
    if origin is tuple and inside[-1] is not Ellipsis:
        return len(value) == len(inside) and all(map(is_of, value, inside))
    return all(is_of(entry, inside[0]) for entry in value)


def spelled(kind: Any) -> str:
    """A type as a message names it."""
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def shown(value: Any) -> str:
    """A value as a message names it: not at length."""
    text = ascii(value) if isinstance(value, (str, list, tuple, Mapping)) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_value(name: str, value: Any, kind: Any, owner: str) -> None:
    """Checks one field of the configuration class `owner`.

    Raises:
        TypeError: the value is of another type.
        ValueError: a number is not finite, or larger than any tensor; a text is none of those that are known, or holds
            what no name has.
    """
    if not is_of(value, kind):
        raise TypeError(f"{name} of {owner} must be {spelled(kind)}, got {shown(value)} ({type(value).__name__}).")
    literals = [member for member in (kind, *typing.get_args(kind)) if typing.get_origin(member) is typing.Literal]
    named = [choice for member in literals for choice in typing.get_args(member)]
    if named and isinstance(value, str) and value not in named:
        raise ValueError(f"{name} of {owner} must be one of {', '.join(map(repr, named))}, got {shown(value)}.")
    for leaf in leaves(value):
        if isinstance(leaf, str):
            if "\0" in leaf or not _is_text(leaf):
                raise ValueError(f"{name} of {owner} holds characters that no text has: {shown(leaf)}.")
        elif isinstance(leaf, Integral):
            if not -_INTEGERS <= int(leaf) < _INTEGERS:
                raise ValueError(f"{name} of {owner} is too large a number: {shown(leaf)}.")
        elif isinstance(leaf, Real) and not abs(float(leaf)) <= _LARGEST:
            raise ValueError(f"{name} of {owner} must be finite, in float32 too; got {shown(value)}.")


def _is_text(value: str) -> bool:
    """Whether a string can be written: it holds no half of a pair of UTF-16."""
    try:
        return value.isascii() or value.encode() is not None
    except UnicodeEncodeError:
        return False


def leaves(value: Any) -> Iterator[Any]:
    """What a value is made of: keys and entries of mappings and lists, at any depth."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, Mapping):
            waiting += [*entry.keys(), *entry.values()]
        elif isinstance(entry, (list, tuple, set, frozenset)):
            waiting += entry
        else:
            yield entry


def enum_in(kind: Any) -> Any:
    """The enumeration whose members a field of this type has, by their values too; None if there is none."""
    members = (kind, *typing.get_args(kind))
    return next((member for member in members if isinstance(member, type) and issubclass(member, Enum)), None)


def dataclass_in(kind: Any) -> type | None:
    """The dataclass that a value of this type may be built from a mapping for; None if there is none."""
    return next((member for member in (kind, *typing.get_args(kind)) if is_dataclass(member)), None)  # type: ignore[return-value]
