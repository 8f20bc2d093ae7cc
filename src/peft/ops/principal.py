"""The principal subspace of a matrix, and changes inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def unrounded(tensor: Tensor) -> Tensor:
    """What is in half precision, for which torch has no decompositions, in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def principal_factors(
    matrix: Tensor, rank: int, scale: float = 1.0, even: bool = False, iterations: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with scale B A the best approximation of a matrix [out, in] by one of rank r.

    Computed where the matrix is, in single precision at least. The signs of the singular vectors are those that torch
    finds there.

    Args:
        matrix: [out, in].
        rank: r.
        scale: what the product is multiplied with.
        even: share the singular values evenly; else B has them all, and the rows of A are orthonormal.
        iterations: approximate the singular vectors by this many power iterations (arXiv:0909.4061); None is exact.
        seed: what the approximation starts from.
    """
    work = unrounded(matrix)
    parts = truncated_svd(work, rank) if iterations is None else leading_parts(work, rank, iterations, seed)
    left, values, right = parts[0], parts[1] / scale, parts[2]
    inner, outer = (values.sqrt(), values.sqrt()) if even else (torch.ones_like(values), values)
    return inner[:, None] * right, left * outer


def leading_parts(matrix: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `truncated_svd`, nearly: by power iterations (arXiv:0909.4061) from a seed, and torch's own random numbers."""
    with seeded(matrix.device, seed):
        left, values, columns = torch.svd_lowrank(matrix, q=min(rank, *matrix.shape), niter=iterations)
    return left, values, columns.T


def truncated_svd(matrices: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values s of each matrix and their vectors: u s vh is the nearest of that rank.

    Args:
        matrices: [..., m, n].
        rank: those that there are, if it is more than min(m, n).
        driver: method of `torch.linalg.svd` on CUDA.

    Returns:
        u [..., m, rank], s [..., rank] and vh [..., rank, n], in single precision at least.
    """
    u, s, vh = torch.linalg.svd(unrounded(matrices), full_matrices=False, driver=driver)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def randomised_svd(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix and their vectors, nearly, by power iterations (arXiv:0909.4061).

    As `torch.svd_lowrank`, but drawn on the CPU, so that the outcome is the same on all devices but for rounding.

    Args:
        matrix: [rows, columns].
        rank: r.
        iterations: how often the start is multiplied with matrix and transpose beyond the first time.

    Returns:
        [rows, r], [r], [r, columns].
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = randomised_svd(matrix.T, rank, iterations)
        return right.T, values, left.T
    basis = torch.randn(matrix.shape[1], rank).to(matrix)
    for step in range(2 * iterations + 1):
        basis, _ = torch.linalg.qr((matrix.T if step % 2 else matrix) @ basis)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """While it lasts, random numbers on one device begin at `seed`; then they go on as if nothing had been."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    module = torch.get_device_module(device)
    with torch.random.fork_rng([device], device_type=device.type), module.device(device):
        module.manual_seed(seed)
        yield
