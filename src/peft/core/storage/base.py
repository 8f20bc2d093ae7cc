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
        if name not in module._parameters and f"{name}_{'v' if f'{name}_g' in module._parameters else 'orig'}" in (
            module._parameters
        ):
            raise NotImplementedError(
                f"{name!r} of {type(module).__name__} is made of other tensors before each call (torch.nn.utils'"
                " weight_norm or spectral_norm), so nothing can be merged into it; torch.nn.utils.parametrizations has"
                " both in a form that allows it."
            )

    def keep(self, module: nn.Module, name: str, own: bool = False) -> Any:
        """What `restore` needs to put the present weight back exactly; with `own`, the parameter itself."""
        parameter = getattr(module, name)
        return parameter if own else parameter.data

    def write(self, module: nn.Module, name: str, value: Tensor, own: bool = False) -> None:
        """Puts `value` in, in the storage's own form.

        With `own`, the module gets a parameter of its own, so that modules tied to the old one keep theirs.
        """
        parameter = getattr(module, name)
        value = value.detach().to(dtype=parameter.dtype, device=parameter.device).contiguous()
        if own:
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        else:
            parameter.data = value

    def restore(self, module: nn.Module, name: str, before: Any) -> None:
        """Puts back what `keep` returned, bit for bit; where the module is by now, and in the dtype that it has."""
        parameter = getattr(module, name)
        data = before.data.to(device=parameter.device, dtype=parameter.dtype)
        if isinstance(before, nn.Parameter):
            before.data = data
            setattr(module, name, before)
        else:
            parameter.data = data

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        """The weight that `keep` returned, as `read` would give it."""
        return before.detach()

    def nbytes(self, before: Any) -> int:
        """Memory that `before` holds, in bytes."""
        return before.numel() * before.element_size()


class Narrow(Storage):
    """Plain tensors in floats of 8 bits, which nothing is computed in (diffusers casts layers from and to them)."""

    def read(self, module: nn.Module, name: str) -> Tensor:
        return widened(super().read(module, name))

    def original(self, module: nn.Module, name: str, before: Any) -> Tensor:
        return widened(super().original(module, name, before))


def widened(tensor: Tensor) -> Tensor:
    """A tensor as it can be computed with: floats of 8 bits in float32."""
    return tensor.float() if tensor.itemsize == 1 and tensor.is_floating_point() else tensor
