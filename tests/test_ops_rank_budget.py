"""The schedule of the budget, and who gets it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.rank_budget import budget_at, kept_ranks, orthogonality_gap, track_sensitivity, triplet_scores


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 50), st.integers(0, 40), st.integers(0, 40))
def test_budget_falls_from_start_to_target(first, length, target, more):
    last, start = first + length, target + more
    budgets = [budget_at(step, first, last, start, target) for step in range(last + 3)]
    assert budgets[: first + 1] == [start] * (first + 1)
    assert budgets[last:] == [target] * 3
    assert budgets == sorted(budgets, reverse=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 22), st.integers(0, 1000))
def test_the_best_are_kept(sizes, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(size, generator=generator) for size in sizes]
    masks = kept_ranks(scores, budget)
    assert [len(mask) for mask in masks] == sizes
    kept, dropped = torch.cat(scores)[torch.cat(masks)], torch.cat(scores)[~torch.cat(masks)]
    assert len(kept) == min(budget, sum(sizes))
    assert not len(kept) or not len(dropped) or kept.min() > dropped.max()


def test_moving_averages():
    mean, spread = torch.zeros(1), torch.zeros(1)
    expected_mean = expected_spread = 0.0
    for weight, gradient in ((2.0, -3.0), (1.0, 0.5), (-4.0, 1.0)):
        track_sensitivity(mean, spread, torch.tensor([weight]), torch.tensor([gradient]), 0.8, 0.6)
        sensitivity = abs(weight * gradient)
        expected_mean = 0.8 * expected_mean + 0.2 * sensitivity
        expected_spread = 0.6 * expected_spread + 0.4 * abs(sensitivity - expected_mean)
    torch.testing.assert_close(torch.cat([mean, spread]), torch.tensor([expected_mean, expected_spread]))


def test_score_of_a_triplet():
    a, b, e = torch.rand(3, 5), torch.rand(4, 3), torch.rand(3, 1)
    expected = [e[i, 0] + a[i].sum() / 5 + b[:, i].sum() / 4 for i in range(3)]
    torch.testing.assert_close(triplet_scores(a, e, b), torch.stack(expected))


def test_gap_of_orthonormal_rows_is_zero_with_a_gradient():
    q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q.T.contiguous().requires_grad_()
    orthogonality_gap([q]).backward()
    assert orthogonality_gap([q]) < 1e-12 and q.grad.isfinite().all()


def test_gap_is_the_mean_over_factors_of_any_rank():
    factors = [torch.randn(r, 5) for r in (2, 3, 2)]
    norms = [torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f))) for f in factors]
    torch.testing.assert_close(orthogonality_gap(factors), torch.stack(norms).mean())
    torch.testing.assert_close(orthogonality_gap([*factors, torch.empty(0, 5)]), torch.stack(norms).sum() / 4)
