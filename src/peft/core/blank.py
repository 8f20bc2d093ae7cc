"""Modules made without their constructor, which takes most of the time that tens of thousands of small ones take."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Made = TypeVar("Made", bound=nn.Module)

_STATE = nn.Module().__dict__
#: what each module has of its own: dictionaries of parameters, submodules, hooks
_OWN = [(name, type(value)) for name, value in _STATE.items() if isinstance(value, (dict, set, list))]


def initialise(module: nn.Module) -> None:
    """Does what `nn.Module.__init__` does."""
    state = module.__dict__
    state.update(_STATE)
    for name, kind in _OWN:
        state[name] = kind()


def blank(kind: type[Made]) -> Made:
    """A module of a class as `nn.Module` leaves it: without parameters and submodules, nor settings of its class."""
    module = kind.__new__(kind)
    initialise(module)
    return module
