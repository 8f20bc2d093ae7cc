"""Weights held as plain tensors, and what every kind of storage does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Storage:
    """Weights held as plain tensors in any floating dtype. Other kinds of storage override what differs."""

    #: what status reports call it; None for plain tensors
    backend: str | None = None

    def held(self, module: nn.Module, name: str) -> Tensor:
        """The tensor that is in the module for the weight, packed as it may be."""
        return getattr(module, name)

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight as a floating tensor; the very tensor where it is one."""
        return getattr(module, name)

    def check_write(self, module: nn.Module, name: str) -> None:
        """Raises NotImplementedError where `write` cannot put another weight in."""

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> Any:
        """Puts `value` in, in the storage's own form; returns what `restore` needs to undo it exactly.

        With `own`, the module gets a parameter of its own, so that modules tied to the old one keep theirs.
        """
        parameter = getattr(module, name)
        value = value.detach().to(dtype=parameter.dtype, device=parameter.device).contiguous()
        if own:
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
            return parameter
        before = parameter.data
        parameter.data = value
        return before

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        """Puts back what `write` returned, bit for bit, on the device where the module is by now."""
        parameter = getattr(module, name)
        if isinstance(before, nn.Parameter):
            before.data = before.data.to(parameter.device)
            setattr(module, name, before)
        else:
            parameter.data = before.to(parameter.device)

    def nbytes(self, before: Any) -> int:
        """Memory that `before` holds, in bytes."""
        return before.numel() * before.element_size()
