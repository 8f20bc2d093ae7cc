"""Matrices of circulant blocks, and products with them by Fourier transforms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.matrix import Made, Matrix


def circulant_blocks(kernel: Tensor, step: int = 1) -> Tensor:
    """The matrix [rows * b, columns * b] whose block (m, n) has the entry kernel[m, n, (j - step i) mod b] at (i, j).

    Args:
        kernel: first rows of the blocks, [rows, columns, b].
        step: 1 or -1.
    """
    rows, columns, b = kernel.shape
    # Each row is a window into two copies of the kernel.
    windows = torch.cat((kernel, kernel), -1).unfold(-1, b, 1)
    windows = windows[..., 1:, :].flip(-2) if step == 1 else windows[..., :b, :]
    return windows.transpose(1, 2).reshape(rows * b, columns * b)


def circulant_product(x: Tensor, kernel: Tensor) -> Tensor:
    """x M^T for the matrix M of `circulant_blocks`: [..., columns * b] to [..., rows * b].

    The product with a circulant block is a product of each wave with a number, so there is one small product for
    each of b / 2 waves.

    Args:
        x: in any floating dtype; the result has that of `kernel`.
        kernel: [rows, columns, b], in single or double precision, the only ones that have transforms.
    """
    _, columns, b = kernel.shape
    with torch.autocast(x.device.type, enabled=False):
        waves = torch.fft.rfft(x.reshape(-1, columns, b).to(kernel.dtype)).permute(2, 0, 1)
        product = waves @ torch.fft.rfft(kernel).permute(2, 0, 1).mH
        return torch.fft.irfft(product.permute(1, 2, 0), n=b).reshape(*x.shape[:-1], -1)


class BlockCirculant(Matrix):
    """The matrix of `circulant_blocks`, for a kernel [rows, columns, b] in single or double precision.

    The gradient of its input is not the true one: huggingface/peft has kernel[m, n, (j + i) mod b] in place of M there,
    and training is to go as it does there. That of the kernel is the true one.
    """

    def dense(self) -> Tensor:
        return circulant_blocks(self.tensors[0])

    def for_inputs(self) -> Made:
        # Another first row turns the one into the other: row i of a block is that many places further.
        return Made(lambda kernel: circulant_blocks(kernel, -1), self.tensors)

    def apply(self, x: Tensor) -> Tensor:
        return self.linear(x) if torch.is_grad_enabled() else circulant_product(x, self.tensors[0]).to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        (kernel,) = self.tensors
        rows, _, b = kernel.shape
        of_block = F.embedding(index // b, kernel.transpose(0, 1).flatten(1)).unflatten(-1, (rows, b))
        places = (index[..., None] - torch.arange(b, device=index.device)) % b
        return of_block.gather(-1, places.unsqueeze(-2).expand(of_block.shape)).flatten(-2)
