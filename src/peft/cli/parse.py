"""The command line and YAML files as options: split into names and words here, typed and explained by jsonargparse."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from peft.cli.options import ALIASES, COMMANDS, TABLES, TYPES, OptionError, explained, refuse
from peft.registry import METHODS
from peft.values import is_of, spelled

#: settings of a run, written into its folder; what `--resume` reads
SETTINGS = "train.yaml"
#: names between commas
NAMES = r"[\w./-]+(, ?[\w./-]+)*"
#: what decides nothing about a run
PASSING = {"config", "fields", "resume", "overwrite", "output"}
Values = dict[str, Any]


def nearest(name: str, known: Iterable[str]) -> str:
    """`". Did you mean 'x'?"` with the names of `known` that look like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f". Did you mean {' or '.join(map(repr, found))}?" if found else ""


def method_named(text: str) -> str:
    """The key in the table of methods for a name in any spelling.

    Raises:
        ValueError: there is no such method.
    """
    name = text.upper().replace("-", "_")
    if name not in METHODS:
        known = sorted(map(str.lower, METHODS))
        raise ValueError(f"unknown method {text!r}{nearest(name.lower(), known) or '.'} There are {', '.join(known)}")
    return name


def init_types(owner: Any) -> Values:
    """The fields of a dataclass that a user may set, with their types."""
    kinds, hidden = get_type_hints(owner), TABLES.not_for_users if hasattr(owner, "from_peft_type") else ()
    return {f.name: kinds[f.name] for f in fields(owner) if f.init and f.name not in hidden}


@explained(kind=OptionError)
def help_of(command: str, argv: Sequence[str]) -> str | None:
    """The help that `argv` asks for: of the command, or of the fields of a method."""
    from jsonargparse import ArgumentParser

    owner, methods = COMMANDS[command], [words for name, words in _split(argv) if name == "fields"]
    if "--help" not in argv and "-h" not in argv:
        if command != "train" or not methods:
            return None
        method = " ".join(methods[-1]) or "lora"
        command, owner = f"train --method {method}", METHODS[method_named(method)].config_class
    parser, hidden = ArgumentParser(prog=f"peft {command}"), {f.name for f in fields(owner)} - {*init_types(owner)}
    parser.add_class_arguments(owner, as_positional=True, skip=hidden, fail_untyped=False)
    return parser.format_help()


@explained(kind=OptionError)
def read(command: str, argv: Sequence[str]) -> tuple[Any, Values, Values]:
    """(the options of `command`, fields of the method's configuration, fields of `TrainingArguments`).

    Args:
        command: name of the command.
        argv: what stands behind it. The YAML file that `--config` names comes first; with `--resume` and no such
            option it is the one that the broken-off run has written.

    Raises:
        OptionError: something in them cannot be read.
    """
    own: Any = COMMANDS[command]
    owners, split, content, path = [own], _split(argv), {}, ""
    given = {ALIASES.get(name, name): " ".join(words) for name, words in split}
    if command == "train" and ("config" in given or "resume" in given):
        path = given.get("config") or os.path.join(given.get("output") or own.output, SETTINGS)
        content = _read_yaml(path, "--config" if "config" in given else "--resume")
    if "method" in init_types(own):
        owners.append(METHODS[method_named(given.get("method") or content.get("method") or own.method)].config_class)
    if command in ("train", "tune"):
        from transformers import TrainingArguments

        owners.append(TrainingArguments)
    known = _known(owners)
    values: Values = {}
    for name, value in content.items():
        name = _checked(name, known, f"{path}: ")
        refuse(name in values, f"{path}: {name} is there twice, perhaps by another name")
        if value is not None:
            values[name] = _value(known[name], [value]) if isinstance(value, str) else value
    needed = [f.name for f in fields(own) if f.default is MISSING and f.default_factory is MISSING]
    values |= _assigned(split, known, needed)
    if values.get("target_modules") in ("all", ["all"]):  # as others call it
        values["target_modules"] = "all-linear"
    missing = " and ".join(name for name in needed if name not in values)
    refuse(missing, f"{missing} missing: `peft {command} --help` says what is needed")
    parts: list[Values] = [{}, {}, {}]
    for name, value in values.items():
        if type(value) is int and float in _members(known[name]) and int not in _members(known[name]):
            value = float(value)
        names = _choices(known[name]) or [spelled(one) for one in _members(known[name]) if one is not types.NoneType]
        refuse(not _fits(value, known[name]), f"{name} has to be {' or '.join(names)}, got {value!r}")
        parts[next(i for i, owner in enumerate(owners) if name in init_types(owner))][name] = value
    words = ", ".join(name for name, value in parts[2].items() if name.endswith("_kwargs") and str(value)[0] != "{")
    refuse(words, f"{words}: a JSON object is needed")
    for name, value in parts[2].items():  # transformers takes any number
        if isinstance(value, (int, float)):
            get_args(TYPES[TABLES.numbers.get(name, "float >= 0")])[1].check(name, value)
    return own(**parts[0]), parts[1], parts[2]


