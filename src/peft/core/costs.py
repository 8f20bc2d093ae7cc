"""What is cheaper, by measurement: the one place that knows what a product costs.

Costs are in multiplications of a product of matrices on a CPU (float32, 2 threads). `benchmarks/methods.py` times what
is decided here: a training step of each method beside the frozen model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft.core.change import Add, OnInput
from peft.ops.circulant import BlockCirculant
from peft.ops.fourier import Spectrum
from peft.ops.granular import Granular
from peft.ops.hadamard import HadamardProduct, Rescaled
from peft.ops.matrix import Dense
from peft.ops.shards import Tiled
from peft.ops.singular import Framed
from peft.ops.sparse import Entries
from peft.ops.wavelets import Wavelets

#: multiplications that take as long as writing an entry of a matrix: with it, a step with LoRA of rank 16 keeps its
#: factors and takes 1.14 of the frozen model's, without it 1.22
_WRITING = 20


def low_rank_as_weight(down: Tensor, up: Tensor, rows: int, narrow: int, wide: int) -> bool:
    """Whether W + B A, which has to be made, is faster for `rows` vectors than W and the thin products beside it."""
    if not torch.is_grad_enabled():
        return narrow * wide < rows * (narrow + wide)
    # As factors there are two products forward, two back to the input, and one back to each that is learned. As a
    # weight it is made forward and backward; see `Product.gradients` for the rest.
    rank, both = len(down), narrow + wide
    a, b = down.requires_grad, up.requires_grad
    a, b = (a, b) if a or b else (True, True)  # what has been trained and loaded is to act as before, to the last bit
    learned, thin = a + b, 2 * both + a * down.shape[1] + b * len(up)
    back = min(learned * rows * rank * both, rows * narrow * wide + learned * rank * narrow * wide)
    return 2 * (rank + _WRITING) * narrow * wide + back < rows * rank * thin


def _spectrum(matrix: Spectrum, rows: int, narrow: int, wide: int) -> bool:
    """Making the matrix takes as long as a product with 400 vectors. Transforms of a vector take 300 multiplications
    for each of its entries, a frequency takes 20."""
    waves = 300 * (narrow + wide) + 20 * matrix.tensors[0].numel()
    return torch.is_grad_enabled() or waves * rows > narrow * wide * (400 + rows)


def _circulant(matrix: BlockCirculant, rows: int, narrow: int, wide: int) -> bool:
    """Making the matrix takes 60 multiplications for each of its entries. Transforms of a vector take 150 for each of
    its entries, the products of its waves 5 for each value of the kernel.
    """
    waves = rows * (150 * (narrow + wide) + 5 * matrix.tensors[0].numel())
    return torch.is_grad_enabled() or waves > 60 * narrow * wide


def _granular(matrix: Granular, rows: int, narrow: int, wide: int) -> bool:
    """Making the matrix takes 100 multiplications for each of its entries."""
    count, _, rank = matrix.tensors[0].shape
    return rows * count * rank * (narrow + wide) > 100 * narrow * wide


#: kind of matrix -> whether it is better multiplied as the matrix that it stands for, by `rows` vectors
_AS_WEIGHT: dict[type, Callable[[Any, int, int, int], bool]] = {
    Dense: lambda matrix, rows, narrow, wide: True,
    Rescaled: lambda matrix, rows, narrow, wide: True,
    Spectrum: _spectrum,
    # The sums of the shards of x are read and written once for each row; the tiles are added to W once.
    Tiled: lambda matrix, rows, narrow, wide: rows >= narrow,
    # A sampled product takes 8 times a dense one's work for each entry; looking entries up, for few tokens, less.
    Entries: lambda matrix, rows, narrow, wide: rows * matrix.tensors[0].numel() > narrow * wide,
    BlockCirculant: _circulant,
    Granular: _granular,
    Wavelets: lambda matrix, rows, narrow, wide: rows * matrix.tensors[0].numel() > narrow * wide,
    HadamardProduct: lambda matrix, rows, narrow, wide: (
        3 * len(matrix.tensors[1]) ** 2 * (narrow + wide) >= narrow * wide
    ),
    # Two products with square matrices for each vector, or, once, for each row of U.
    Framed: lambda matrix, rows, narrow, wide: 2 * rows >= wide,
}


def add_as_weight(change: Add, rows: int, narrow: int, wide: int) -> bool:
    """Whether W + M is faster for `rows` vectors than W and M each by itself."""
    rule = _AS_WEIGHT.get(type(change.matrix))
    return rule is not None and rule(change.matrix, rows, narrow, wide)


def map_as_low_rank(change: OnInput, numel: int, weight_numel: int) -> bool:
    """Whether W R is faster as W + (W L) K^T than as W of a mapped input: reflecting few vectors costs less than W."""
    return change.thin is not None and 4 * numel >= weight_numel


def in_blocks(sizes: Sequence[int], samples: int, vectors: int) -> bool:
    """Whether the samples of a mixed batch are multiplied in one block for each adapter, all as long as the longest."""
    return vectors <= 64 or len(sizes) * max(sizes) <= 2 * samples
