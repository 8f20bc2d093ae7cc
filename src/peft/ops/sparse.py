"""Sparse changes of a matrix, and the products of what they change."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from peft.ops.matrix import Matrix
from peft.ops.memo import remember

#: work of a sampled product for each entry, and for each row and column, which lie the wrong way: relative to what the
#: dense one takes for an entry (on a CPU)
SAMPLED_COST, TURNED_COST = 7, 180


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def draw_places(rows: int, columns: int, count: int, seed: int | None) -> Tensor:
    """`count` different positions of a matrix in the order in which a seed gives them: [2, count], on the CPU."""
    with torch.device("cpu"):
        generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
        places = torch.randperm(rows * columns, generator=generator)[:count]
        return torch.stack((places // columns, places % columns))


def check_frequencies(count: int, key: str, rows: int, columns: int) -> None:
    """Raises ValueError where the weight of a module has fewer entries than trained coefficients (`n_frequency`)."""
    if count > rows * columns:
        raise ValueError(
            f"n_frequency={count} is more than the entries of the weight of {key!r}, {rows} x {columns}; choose less,"
            " for this module alone in n_frequency_pattern."
        )


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
        super().__init__(values)
        self.positions, self.shape = positions, shape

    @classmethod
    def at(cls, places: Tensor, values: Tensor, shape: tuple[int, int]) -> Entries:
        """The same for `places` [2, n] in any order."""
        order, positions = in_row_order(places)
        return cls(positions, values.index_select(0, order), shape)

    def dense(self) -> Tensor:
        return self.added_to(self.tensors[0].new_zeros(self.shape))

    def apply(self, x: Tensor) -> Tensor:
        (rows, columns), values = self.positions.long(), self.tensors[0]
        if x.numel() * values.numel() > self.shape[0] * self.shape[1] ** 2:
            return self.linear(x)
        # For a few tokens, the entries are looked up rather than put into a matrix.
        change = x.index_select(-1, columns) * values.to(x.dtype)
        return x.new_zeros(*x.shape[:-1], self.shape[0]).index_add(-1, rows, change)

    def added_to(self, weight: Tensor) -> Tensor:
        return add_at(weight, self.positions, self.tensors[0])

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        return (sampled_product(grad.T, seen, self.positions),)


def sampled_product(a: Tensor, b: Tensor, positions: Tensor) -> Tensor:
    """Entries of a b, for a [m, t] and b [t, n], at `positions` [2, k], which are in the order of rows: [k]."""
    (rows, columns), count = (a.shape[0], b.shape[1]), positions.shape[1]
    dense = a.device.type != "cpu" or not torch.backends.mkl.is_available()
    dense |= count * SAMPLED_COST + (rows + columns) * TURNED_COST >= rows * columns
    if dense or torch.is_grad_enabled():
        return (a @ b).reshape(-1).index_select(0, flat_index(positions, b.shape[1]))
    dtype = torch.promote_types(a.dtype, torch.float32)
    entries = csr(positions, a.new_zeros(count, dtype=dtype), (rows, columns))
    return torch.sparse.sampled_addmm(entries, a.to(dtype).contiguous(), b.to(dtype), beta=0).values()


def csr(positions: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse tensor with `values` [k] at `positions` [2, k], which are in the order of rows; no gradients."""
    starts = remember(positions, ("starts", shape[0]), lambda: _row_starts(positions[0], shape[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are called a beta feature
        return torch.sparse_csr_tensor(starts, positions[1], values, shape, check_invariants=False)


def _row_starts(rows: Tensor, count: int) -> Tensor:
    """Where each row begins among entries in the order of rows: [count + 1], int32."""
    counts = torch.bincount(rows, minlength=count)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
