"""Sparse changes of a matrix, and the products of what they change."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.lora import needs_plain
from peft.ops.matrix import Matrix
from peft.ops.memo import remember

#: tokens of work that a sampled product takes per entry, relative to a token of the dense one (on a CPU)
SAMPLED_COST = 8


def random_positions(rows: int, columns: int, count: int, seed: int | None = None) -> Tensor:
    """`count` different positions of a matrix, chosen at random, in the order of rows: [2, count], int32."""
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    chosen = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    return torch.stack((chosen // columns, chosen % columns)).int()


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def draw_places(rows: int, columns: int, count: int, seed: int) -> Tensor:
    """`count` different positions of a matrix in the order in which this seed gives them: [2, count], on the CPU."""
    with torch.device("cpu"):
        places = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count]
        return torch.stack((places // columns, places % columns))


def flat_index(positions: Tensor, columns: int) -> Tensor:
    """Positions [2, n] of a matrix as an index into its entries, row by row."""
    return remember(positions, ("flat", columns), lambda: positions[0].long() * columns + positions[1].long())


def in_row_order(positions: Tensor) -> tuple[Tensor, Tensor]:
    """What brings the values at positions [2, n] into the order of rows [n], and the positions in that order, int32."""

    def sort() -> tuple[Tensor, Tensor]:
        order = (positions[0].long() * 2**31 + positions[1]).argsort()
        return order, positions[:, order].int()

    return remember(positions, "row order", sort)


def off_diagonal_positions(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different positions of a square matrix off its diagonal, drawn at random: [2, count]."""
    chosen = torch.randperm(size * (size - 1), generator=generator)[:count]
    rows, columns = chosen // max(size - 1, 1), chosen % max(size - 1, 1)
    return torch.stack((rows, columns + (columns >= rows)))


def add_at(matrix: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """`matrix` with `values` [n] added at `positions` [2, n], no two of them the same."""
    index = flat_index(positions, matrix.shape[1])
    return matrix.reshape(-1).index_add(0, index, values.to(matrix.dtype)).view(matrix.shape)


class Entries(Matrix):
    """A sparse matrix with `values` [n] at `positions` [2, n], which are in the order of rows, no two the same."""

    def __init__(self, positions: Tensor, values: Tensor, shape: tuple[int, int]):
        self.positions, self.values, self.shape = positions, values, shape

    def dense(self) -> Tensor:
        return add_at(self.values.new_zeros(self.shape), self.positions, self.values)

    def apply(self, x: Tensor) -> Tensor:
        rows, columns = self.positions.long()
        if x.numel() * self.values.numel() > self.shape[0] * self.shape[1] ** 2:
            nothing = x.new_zeros(()).expand(self.shape)  # takes no memory
            return sparse_linear(x, nothing, None, self.positions, self.values.to(x.dtype))
        # For a few tokens, the entries are looked up rather than put into a matrix.
        change = x.index_select(-1, columns) * self.values.to(x.dtype)
        return x.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, rows, change)

    def added_to(self, weight: Tensor) -> Tensor:
        return add_at(weight, self.positions, self.values)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_linear(x, weight, bias, self.positions, self.values.to(weight.dtype))


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, values: Tensor) -> Tensor:
    """x (W + S)^T + b, for a frozen W and a sparse S.

    The sum is made anew for the backward pass rather than kept, and where it saves work, only those entries of its
    gradient are computed that are asked for.

    Args:
        x: [..., in].
        weight: W [out, in].
        bias: b [out], or None.
        positions: those of the entries of S, in the order of rows: [2, n].
        values: the entries, [n].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    tracked = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not tracked or trained or needs_plain(x, weight, values):
        return _with_sum(x, weight, bias, positions, values)
    return _SparseLinear.apply(x, weight, bias, positions, values)


def _with_sum(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, values: Tensor) -> Tensor:
    return F.linear(x, add_at(weight, positions, values).to(x.dtype), bias if bias is None else bias.to(x.dtype))


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, positions, values)
        return _with_sum(x, weight, bias, positions, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, positions, values = ctx.saved_tensors
        flat, rows = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = grad @ add_at(weight, positions, values).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_values = sampled_product(flat.T, rows, positions).to(values.dtype) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_values


def sampled_product(a: Tensor, b: Tensor, positions: Tensor) -> Tensor:
    """Entries of a b, for a [m, t] and b [t, n], at `positions` [2, k], which are in the order of rows: [k]."""
    total, count = a.shape[0] * b.shape[1], positions.shape[1]
    dense = a.device.type != "cpu" or not torch.backends.mkl.is_available() or count * SAMPLED_COST >= total
    if dense or torch.is_grad_enabled():
        return (a @ b).reshape(-1).index_select(0, flat_index(positions, b.shape[1]))
    dtype = torch.promote_types(a.dtype, torch.float32)
    entries = _csr(positions, a.new_zeros(count, dtype=dtype), (a.shape[0], b.shape[1]))
    return torch.sparse.sampled_addmm(entries, a.to(dtype).contiguous(), b.to(dtype), beta=0).values()


def sparse_product(positions: Tensor, values: Tensor, shape: tuple[int, int], b: Tensor) -> Tensor:
    """S b for a sparse S of `shape` with `values` at `positions`, which are in the order of rows; no gradients."""
    return _csr(positions, values, shape) @ b


def _csr(positions: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix with `values` [k] at `positions` [2, k], which are in the order of rows."""
    starts = remember(positions, ("starts", shape[0]), lambda: _row_starts(positions[0], shape[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are called a beta feature
        return torch.sparse_csr_tensor(starts, positions[1], values, shape, check_invariants=False)


def _row_starts(rows: Tensor, count: int) -> Tensor:
    """Where each row begins among entries in the order of rows: [count + 1], int32."""
    counts = torch.bincount(rows, minlength=count)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
