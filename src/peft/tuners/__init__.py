"""The methods, a file each; LoRA, the flagship, a folder. A method imports the core and `ops`, and no other method."""

from importlib import import_module
from typing import Any

from peft.registry import METHODS

_HOMES = {name: method.module for method in METHODS.values() for name in method.public_names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'peft.tuners' has no attribute {name!r}")