def complete(line: str) -> None:
    """Answers argcomplete, with the options of the command, and of the method, that stand in `line` so far."""
    import argparse

    import argcomplete

    words, parser = line.split(), argparse.ArgumentParser(add_help=False)
    if len(words) + line.endswith(" ") > 2 and words[1] in COMMANDS:
        owners: list[Any] = [COMMANDS[words[1]]]
        method = " ".join(dict(_split(words)).get("method", [])).upper().replace("-", "_") or "LORA"
        if "method" in init_types(owners[0]) and method in METHODS:
            owners.append(METHODS[method].config_class)
        for name, kind in _known(owners).items():
            parser.add_argument(f"--{name}", choices=_choices(kind) or None)
        rest = line.split(maxsplit=1)[1]  # a command stands in the place of the program
        os.environ.update(COMP_LINE=rest, COMP_POINT=str(len(rest)))
    else:
        parser.add_argument("command", choices=list(COMMANDS))
    argcomplete.autocomplete(parser)


def _known(owners: Sequence[Any]) -> Values:
    """The options by name, with their types; the third owner's count where the command has no name of its own."""
    found = {name: kind for name, kind in init_types(owners[-1]).items() if len(owners) < 3 or name not in ALIASES}
    return found | {name: kind for owner in reversed(owners[:2]) for name, kind in init_types(owner).items()}


def _checked(name: str, known: Mapping[str, Any], where: str = "") -> str:
    """The name here of an option; one that is known as it is comes before those of other programs."""
    alias = name if name in known else ALIASES.get(name, name)
    if alias not in known:
        advice = TABLES.elsewhere.get(name, "")
        others = (other for other, own in ALIASES.items() if own in known)
        hint = f": {advice}" if advice else nearest(alias, [*known, *others])
        raise ValueError(f"{where}there is no option {name!r}{hint}")
    return alias


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A command line as names of options with the words behind them; before the first option the name is empty."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            found.append((name.replace("-", "_"), [value] if equals else []))
            found += [("", [])] * bool(equals)
        else:
            found[-1][1].append(token)
    return found


def _assigned(split: Iterable[tuple[str, list[str]]], known: Mapping[str, Any], needed: Sequence[str]) -> Values:
    """The options of a command line and their values; words that no option takes go to `needed`, one by one."""
    found: Values = {}
    loose: list[str] = []
    for name, words in split:
        off = name.startswith("no_") and _is_flag(known.get(name[3:]))
        name = name and _checked(name[3:] if off else name, known)
        count = _count(known[name], words) if name and not off else 0
        mine, loose = words[:count], loose + words[count:]
        if name and not mine and bool not in _members(known[name]):  # a setting that may be more than a flag, too
            raise ValueError(f"--{name} needs a value")
        if name:
            found[name] = _value(known[name], mine or ["false" if off else "true"])
    for name in needed if loose else ():
        count = _count(known[name], loose)
        if count and name not in found:
            found[name], loose = _value(known[name], loose[:count]), loose[count:]
    refuse(loose, f"unexpected argument {''.join(loose[:1])!r}: a value belongs behind an option")
    return found


def _count(kind: Any, words: list[str]) -> int:
    """How many of the words behind an option are its own."""
    if _is_flag(kind):
        return int(bool(words) and words[0].lower() in ("true", "false"))
    return len(words) if _takes_many(kind) else min(1, len(words))


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_flag(kind: Any) -> bool:
    return set(_members(kind)) <= {bool, type(None)} and bool in _members(kind)


def _takes_many(kind: Any) -> bool:
    return any(get_origin(member) in (list, set, tuple, Sequence, dict) for member in _members(kind))


def _choices(kind: Any) -> list[str]:
    """The values of a type that has few."""
    literals = [value for member in _members(kind) if get_origin(member) is Literal for value in get_args(member)]
    return [*map(str, literals), *["true", "false"] * (bool in _members(kind))]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; of those that the type names, if it does."""
    return any(value in get_args(one) if get_origin(one) is Literal else is_of(value, one) for one in _members(kind))


def _value(kind: Any, words: list[str]) -> Any:
    """Words as YAML or as they stand; names between commas, or one after the other, are a list where one may be."""
    first, listed = words[0], len(words) > 1
    if get_origin(kind) is dict and "=" in first:
        pairs = [pair.partition("=") for word in words for pair in word.split(",")]
        return {key.strip(): value.strip() for key, _, value in pairs}
    # A regular expression without any special sign would match one full name only, which nobody writes.
    if not listed and _takes_many(kind) and first != "all-linear" and re.fullmatch(NAMES, first):
        words, listed = re.split(", ?", first), True
    loaded = [_loaded(word) for word in words]
    ways = [loaded, words] if listed else [*loaded, first, words]
    return next((value for value in ways if _fits(value, kind)), words if listed else first)


def _loaded(word: str) -> Any:
    from jsonargparse import get_loader

    if word.lower() in ("none", "null"):
        return None
    try:
        value = get_loader("yaml")(word)
    except yaml.YAMLError:
        return word
    return word if value is None or isinstance(value, str) else value  # a text with its quotes, blanks and signs


def _read_yaml(path: str, option: str) -> Values:
    """A YAML file of options."""
    refuse(not os.path.exists(path), f"{option}: there is no {path}")
    with explained(f"{option} {path}"):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        given = type(content).__name__
        refuse(not isinstance(content, dict), f"a mapping of options and fields is needed, got {given}")
        refuse("config" in content, "a file cannot name another one ('config')")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def settings_of(options: Any, *more: Mapping[str, Any]) -> Values:
    """The settings of a run that differ from the defaults, flat, as a YAML file holds them."""
    default, given = vars(type(options)()), vars(options).items()
    found = {name: value for name, value in given if name not in PASSING and value != default[name]}
    return found | {name: value for part in more for name, value in part.items()}
