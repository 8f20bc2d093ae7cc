"""Matrices that are held in fewer numbers than their entries, and products with them that keep little for gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.internals import kept_product
from peft.ops.lora import needs_plain, product_of

M = TypeVar("M", bound="Matrix")


class Matrix:
    """A matrix M [out, in] made of some tensors. Those with structure multiply in a way that does not build them.

    Args:
        tensors: what it is made of; gradients go to them.
    """

    #: whether it takes so long to make that W + M is kept for the backward pass all the same
    kept: ClassVar[bool] = False

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def of(self: M, tensors: Sequence[Tensor]) -> M:
        """The matrix that is made of other tensors in the same way."""
        other = copy.copy(self)
        other.tensors = tuple(tensors)
        return other

    def dense(self) -> Tensor:
        """M itself."""
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """x M^T, for x [..., in]: [..., out], in the dtype of x."""
        thin = self.thin()
        if thin is None:
            return self.linear(x)
        down, up = thin
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def columns(self, index: Tensor) -> Tensor:
        """The columns of M at `index` [...]: [..., out]."""
        thin = self.thin()
        return F.embedding(index, self.dense().T) if thin is None else F.linear(F.embedding(index, thin[0].T), thin[1])

    def thin(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] with M = B A, for matrices that are of low rank."""
        return None

    def added_to(self, weight: Tensor) -> Tensor:
        """W + M."""
        return weight + self.dense().to(weight.dtype)

    def linear(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x (W + M)^T + b, where the sum is made again for the backward pass rather than kept for it.

        Args:
            x: [..., in].
            weight: W [out, in], frozen, in the dtype of x; zero if None.
            bias: b [out], frozen, in the dtype of x; or None.
        """
        tracked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))
        if not tracked or needs_plain(x, weight, *self.tensors):
            there, y = self.for_inputs(), F.linear(x, self.total(weight, x.dtype), bias)
            if there is self or not x.requires_grad:
                return y
            own = F.linear(x.detach(), self.total(weight, x.dtype), bias)
            other = F.linear(x, there.total(weight, x.dtype).detach())  # this one has the gradient of x, and no value
            return own + (other - other.detach())
        return _Linear.apply(x, self.seen(x), weight, bias, self.of(()), *self.tensors)

    def total(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """W + M, in a dtype."""
        with torch.autocast(self.tensors[0].device.type, enabled=False):
            return (self.dense() if weight is None else self.added_to(weight)).to(dtype)

    def for_inputs(self) -> Matrix:
        """The matrix that gradients of the input go through: this one, unless training goes otherwise elsewhere."""
        return self

    def seen(self, x: Tensor) -> Tensor:
        """What of the input the gradients of the tensors are made of."""
        return x

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor | None, ...]:
        """Those of its tensors, where they are to be had in another way than by the gradient of M, as they are by rule.

        Args:
            grad: gradient of the output [t, out].
            seen: what `seen` made of the input [t, ...].
        """
        raise NotImplementedError


class Dense(Matrix):
    """A matrix that is held entry by entry."""

    def dense(self) -> Tensor:
        return self.tensors[0]


class Product(Matrix):
    """scale B A, for A [r, in] and B [out, r].

    Args:
        down: A.
        up: B.
        scale: a number.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float = 1.0):
        super().__init__(down, up)
        self.scale = scale

    def dense(self) -> Tensor:
        down, up = self.tensors
        return up @ down * self.scale

    def added_to(self, weight: Tensor) -> Tensor:
        down, up = (tensor.to(weight.dtype) for tensor in self.tensors)
        return torch.addmm(weight, up, down, alpha=self.scale)

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor | None, ...]:
        down, up = (tensor.to(grad.dtype) for tensor in self.tensors)
        learned = [tensor.requires_grad for tensor in self.tensors]
        # By way of that of M, or of what the factors make of the rows: what takes fewer multiplications.
        (rows, out), (rank, width) = grad.shape, down.shape
        thin = sum(learned) * rows * rank * (out + width) < (rows + sum(learned) * rank) * out * width
        whole = None if thin else grad.T @ seen
        found = (
            ((grad @ up).T @ seen if whole is None else up.T @ whole) if learned[0] else None,
            (grad.T @ F.linear(seen, down) if whole is None else whole @ down.T) if learned[1] else None,
        )
        return tuple(one if one is None or self.scale == 1 else one * self.scale for one in found)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, weight: Any, bias: Any, matrix: Matrix, *tensors: Tensor) -> Tensor:
        total = matrix.of(tensors).total(weight, x.dtype)
        # What is seen comes from outside, where it has a history for second derivatives. A product is kept as its
        # factors, which autograd keeps anyway.
        ctx.save_for_backward(weight, total if matrix.kept else None, *tensors, *kept_product(seen))
        ctx.matrix, ctx.count = matrix, len(tensors)
        return F.linear(x, total, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, total, *rest = ctx.saved_tensors
        tensors, seen = rest[: ctx.count], product_of(rest[ctx.count :])
        wants_x, wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        twice = torch.is_grad_enabled()
        tensors = tensors if twice else _leaves(tensors, wanted)
        matrix = ctx.matrix.of(tensors)
        flat, rows = grad.flatten(0, -2), seen.flatten(0, -2)
        by_matrix, there = any(wanted) and type(matrix).gradients is Matrix.gradients, matrix.for_inputs()
        if (total is None or twice) and (by_matrix or (wants_x and there is matrix)):
            with torch.set_grad_enabled(twice or by_matrix):
                total = matrix.total(weight, grad.dtype)
        through = total if there is matrix or not wants_x else there.total(weight, grad.dtype)
        grad_x = grad @ (through if twice else through.detach()) if wants_x else None
        found: Sequence[Tensor | None] = [None] * len(tensors)
        if by_matrix:
            found = _gradients(total, tensors, wanted, flat.T @ rows)
        elif any(wanted):
            found = matrix.gradients(flat, rows)
        cast = (one if one is None else one.to(own.dtype) for one, own in zip(found, tensors, strict=True))
        return grad_x, None, None, None, None, *cast


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), of which nothing but the tensors is kept for the backward pass."""
    if not torch.is_grad_enabled() or needs_plain(*tensors):
        return function(*tensors)
    return _Recomputed.apply(function, *tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors if torch.is_grad_enabled() else _leaves(ctx.saved_tensors, wanted)
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            y = ctx.function(*tensors)
        return None, *_gradients(y, tensors, wanted, grad)


def _leaves(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The same values without a history."""
    return [tensor.detach().requires_grad_(is_wanted) for tensor, is_wanted in zip(tensors, wanted, strict=True)]


def _gradients(y: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Those that are wanted, of what y is made of; differentiable where gradients are tracked."""
    needed = [tensor for tensor, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(y, needed, grad.to(y.dtype), create_graph=torch.is_grad_enabled()))
    return [next(found) if is_wanted else None for is_wanted in wanted]


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
