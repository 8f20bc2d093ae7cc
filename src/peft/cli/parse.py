"""The command line and YAML files as options: split into names and texts here, typed and explained by jsonargparse."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from peft.cli.options import ALIASES, COMMANDS, Base
from peft.registry import METHODS

#: fields that the library or the command fills in itself
NOT_FOR_USERS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode", "task_type", "revision",
    "left_out",
}  # fmt: skip
#: settings of a run, written into its folder; what `--resume` reads
SETTINGS = "train.yaml"
#: what decides nothing about a run
PASSING = {"config", "fields", "resume", "overwrite", "output", "num_processes"}
Values = dict[str, Any]


class OptionError(ValueError):
    """The command line asks for something that does not exist, or in a way that cannot be read."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`". Did you mean 'x'?"` with the names of `known` that look like `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f". Did you mean {' or '.join(map(repr, found))}?" if found else ""


def method_named(text: str) -> str:
    """The key in the table of methods for a name in any spelling.

    Raises:
        OptionError: there is no such method.
    """
    name = text.upper().replace("-", "_")
    if name not in METHODS:
        known = sorted(map(str.lower, METHODS))
        raise OptionError(f"unknown method {text!r}{nearest(name.lower(), known) or '.'} There are {', '.join(known)}")
    return name


def init_types(owner: Any) -> Values:
    """The fields of a dataclass that a user may set, with their types."""
    kinds, hidden = get_type_hints(owner), NOT_FOR_USERS if hasattr(owner, "from_peft_type") else ()
    return {f.name: kinds[f.name] for f in fields(owner) if f.init and f.name not in hidden}


