"""The commands and their options, out of the table in options.yaml, as dataclasses.

Nothing heavy is imported here, so that `peft --help` answers at once.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

TYPES: dict[str, Any] = {str(kind): kind for kind in (list[str], list[int], list[float], dict[str, str])}
TYPES |= {kind.__name__: kind for kind in (str, int, float, bool)}
_TABLE: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8"))
#: names of other programs -> names here
ALIASES = {other: own for own, others in _TABLE.pop("aliases").items() for other in others.split()}


def _rows(section: str) -> dict[str, str]:
    """`name (type, default)` of the options of a section, with their meaning."""
    found = {key: text for key, text in _TABLE[section].items() if key.endswith(")")}
    for other in _TABLE[section].get("like", "").split():
        found |= _rows(other)
    return found


def _needs(section: str) -> str:
    own = _TABLE[section]
    return own["needs"] or "" if "needs" in own else " ".join(map(_needs, own["like"].split()))


def _options(section: str) -> Any:
    """The options of a command as a dataclass, with its help in the docstring."""
    made, lines = [], [_TABLE[section]["about"], "", "Args:"]
    for key, text in _rows(section).items():
        name, _, rest = key.removesuffix(")").partition(" (")
        word, there, default = rest.rpartition(", ") if ", " in rest else (rest, "", "")
        kind, value = TYPES.get(word) or Literal[tuple(word.split(" | "))], yaml.safe_load(default)
        kind = kind | None if there and value is None else kind
        given: dict[str, Any] = {"default": value} if there else {}
        if isinstance(value, (list, dict)):
            given = {"default_factory": type(value)}
        made.append((name, kind, field(**given)))
        lines.append(f"    {name}: {text}")
    return make_dataclass(section, made, namespace={"__doc__": "\n".join(lines), "needs": _needs(section)})


#: command -> its options
COMMANDS: dict[str, Any] = {
    name: _options(name) for name in _TABLE if name not in ("placed", "adapted", "trained", "base")
}
