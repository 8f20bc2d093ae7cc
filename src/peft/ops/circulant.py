"""Matrices of circulant blocks, and products with them by Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.lora import needs_plain
from peft.ops.matrix import Matrix


def circulant_blocks(kernel: Tensor) -> Tensor:
    """The matrix [rows * b, columns * b] whose block (m, n) has the entry kernel[m, n, (j - i) mod b] at (i, j).

    Args:
        kernel: first rows of the blocks, [rows, columns, b].
    """
    rows, columns, b = kernel.shape
    # Row i is a window into two copies of the kernel, b - i from their beginning.
    windows = torch.cat((kernel, kernel), -1).unfold(-1, b, 1)[..., 1:, :].flip(-2)
    return windows.transpose(1, 2).reshape(rows * b, columns * b)


def circulant_product(x: Tensor, kernel: Tensor) -> Tensor:
    """x M^T for the matrix M of `circulant_blocks`: [..., columns * b] to [..., rows * b].

    The product with a circulant block is a product of each wave with a number, so there is one small product for
    each of b / 2 waves.

    The gradient of x is not the true one: huggingface/peft has kernel[m, n, (j + i) mod b] in place of M there, and
    training is to go as it does there. It is what the true one is where the gradient of the result has the entries of
    each block in reverse order, but for the first. That of the kernel is the true one.

    Args:
        x: in any floating dtype; the result has that of `kernel`.
        kernel: [rows, columns, b], in single or double precision, the only ones that have transforms.
    """
    flat = x.reshape(-1, kernel.shape[1], kernel.shape[2])
    product: Any = _plain_product if needs_plain(x, kernel) else _CirculantProduct.apply
    with torch.autocast(x.device.type, enabled=False):
        return product(flat, kernel).reshape(*x.shape[:-1], -1)


def _waves(values: Tensor) -> Tensor:
    """[a, c, b] as waves, the waves first: [b / 2 + 1, a, c]."""
    return torch.fft.rfft(values).permute(2, 0, 1)


def _values(waves: Tensor, b: int) -> Tensor:
    """The other way."""
    return torch.fft.irfft(waves.permute(1, 2, 0), n=b)


def _product(x: Tensor, kernel: Tensor) -> Tensor:
    """The formula itself, for x [t, columns, b]: [t, rows, b]."""
    return _values(_waves(x.to(kernel.dtype)) @ _waves(kernel).mH, x.shape[-1])


def _plain_product(x: Tensor, kernel: Tensor) -> Tensor:
    """The same, by operations whose gradients are those wanted."""
    # This one has the gradient of x, and no value.
    other = _values(_waves(x.to(kernel.dtype)).conj() @ _waves(kernel.detach()).mT, x.shape[-1])
    return _product(x.detach(), kernel) + (other - other.detach())


class _CirculantProduct(torch.autograd.Function):
    """x is all that is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _product(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        b = x.shape[-1]
        # Products of waves again, so they have derivatives of their own.
        waves = _waves(grad)
        grad_x = _values(waves.conj() @ _waves(kernel), b).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_kernel = _values(waves.mH @ _waves(x.to(grad.dtype)), b) if ctx.needs_input_grad[1] else None
        return grad_x, grad_kernel


class BlockCirculant(Matrix):
    """The matrix of `circulant_blocks`, for a kernel [rows, columns, b] in single or double precision."""

    def __init__(self, kernel: Tensor):
        self.kernel = kernel

    def dense(self) -> Tensor:
        return circulant_blocks(self.kernel)

    def apply(self, x: Tensor) -> Tensor:
        return circulant_product(x, self.kernel).to(x.dtype)

    def columns(self, index: Tensor) -> Tensor:
        rows, _, b = self.kernel.shape
        of_block = F.embedding(index // b, self.kernel.transpose(0, 1).flatten(1)).unflatten(-1, (rows, b))
        places = (index[..., None] - torch.arange(b, device=index.device)) % b
        return of_block.gather(-1, places.unsqueeze(-2).expand(of_block.shape)).flatten(-2)
