"""Several tensors of the same task-specific kind combined into one, and matrices brought to low rank.

`weights` are one number per tensor; `density` is the share of each tensor's entries that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peft.ops.principal import unrounded

Weights = Tensor | Sequence[float]
SignMethod = Literal["total", "frequency"]


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"] = "magnitude", rescale: bool = False
) -> Tensor:
    """`tensor` with only a share of its entries left, the others zero.

    Args:
        tensor: any shape.
        density: the share that is kept, 0 to 1.
        method: keep the largest (`"magnitude"`), or each with probability `density` (`"random"`).
        rescale: divide random ones by `density`, so that the expectation stays the same.

    Raises:
        ValueError: `density` or `method` is none.
    """
    check_density(density)
    if method not in ("magnitude", "random"):
        raise ValueError(f"Unknown pruning method {method!r}; use 'magnitude' or 'random'.")
    if density == 1:
        return tensor
    if method == "random":
        kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
        return kept / density if rescale and density > 0 else kept
    flat = tensor.reshape(-1)
    largest = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view(tensor.shape)


def check_density(density: float | None) -> None:
    """Raises ValueError where `density` is no share."""
    if density is None or not 0 <= density <= 1:
        raise ValueError(f"density must be a number from 0 to 1 (the share of entries to keep), got {density!r}.")


def check_sign_method(method: str) -> None:
    """Raises RuntimeError where `method` is not known."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f"Unknown majority_sign_method {method!r}; use 'total' or 'frequency'.")


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """Which entries have the sign that most tensors have there; plus where it is a draw.

    Args:
        tensor: [tensors, ...].
        method: weigh the signs by magnitude (`"total"`), or count them (`"frequency"`).

    Raises:
        RuntimeError: an unknown `method`.
    """
    check_sign_method(method)
    signs = tensor.sign()
    majority = (tensor if method == "total" else signs).sum(dim=0)
    return signs == torch.where(majority >= 0, 1.0, -1.0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean, entry by entry, over those of the tensors [tensors, ...] that the mask lets through."""
    kept = (task_tensors * majority_sign_mask).sum(dim=0)
    return kept / majority_sign_mask.sum(dim=0).clamp_min(1)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """The weighted sum (arXiv:2212.04089), in single precision at least."""
    total = torch.zeros_like(unrounded(task_tensors[0]))
    for tensor, weight in zip(task_tensors, _numbers(weights), strict=True):
        total.add_(tensor, alpha=weight)
    return total


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Weights, density: float) -> Tensor:
    """The weighted sum of what is left of each tensor when its smallest entries are pruned."""
    return task_arithmetic([prune(tensor, density) for tensor in task_tensors], weights)


def ties(
    task_tensors: Sequence[Tensor], weights: Weights, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """Prune the smallest entries, elect a sign for each entry, average those that have it (TIES, arXiv:2306.01708)."""
    return _by_sign([prune(tensor, density) for tensor in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: Sequence[Tensor], weights: Weights, density: float) -> Tensor:
    """The weighted sum after dropping entries at random and rescaling the others (DARE, arXiv:2311.03099)."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Weights, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """TIES with entries dropped at random, as DARE does, instead of the smallest."""
    dropped = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _by_sign(dropped, weights, majority_sign_method)


def _by_sign(task_tensors: Sequence[Tensor], weights: Weights, method: SignMethod) -> Tensor:
    stacked = unrounded(torch.stack(list(task_tensors)))
    # The signs are elected before the weights: a negative weight takes an adapter away, it does not change its vote.
    agreeing = calculate_majority_sign_mask(stacked, method)
    column = stacked.new_tensor(_numbers(weights)).view(-1, *[1] * (stacked.dim() - 1))
    return disjoint_merge(stacked * column, agreeing)


def _numbers(weights: Weights) -> list[float]:
    return weights.tolist() if isinstance(weights, Tensor) else [float(weight) for weight in weights]


def combine(
    task_tensors: Sequence[Tensor],
    weights: Weights,
    method: str,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
) -> Tensor:
    """The tensors combined by the method of that name.

    Args:
        task_tensors: all of one shape.
        weights: one number each.
        method: `"linear"`, `"magnitude_prune"`, `"ties"`, `"dare_linear"` or `"dare_ties"`.
        density, majority_sign_method: what the methods other than `"linear"` need.

    Raises:
        ValueError: an unknown method, or a density that it needs and does not have.
        RuntimeError: an unknown `majority_sign_method`.
    """
    if method == "linear":
        return task_arithmetic(task_tensors, weights)
    check_density(density)
    assert density is not None
    if method in ("magnitude_prune", "dare_linear"):
        return (magnitude_prune if method == "magnitude_prune" else dare_linear)(task_tensors, weights, density)
    if method in ("ties", "dare_ties"):
        return (ties if method == "ties" else dare_ties)(task_tensors, weights, density, majority_sign_method)
    raise ValueError(f"Unknown combination {method!r}.")


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition u s vh of b a, without multiplying them out.

    Args:
        b: [..., m, k] with k at most m.
        a: [..., k, n] with k at most n.

    Returns:
        u [..., m, k], s [..., k] and vh [..., k, n], in single precision at least.
    """
    q_b, r_b = torch.linalg.qr(unrounded(b))
    q_a, r_a = torch.linalg.qr(unrounded(a).mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    return q_b @ u, s, vh @ q_a.mT


def clamp_to_quantile(tensors: Sequence[Tensor], quantile: float) -> list[Tensor]:
    """The tensors, each entry brought to at most that quantile of all their entries, and at least its negative."""
    entries = torch.cat([tensor.flatten() for tensor in tensors])
    # torch.quantile takes no more than 16 million entries.
    position = quantile * (entries.numel() - 1)
    low = int(position)
    ordered = entries.sort().values
    bound = ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    return [tensor.clamp(-bound, bound) for tensor in tensors]
