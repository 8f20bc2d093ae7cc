"""Which ranks of low-rank changes are worth keeping, and how many (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def budget_at(step: int, first: int, last: int, start: int, target: int, exponent: float = 3.0) -> int:
    """Ranks to keep at a step: `start` up to step `first`, `target` from step `last` on, between them by a power."""
    left = 1.0 if step <= first else max(0.0, 1 - (step - first) / max(last - first, 1))
    return int((start - target) * left**exponent + target)


def track_sensitivity(
    mean: Tensor, spread: Tensor, weight: Tensor, gradient: Tensor, beta1: float, beta2: float, before: bool = False
) -> None:
    """Brings moving averages up to date, in place: of the sensitivity |w dL/dw|, and of its distance from its mean.

    With `before`, from the mean as it was before this step.
    """
    sensitivity = (weight * gradient).abs_()
    middle = mean.clone() if before else mean
    mean.lerp_(sensitivity, 1 - beta1)
    spread.lerp_((sensitivity - middle).abs_(), 1 - beta2)


def triplet_scores(a: Tensor, e: Tensor, b: Tensor) -> Tensor:
    """Importance [r] of each rank, from that of the entries of A [r, in], E [r, 1] and B [out, r]."""
    return e.flatten() + a.mean(1) + b.mean(0)


def kept_ranks(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """For scores [r] of several modules, which ranks [r] are among the `budget` best of them all.

    Those that tie with the best of the others are not.
    """
    joined = torch.cat(list(scores))
    surplus = len(joined) - budget
    if surplus <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold = joined.kthvalue(surplus).values
    return [score > threshold for score in scores]


def orthogonality_gap(factors: Iterable[Tensor]) -> Tensor:
    """Mean over matrices F [r, n] of the Frobenius norm of F F^T - 1, which is 0 where all rows are orthonormal."""
    grams: dict[int, list[Tensor]] = {}
    for factor in factors:
        grams.setdefault(len(factor), []).append(factor @ factor.T)
    gaps = []
    for r, same in grams.items():
        stack = torch.stack(same)
        gaps.append(torch.linalg.vector_norm(stack - torch.eye(r, dtype=stack.dtype, device=stack.device), dim=(1, 2)))
    return torch.cat(gaps).mean()
