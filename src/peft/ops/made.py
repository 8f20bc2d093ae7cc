"""Matrices made of a frozen weight and small tensors: made again for the backward pass rather than kept for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.lora import needs_plain
from peft.ops.matrix import Matrix


class Made(Matrix):
    """A matrix that a function makes of small tensors, each time that it is used.

    Args:
        make: makes the matrix [out, in]. What else it reads (a weight) is frozen, and stays the same until the backward
            pass has run.
        tensors: what it is given; gradients go to them.
        lookup: makes the columns at an index [...] of the same tensors, [..., out], where that is less work.
    """

    def __init__(
        self,
        make: Callable[..., Tensor],
        tensors: Sequence[Tensor],
        lookup: Callable[..., Tensor] | None = None,
    ):
        self.make, self.tensors, self.lookup = make, tuple(tensors), lookup

    def dense(self) -> Tensor:
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            return self.make(*self.tensors)

    def apply(self, x: Tensor) -> Tensor:
        return made_linear(x, self.make, self.tensors)

    def columns(self, index: Tensor) -> Tensor:
        return super().columns(index) if self.lookup is None else self.lookup(index, *self.tensors)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return made_linear(x, lambda *tensors: weight + self.make(*tensors).to(weight.dtype), self.tensors, bias)


def made_linear(
    x: Tensor, make: Callable[..., Tensor], tensors: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """x M^T + b, for a matrix M = make(*tensors) that is not kept for the backward pass but made again.

    Args:
        x: [..., in].
        make: makes M [out, in].
        tensors: what it is given; gradients go to them.
        bias: b [out], frozen, in the dtype of x; or None.
    """
    if needs_plain(x, *tensors):
        return _plain(x, make, tensors, bias)
    return _MadeLinear.apply(x, bias, make, *tensors)


def _plain(x: Tensor, make: Callable[..., Tensor], tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The formula itself."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, make(*tensors).to(x.dtype), bias)


class _MadeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.make, ctx.bias = make, bias
        return _plain(x, make, tensors, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, needs_tensors = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # a second derivative is wanted, so everything comes from tensors with a history
            needed = [t for t, wanted in zip((x, *tensors), (needs_x, *needs_tensors), strict=True) if wanted]
            y = _plain(x, ctx.make, tensors, ctx.bias)
            found = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
            grads = [next(found) if wanted else None for wanted in (needs_x, *needs_tensors)]
            return grads[0], None, None, *grads[1:]
        tensors = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, needs_tensors, strict=True)]
        with torch.set_grad_enabled(any(needs_tensors)), torch.autocast(x.device.type, enabled=False):
            matrix = ctx.make(*tensors)
        grad_x = grad @ matrix.detach().to(grad.dtype) if needs_x else None
        found = iter(())
        if any(needs_tensors):
            grad_matrix = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            found = iter(torch.autograd.grad(matrix, [t for t in tensors if t.requires_grad], grad_matrix.to(matrix)))
        return grad_x, None, None, *(next(found) if wanted else None for wanted in needs_tensors)


def product_with(rows: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """rows W, for a frozen W that is read anew for the backward pass, where it may be packed or of another dtype.

    Args:
        rows: [n, out].
        read: gives W [out, in], the same each time.

    Returns:
        [n, in], in the dtype and on the device of `rows`; computed where W is.
    """
    return _product(rows, read) if needs_plain(rows) else _ProductWith.apply(rows, read)


def _product(rows: Tensor, read: Callable[[], Tensor]) -> Tensor:
    weight = read()
    with torch.autocast(weight.device.type, enabled=False):
        return (rows.to(weight.device) @ weight.to(rows.dtype)).to(rows.device)


class _ProductWith(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read = read
        return _product(rows, read)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return product_with(grad, lambda: ctx.read().T), None
