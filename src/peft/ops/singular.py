"""The parts of a matrix by its singular values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix
from peft.ops.memo import remember
from peft.ops.sparse import Entries, csr, sampled_product


def common_basis(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """A basis V [columns, columns] in which several matrices W_i [rows, columns] look alike: W_i = U_i diag(l_i) V^T.

    V is that of the generalised singular value decomposition of higher order, whose U_i
    are as near to orthogonal as they can be together; with fewer rows than columns in all, the right singular vectors.

    Args:
        matrices: with the same number of columns.
        ridge: added to the diagonal of what is inverted.
    """
    stacked = torch.cat(list(matrices))
    rows, columns = stacked.shape
    if rows < columns:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T.contiguous()
    parts, triangle = torch.linalg.qr(stacked)
    mean = torch.zeros_like(triangle)
    for part in parts.split([len(matrix) for matrix in matrices]):
        mean += torch.linalg.inv(part.T @ part + ridge * torch.eye(columns, dtype=part.dtype, device=part.device))
    return triangle.T @ torch.linalg.eigh(mean / len(matrices))[1]


def coordinates(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """U [rows, columns] with columns of length 1, and l [columns], with U diag(l) V^T = W, in single precision.

    Args:
        matrix: W [rows, columns].
        basis: V [columns, columns].
    """
    exact, target = basis.double(), matrix.double().T
    left, failed = torch.linalg.solve_ex(exact, target)
    # Of a V that is singular in single precision, W may still be in the span.
    if not exact.is_meta and (failed or not left.norm() * exact.norm() < 1e6 * target.norm()):
        left = torch.linalg.pinv(exact, rtol=1e-6) @ target
    left = left.T
    lengths = left.norm(dim=0)
    return (left / lengths.clamp(min=1e-30)).to(matrix.dtype), lengths.to(matrix.dtype)


class Framed(Matrix):
    """U (S + diag(d)) V^T, or its transpose.

    Args:
        left: U [rows, n], fixed.
        core: S [n, n].
        diagonal: d [n].
        right: V [n, n], fixed.
        transposed: whether it is the transpose.
    """

    kept = True

    def __init__(self, left: Tensor, core: Entries, diagonal: Tensor, right: Tensor, transposed: bool = False):
        super().__init__(*core.tensors, diagonal)
        self.left, self.core, self.right, self.transposed = left, core, right, transposed

    def _framed_core(self) -> Tensor:
        """(S + diag(d)) V^T."""
        values, diagonal = self.tensors
        core, right = self.core.of((values,)), self._turned()
        has_csr = right.device.type == "cpu" and right.dtype.itemsize >= 4 and torch.backends.mkl.is_available()
        if torch.is_grad_enabled() or not has_csr:
            return right * diagonal[:, None] + core.dense() @ right
        return (csr(core.positions, values, core.shape) @ right).addcmul_(right, diagonal[:, None])

    def _turned(self) -> Tensor:
        """V^T, which layers share, as it lies best for all these products."""
        return remember(self.right, "turned", lambda: self.right.T.contiguous())

    def dense(self) -> Tensor:
        rows = self.left @ self._framed_core()
        return rows.T if self.transposed else rows

    def added_to(self, weight: Tensor) -> Tensor:
        if self.transposed or weight.dtype != self.left.dtype:
            return super().added_to(weight)
        return torch.addmm(weight, self.left, self._framed_core())

    def apply(self, x: Tensor) -> Tensor:
        if self.transposed:
            return super().apply(x)
        values, diagonal = self.tensors
        inner = x @ self.right.to(x.dtype)
        inner = inner * diagonal.to(x.dtype) + self.core.of((values,)).apply(inner)
        return F.linear(inner, self.left.to(x.dtype))

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        grad, seen = (seen, grad) if self.transposed else (grad, seen)
        # That of S + diag(d), as a whole, is U^T G V for the gradient G of U (S + diag(d)) V^T.
        half, right = self.left.to(grad).T @ (grad.T @ seen), self._turned().to(grad)
        return sampled_product(half, right.T, self.core.positions), (half * right).sum(1)

    def columns(self, index: Tensor) -> Tensor:
        if not self.transposed:
            return super().columns(index)
        return F.embedding(index, self.left) @ self._framed_core()


def keeping_off(parameter: Tensor, basis: Tensor) -> Tensor:
    """The parameter itself, whose gradient has no part in the span of a basis: g - B B^T g.

    Args:
        parameter: [n, m].
        basis: B [n, k], with orthonormal columns; fixed.
    """
    return _KeepingOff.apply(parameter, basis)


class _KeepingOff(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, basis: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        basis = basis.to(grad.dtype)
        return grad - basis @ (basis.T @ grad), None
