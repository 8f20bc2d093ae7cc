"""Matrices of circulant blocks, and products with them by Fourier transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Matrix


def circulant_blocks(kernel: Tensor, step: int = 1) -> Tensor:
    """The matrix [rows, b, columns, b] whose block (m, n) has the entry kernel[m, n, (j - step i) mod b] at (i, j).

    Args:
        kernel: first rows of the blocks, [rows, columns, b].
        step: 1 or -1.
    """
    # Each row is a window into two copies of the kernel.
    windows = torch.cat((kernel, kernel), -1).unfold(-1, kernel.shape[-1], 1)
    windows = windows[..., 1:, :].flip(-2) if step == 1 else windows[..., :-1, :]
    return windows.transpose(1, 2)


def diagonal_sums(matrix: Tensor, rows: int, b: int) -> Tensor:
    """What `circulant_blocks` is the transpose of, for step 1: [rows * b, columns * b] to [rows, columns, b]."""
    blocks = matrix.view(rows, b, -1, b)
    # Row i of each block, i places further, in one view of two copies.
    twice = torch.cat((blocks, blocks), -1)
    first, second, third, _ = twice.stride()
    return twice.as_strided(blocks.shape, (first, second + 1, third, 1)).sum(1)


class BlockCirculant(Matrix):
    """The matrix of `circulant_blocks`, for a kernel [rows, columns, b] in single or double precision.

    The gradient of its input is not the true one: huggingface/peft has kernel[m, n, (j + i) mod b] in place of M there,
    and training is to go as it does there. That of the kernel is the true one.
    """

    def __init__(self, kernel: Tensor, step: int = 1):
        super().__init__(kernel)
        self.step = step

    def dense(self) -> Tensor:
        return circulant_blocks(self.tensors[0], self.step).flatten(2).flatten(0, 1)

    def added_to(self, weight: Tensor) -> Tensor:
        blocks = circulant_blocks(self.tensors[0], self.step)
        return (weight.reshape(blocks.shape) + blocks.to(weight.dtype)).view(weight.shape)

    def for_inputs(self) -> BlockCirculant:
        # Another first row turns the one into the other: row i of a block is that many places further.
        return BlockCirculant(self.tensors[0], -1)

    def gradients(self, grad: Tensor, seen: Tensor) -> tuple[Tensor]:
        (kernel,) = self.tensors
        return (diagonal_sums(grad.T @ seen, kernel.shape[0], kernel.shape[2]),)

    def apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.linear(x)
        # The product with a circulant block is one of each wave with a number: a small product for each of b / 2 waves.
        (kernel,) = self.tensors
        _, columns, b = kernel.shape
        with torch.autocast(x.device.type, enabled=False):
            waves = torch.fft.rfft(x.reshape(-1, columns, b).to(kernel.dtype)).permute(2, 0, 1)
            product = (waves @ torch.fft.rfft(kernel).permute(2, 0, 1).mH).permute(1, 2, 0)
            return torch.fft.irfft(product, n=b).reshape(*x.shape[:-1], -1).to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        (kernel,) = self.tensors
        rows, _, b = kernel.shape
        of_block = F.embedding(index // b, kernel.transpose(0, 1).flatten(1)).unflatten(-1, (rows, b))
        places = (index[..., None] - torch.arange(b, device=index.device)) % b
        return of_block.gather(-1, places.unsqueeze(-2).expand(of_block.shape)).flatten(-2)
