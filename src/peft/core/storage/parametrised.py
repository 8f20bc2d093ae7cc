"""Weights that are made of other tensors by `torch.nn.utils.parametrize` (weight_norm, spectral_norm, orthogonal)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.storage.base import Storage


class Parametrised(Storage):
    """Weights that a parametrisation makes of tensors of its own, which are what is written to."""

    def check_write(self, module: nn.Module, name: str) -> None:
        steps = copy.deepcopy(_steps(module, name)).eval()
        with torch.no_grad():
            weight = getattr(module, name)
            other = 1.1 * weight + 0.3 * weight.flip(0)
            try:
                back = _made(steps, _parts_for(steps, other))
            except (NotImplementedError, RuntimeError, ValueError):
                back = None
        if back is None or not torch.allclose(back, other, rtol=1e-3, atol=1e-3 * float(other.abs().max())):
            kinds = ", ".join(type(step).__name__.strip("_") for step in steps)
            raise NotImplementedError(
                f"{name!r} of {type(module).__name__} is parametrised ({kinds}) and cannot take any value, so nothing"
                f" can be merged into it; torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) before"
                " adding adapters makes it a plain weight."
            )

    def keep(self, module: nn.Module, name: str, own: bool = False) -> list[Tensor]:
        return [part.data for part in _parts(_steps(module, name))]

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> None:
        steps = _steps(module, name)
        values = _parts_for(steps, value.detach())
        for part, new in zip(_parts(steps), values if isinstance(values, (tuple, list)) else [values], strict=True):
            part.data = new.to(part).contiguous()

    def restore(self, module: nn.Module, name: str, before: list[Tensor]) -> None:
        for part, old in zip(_parts(_steps(module, name)), before, strict=True):
            part.data = old.to(part)

    def original(self, module: nn.Module, name: str, before: list[Tensor]) -> Tensor:
        steps = _steps(module, name)
        with torch.no_grad():
            return _made(steps, [old.to(part) for part, old in zip(_parts(steps), before, strict=True)])

    def nbytes(self, before: list[Tensor]) -> int:
        return sum(part.numel() * part.element_size() for part in before)


def is_parametrised(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module is made by a parametrisation."""
    return name in (module._modules.get("parametrizations") or ())  # type: ignore[operator]


def _steps(module: nn.Module, name: str) -> Any:
    return module.parametrizations[name]  # type: ignore[index]


def _parts(steps: Any) -> list[Tensor]:
    """The tensors that a weight is made of."""
    return list(steps._parameters.values()) + [buffer for key, buffer in steps._buffers.items() if "original" in key]


def _parts_for(steps: Any, value: Tensor) -> Any:
    """What the tensors have to be for the weight to be `value`."""
    parts: Any = value
    for step in reversed(steps):
        parts = step.right_inverse(parts)
    return parts


def _made(steps: Any, parts: Any) -> Tensor:
    """The weight that is made of tensors."""
    value = parts
    for place, step in enumerate(steps):
        value = step(*value) if place == 0 and isinstance(value, (tuple, list)) else step(value)
    return value