def parser_of(title: str, *owners: Any) -> Any:
    """A jsonargparse parser that takes the fields of dataclasses as options; of two of one name the first counts."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"peft {title}", exit_on_error=False)
    taken: set[str] = set()
    for owner in owners:
        names = {f.name for f in fields(owner) if f.init}
        skip = names - (set(init_types(owner)) - taken)
        parser.add_class_arguments(owner, as_positional=True, skip=skip, fail_untyped=False)
        taken |= names
    return parser


def read(command: str, argv: Sequence[str]) -> tuple[Any, Values, Values]:
    """(the options of `command`, fields of the method's configuration, fields of `TrainingArguments`).

    Args:
        command: name of the command.
        argv: what stands behind it. The YAML file that `--config` names comes first; with `--resume` and no such
            option it is the one that the broken-off run has written.

    Raises:
        OptionError: something in them cannot be read.
    """
    own = COMMANDS[command][0]
    owners = [own]
    given = _scan(argv)
    content: Values = {}
    path = given.get("config") or (Path(given.get("output") or "adapter") / SETTINGS if "resume" in given else None)
    if path and command == "train":
        content = _read_yaml(path, "--config" if "config" in given else "--resume")
    if "method" in init_types(own):
        owners.append(METHODS[method_named(given.get("method") or content.get("method") or "lora")].config_class)
    known = _known(owners)
    if issubclass(own, Base) and any(_canonical(name, known) not in known for name in [*given, *content]):
        from transformers import TrainingArguments

        known = _known(owners, TrainingArguments)
        owners.append(TrainingArguments)
    texts: dict[str, str] = {}
    for name, value in content.items():
        if value is not None:
            name = _checked(name, known, f"{path}: ")
            texts[name] = _text(known[name], [value]) if isinstance(value, str) else json.dumps(value)
    needed = [f.name for f in fields(own) if f.default is MISSING and f.default_factory is MISSING]
    texts |= _pairs(argv, known, needed)
    missing = [name for name in needed if name not in texts]
    if missing:
        raise OptionError(f"{' and '.join(missing)} missing: `peft {command} --help` says what is needed")
    values = _parse(known, parser_of(command, *owners), texts, needed)
    parts: list[Values] = [{}, {}, {}]
    for name, value in values.items():
        parts[next(i for i, owner in enumerate(owners) if name in init_types(owner))][name] = value
    return own(**parts[0]), parts[1], parts[2]


def complete(line: str) -> None:
    """Answers argcomplete, with the options of the command, and of the method, that stand in `line` so far."""
    from argcomplete.completers import ChoicesCompleter, FilesCompleter
    from jsonargparse import ArgumentParser

    words = line.split()
    command = words[1] if len(words) > 2 or (len(words) == 2 and line.endswith(" ")) else ""
    if command in COMMANDS:
        owners = [COMMANDS[command][0]]
        method = str(_scan(words).get("method") or "lora").upper().replace("-", "_")
        if "method" in init_types(owners[0]) and method in METHODS:
            owners.append(METHODS[method].config_class)
        parser, known = parser_of(command, *owners), _known(owners)
        for action in parser._actions:
            members = _members(known.get(action.dest))
            values = [str(value) for member in members if get_origin(member) is Literal for value in get_args(member)]
            values += ["true", "false"] * (bool in members)
            action.completer = ChoicesCompleter(dict.fromkeys(values, "")) if values else FilesCompleter()
        rest = line.split(maxsplit=1)[1]  # a command stands in the place of the program
        os.environ.update(COMP_LINE=rest, COMP_POINT=str(len(rest)))
    else:
        parser = ArgumentParser()
        parser.add_argument("command", choices=list(COMMANDS))
    parser.parse_args([])


def _known(owners: Sequence[Any], others: Any = None) -> Values:
    """The options by name; of `others`, those that have no name of the command's own."""
    known = {name: kind for name, kind in init_types(others).items() if name not in ALIASES} if others else {}
    return known | {name: kind for owner in reversed(owners) for name, kind in init_types(owner).items()}


def _scan(argv: Sequence[str]) -> dict[str, str]:
    """The options in `argv` with what may be their value: enough to find out which options there are."""
    found = {}
    for token, after in zip(argv, [*argv[1:], ""], strict=False):
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else after
    return {ALIASES[name] if ALIASES.get(name) in ("method", "output") else name: v for name, v in found.items()}


def _canonical(name: str, known: Mapping[str, Any]) -> str:
    """The name here of an option; one that is known as it is comes before those of other programs."""
    name = name.replace("-", "_")
    alias = ALIASES.get(name, name)
    return name if name in known or alias not in known else alias


def _checked(name: str, known: Mapping[str, Any], where: str = "") -> str:
    name = _canonical(name, known)
    if name not in known:
        raise OptionError(f"{where}there is no option {name!r}{nearest(name, [*known, *ALIASES])}")
    return name


def _pairs(argv: Sequence[str], known: Mapping[str, Any], needed: Sequence[str]) -> dict[str, str]:
    """The options of a command line and their values; values without an option go to `needed`, one after the other."""
    texts: dict[str, str] = {}
    places, rest = list(needed), list(argv)
    while rest:
        token = rest.pop(0)
        values: list[str] = []
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            positive = name[3:].replace("-", "_") if name.startswith("no-") else ""
            if _is_flag(known.get(positive)):
                texts[positive] = "false"
                continue
            name = _checked(name, known)
            if equals:
                values = [value]
        elif places:
            name, values = places.pop(0), [token]
        else:
            raise OptionError(f"unexpected argument {token!r}: a value belongs behind an option")
        kind = known[name]
        many = _list_of(kind) is not None or get_origin(kind) is dict
        while not (token.startswith("--") and "=" in token) and rest and not rest[0].startswith("--"):
            if (values and not many) or (_is_flag(kind) and rest[0].lower() not in ("true", "false")):
                break
            values.append(rest.pop(0))
        if not values and bool in _members(kind):  # a setting that may be more than a flag, too
            values = ["true"]
        if not values:
            raise OptionError(f"--{name} needs a value")
        texts[name] = _text(kind, values)
    return texts


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_flag(kind: Any) -> bool:
    return set(_members(kind)) <= {bool, type(None)} and bool in _members(kind)


def _list_of(kind: Any) -> Any:
    """The type of the entries where `kind` allows a list, else None."""
    found = [get_args(member) for member in _members(kind) if get_origin(member) in (list, set, tuple, Sequence)]
    return found[0][0] if found else None


def _text(kind: Any, values: Sequence[str]) -> str:
    """Values as jsonargparse reads them: names between commas, or one after the other, are a list where one may be."""
    entry = _list_of(kind)
    if get_origin(kind) is dict and "=" in values[0]:
        pairs = [pair.partition("=") for value in values for pair in value.split(",")]
        return json.dumps({key.strip(): value.strip() for key, _, value in pairs})
    if entry is None or (len(values) == 1 and values[0].startswith("[")):
        return "null" if values[0].lower() == "none" and type(None) in _members(kind) else values[0]
    if len(values) == 1:
        # A regular expression without any special sign would match one full name only, which nobody writes.
        if not re.fullmatch(r"[\w./-]+(, ?[\w./-]+)*", values[0]) or values[0] == "all-linear":
            return values[0] if str in _members(kind) else json.dumps(values)
        values = [value.strip() for value in values[0].split(",")]
    return json.dumps(values if entry is str else [yaml.safe_load(value) for value in values])


def _parse(known: Mapping[str, Any], parser: Any, texts: Mapping[str, str], needed: Sequence[str]) -> Values:
    line = [f"--{name}={text}" for name, text in texts.items() if name not in needed]
    behind = ["--", *(texts[name] for name in needed)] if needed else []
    try:
        found = parser.parse_args([*line, *behind], defaults=False)
    except Exception as error:  # jsonargparse raises what argparse and its own types raise
        words = re.sub(r"\s+", " ", str(error))
        key = re.search(r'Parser key "(\w+)', words)
        if key and key[1] in texts:
            words = f"{key[1]} has to be {_spell(known[key[1]])}, got {texts[key[1]]!r}"
        raise OptionError(words) from error
    return found.as_dict()


def _spell(kind: Any) -> str:
    """A type in the words of the command line."""
    words: list[str] = []
    for member in _members(kind):
        if get_origin(member) is Literal:
            words += map(str, get_args(member))
        elif member is not type(None):
            plain = isinstance(member, type) and get_origin(member) is None
            words.append(member.__name__ if plain else str(member).replace("typing.", ""))
    return " or ".join(words)


def _read_yaml(path: str | Path, option: str) -> Values:
    """A YAML file of options, with the options that it may hold under `set` beside the others."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(f"{option}: there is no {path}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"{option} {path}: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{option} {path}: a mapping of options and fields is needed, got {type(content).__name__}")
    if "config" in content:
        raise OptionError(f"{option} {path}: a file cannot name another one ('config')")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def settings_of(options: Any, *more: Mapping[str, Any]) -> Values:
    """The settings of a run that differ from the defaults, flat, as a YAML file holds them."""
    default, found = type(options)(), {}
    for name, value in asdict(options).items():
        if name not in PASSING and value != getattr(default, name):
            found[name] = value
    return {**found, **{name: value for part in more for name, value in part.items()}}


def describe(method: str) -> str:
    """The fields of a method's configuration: name, meaning, type, default."""
    return parser_of(f"train --method {method}", METHODS[method_named(method)].config_class).format_help()
