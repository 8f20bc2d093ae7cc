"""What the modules around a module do beside calling it: they read its weight, or take a fast path past it."""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import FunctionType

from torch import nn

from peft.core.part import Part
from peft.core.targets import base_of
from peft.core.walk import live_modules

#: a weight that a method reads for its values: `self.conv1d.weight`, but not `self.conv1d.weight.dtype`
_READ = re.compile(
    r"(?<!isinstance\()\bself\.(\w+(?:\.\w+)*)\.(?:weight|in_proj_weight)\b"
    r"(?!\s*=[^=]|\s+is\b|\.(?:data|device|dim|dtype|is_meta|ndim|new_\w+|requires_grad\w*|shape|size)\b)"
)
#: methods that are no part of running a module
_SETTING_UP = re.compile(r"__\w+__|_?(init|reset|tie|set|resize|load|extra)_.*")
#: what each of torch's blocks says of its fast path, and the value that turns it off
_FAST_PATHS = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}
_BEFORE = "_fast_path_without_adapters"


def is_read(model: nn.Module, key: str) -> bool:
    """Whether some module around the module `key` reads its weight, going by the source of their classes."""
    parts = key.split(".")
    module = model
    for place, part in enumerate(parts):
        module = base_of(module)
        if ".".join(parts[place:]) in _read_by(type(module)):  # type: ignore[arg-type]
            return True
        module = getattr(module, part)
    return False


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Paths of the modules inside one of this class whose weights its methods read."""
    read: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            if not isinstance(function, FunctionType) or _SETTING_UP.fullmatch(name):
                continue
            function = inspect.unwrap(function)
            if {"weight", "in_proj_weight"}.isdisjoint(function.__code__.co_names):
                continue
            try:
                read.update(_READ.findall(inspect.getsource(function)))
            except (OSError, TypeError):  # written where no source is kept
                continue
    return frozenset(read)


def see_to_fast_paths(model: nn.Module) -> None:
    """Turns torch's fast paths off in blocks with adapters, which they would not see; on again where these are gone."""
    for _, module in list(live_modules(model)):
        for kind, (name, off) in _FAST_PATHS.items():
            if not isinstance(module, kind):
                continue
            if any(isinstance(part, Part) for _, part in live_modules(module)):
                module.__dict__.setdefault(_BEFORE, getattr(module, name))
                setattr(module, name, off)
            elif _BEFORE in module.__dict__:
                setattr(module, name, module.__dict__.pop(_BEFORE))
