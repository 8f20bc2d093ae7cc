"""The commands and their options, out of options.yaml, as dataclasses; and what they know, out of tables.yaml.

Nothing heavy is imported here, so that `peft --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import yaml

from peft.fields import Settings
from peft.values import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


class OptionError(ValueError):
    """The command line asks for something that does not exist, does not fit, or cannot be read."""


def refuse(when: object, words: str) -> None:
    """Raises an error with these words, if `when` holds; one of the command line where they begin with an option."""
    if when:
        raise (OptionError if words.startswith(("--", "either --")) else ValueError)(words)


@contextmanager
def explained(words: str = "", kind: type[ValueError] = ValueError, of: type[Exception] = Exception) -> Iterator[None]:
    """What goes wrong inside, as an error of this `kind` in one line that says `words` first."""
    try:
        yield
    except of as error:
        line = shorten(str(error), 1000) or type(error).__name__
        raise kind(f"{words}: {line}" if words else line) from error


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


#: what the commands know, by the names of the sections in tables.yaml
TABLES = SimpleNamespace(**_read("tables.yaml"))
#: names of other programs -> names here
ALIASES = {other: own for own, others in TABLES.aliases.items() for other in others.split()}
TYPES: dict[str, Any] = {str(kind): kind for kind in (list[str], list[int], list[float], dict[str, str])}
TYPES |= {kind.__name__: kind for kind in (str, int, float, bool)}
TYPES |= {"int > 0": PositiveInt, "float > 0": PositiveFloat, "share": Fraction}
TYPES |= {"int >= 0": NonNegativeInt, "float >= 0": NonNegativeFloat}
TYPES["part"] = Annotated[float, Range("must be above 0 and at most 1", lambda number: 0 < number <= 1)]
TYPES["tasks"] = Literal[tuple(TABLES.tasks)]
_TABLE = _read("options.yaml")
#: the options of sections that commands have in common -> which of these come first, after the command's own
_SHARED = {key: n for n, name in enumerate(("base", "trained", "adapted", "placed"), 1) for key in _TABLE.pop(name)}


def _options(command: str, section: Mapping[str, Any]) -> Any:
    """The options of a command as a dataclass, with its help in the docstring; those that are needed come first."""
    made, lines = [], [section["about"], "", "Args:"]
    keys = [key for key in section if key.endswith(")")]
    for key in sorted(keys, key=lambda key: ("," in key, _SHARED.get(key, 0))):
        name, _, rest = key.removesuffix(")").partition(" (")
        word, there, default = rest.rpartition(", ") if ", " in rest else (rest, "", "")
        kind, value = TYPES.get(word) or Literal[tuple(word.split(" | "))], yaml.safe_load(default)
        kind = kind | None if there and value is None else kind
        given: dict[str, Any] = {"default": value} if there else {}
        if isinstance(value, (list, dict)):
            given = {"default_factory": type(value)}
        made.append((name, kind, field(**given)))
        lines.append(f"    {name}: {section[key]}")
    more = {"__doc__": "\n".join(lines), "needs": section["needs"] or ""}
    return make_dataclass(command, made, bases=(Settings,), namespace=more)


#: command -> its options
COMMANDS = {name: _options(name, section) for name, section in _TABLE.items()}
