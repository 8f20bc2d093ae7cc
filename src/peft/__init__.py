"""Parameter-efficient fine-tuning: train a small part of a large model, save a few megabytes, load them back.

Public names are loaded when they are first used, so `import peft` costs next to nothing.
"""

from importlib import import_module
from typing import Any

from peft import compat
from peft.registry import METHODS
from peft.version import __version__

#: the module of each public name; those of the methods come from their table
_HOMES = {name: home.partition(":")[0] for name, home in compat.PUBLIC.items()}
_HOMES |= {name: method.module for method in METHODS.values() for name in method.public_names}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    return compat.submodule("peft", name)  # submodules count as attributes, imported or not


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


compat.install()
