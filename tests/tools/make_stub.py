"""Writes `src/peft/__init__.pyi`, by which type checkers and editors see the public names: made from their table.

python tests/tools/make_stub.py
"""

from __future__ import annotations

from pathlib import Path

import peft

STUB = Path(peft.__file__).with_suffix(".pyi")
#: submodules that people use as attributes of the package
MODULES = (
    "auto", "checkpoint", "config", "errors", "functional", "helpers", "mapping_func", "mixed", "optimizers",
    "registry", "tasks", "tuners",
)  # fmt: skip


def stub() -> str:
    """The text of the stub."""
    homes = {name: peft._HOMES[name] for name in peft.__all__ if name != "__version__"}
    homes |= dict.fromkeys(MODULES, "peft")
    lines = ["# Written by tests/tools/make_stub.py from the table in __init__.py.", ""]
    lines += [f"from {home} import {name} as {name}" for home, name in sorted((h, n) for n, h in homes.items())]
    lines += ["", "__version__: str", "__all__: list[str]"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
