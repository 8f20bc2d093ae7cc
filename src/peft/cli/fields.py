"""Options that belong to a method: text on the command line becomes fields of its configuration."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

#: fields that the library fills in itself
NOT_FOR_USERS = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"}


class OptionError(ValueError):
    """The command line asks for something that does not exist, or in a way that cannot be read."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`". Did you mean 'x'?"` with the names of `known` that look like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f". Did you mean {' or '.join(map(repr, found))}?" if found else ""


def assignments(tokens: Sequence[str]) -> dict[str, str]:
    """Unknown options as fields: `["--r", "16", "--use_rslora", "--bias=all"]` is r, use_rslora (true) and bias."""
    found: dict[str, str] = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else "true"
        elif name is None:
            raise OptionError(f"unexpected argument {token!r}: a value belongs behind an option")
        else:
            found[name], name = token, None
    return found


def user_fields(config_class: type) -> dict[str, Field]:
    """The fields of a configuration that a user may set."""
    return {f.name: f for f in fields(config_class) if f.init and f.name not in NOT_FOR_USERS}


def read_field(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type `kind`: text is read as YAML, and `a,b` as a list where a list is allowed.

    Raises:
        OptionError: it cannot be read as that.
    """
    for candidate in _readings(value, kind) if isinstance(value, str) else [value]:
        if _fits(candidate, kind):
            return _built(name, candidate, kind)
    raise OptionError(f"{name} has to be {spell(kind)}, got {value!r}")


def _readings(text: str, kind: Any) -> list[Any]:
    """What `text` may mean, the likeliest first."""
    readings: list[Any] = []
    if text.lower() in ("none", "null"):
        readings.append(None)
    # Names and numbers between commas are a list where both a list and a string are allowed: a regular expression
    # without any special sign would match one full name only, which nobody writes.
    if re.fullmatch(r"[\w./-]+(, ?[\w./-]+)*", text) and text != "all-linear":
        readings.append([yaml.safe_load(part) for part in text.split(",")])
    with suppress(yaml.YAMLError):
        readings.append(yaml.safe_load(text))
    with suppress(ValueError):
        readings.append(float(text))  # 1e-3 is no number in YAML
    return [*readings, text]


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    return any(_fits_one(value, member) for member in _members(kind))


def _fits_one(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return any(
            value is entry
            or (isinstance(value, str) and isinstance(entry, str) and re.fullmatch(_pattern(entry), value))
            for entry in inner
        )
    if origin in (list, set, tuple, Sequence):
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(entry, inner[1]) for entry in value.values())
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [entry.value for entry in kind]
    return type(value) is kind


def _pattern(literal: str) -> str:
    """What a literal stands for, as a regular expression: itself, or a family ("pissa_niter_[number of iters]")."""
    return re.sub(r"\\\[.*", ".+", re.escape(literal))


def _built(name: str, value: Any, kind: Any) -> Any:
    """A mapping as the sub-configuration that the field holds, everything else as it is."""
    nested = [member for member in _members(kind) if is_dataclass(member)]
    return build(nested[0], value, f"{name}: ") if nested and isinstance(value, dict) else value


def spell(kind: Any) -> str:
    """A type in the words of the command line."""
    words = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words += [str(entry) for entry in get_args(member)]
        elif member is type(None):
            words.append("none")
        elif get_origin(member) is None and isinstance(member, type):
            words.append("a mapping" if is_dataclass(member) else member.__name__)
        else:
            words.append(str(member).replace("typing.", ""))
    return " | ".join(dict.fromkeys(words))


def build(config_class: Any, values: Mapping[str, Any], where: str = "", options: Sequence[str] = ()) -> Any:
    """The configuration with `values`, text read as the type of its field.

    Args:
        config_class: a configuration class.
        values: fields by name.
        where: put before messages.
        options: options `--name` that a misspelt field may have been meant for.

    Raises:
        OptionError: a field that the class does not have, or a value that does not fit.
    """
    known, kinds = user_fields(config_class), get_type_hints(config_class)
    for name in values:
        if name not in known:
            hint = nearest(name, [*known, *(option.lstrip("-") for option in options)])
            hint = hint or f". Its fields are {', '.join(known)}"
            neither = "no such option, and " if options else ""
            raise OptionError(f"{where}{neither}{config_class.__name__} has no field {name!r}{hint}")
    return config_class(**{name: read_field(where + name, value, kinds[name]) for name, value in values.items()})


def describe(config_class: Any) -> str:
    """The fields of a configuration, one line each: name, type, default."""
    kinds = get_type_hints(config_class)
    lines = [f"Fields of {config_class.__name__}, as options of `peft train`:", ""]
    for name, field in user_fields(config_class).items():
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = "none" if default is None else getattr(default, "value", default)
        lines.append(f"  --{name:<26} {spell(kinds[name])}  [{shown}]")
    return "\n".join(lines)
