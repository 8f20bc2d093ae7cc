"""What a method adapts where `target_modules` is not given: a table per method, from model type to targets.

A list holds names or their last parts, a string is a regular expression, as in `target_modules` itself. The tables
are plain dictionaries: an entry added to one is used from then on, by that method alone.

In target_tables.json a row is `targets: model types`, with blanks between the names; `like` names the table that a
table adds to, and `without` the model types of that one that it leaves out.
"""

from __future__ import annotations

import json
from pathlib import Path

Targets = dict[str, "list[str] | str"]

_FILE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def _table(name: str) -> Targets:
    """A table of the file, as a mapping from model type to targets that nobody else has."""
    rows = dict(_FILE["tables"][name])
    found = _table(rows.pop("like")) if "like" in rows else {}
    for model_type in rows.pop("without", "").split():
        del found[model_type]
    for targets, model_types in rows.items():
        found |= {kind: targets if "(" in targets else targets.split() for kind in model_types.split()}
    return found


#: peft type -> model type -> what to adapt
DEFAULT_TARGETS = {method: _table(name) for name, methods in _FILE["methods"].items() for method in methods.split()}
#: model type -> those of IA3's targets whose input is scaled rather than their output
FEEDFORWARD_TARGETS = _table("feedforward of ia3")

#: classes of modules that only call a linear layer and clip what goes in and comes out, and what they call it
LINEAR_INSIDE = {"Gemma4ClippableLinear": "linear", "DiffusionGemmaClippableLinear": "linear"}
