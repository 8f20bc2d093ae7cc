"""The row space of a weight in clusters of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cluster_rows(rows: Tensor, count: int) -> list[Tensor]:
    """Rows [n, r] in at most `count` clusters by k-means: the indices of each cluster, in rising order."""
    from sklearn.cluster import KMeans

    # These settings and this seed are those that adapters have been made with; the clusters are not in their files.
    means = KMeans(min(count, len(rows)), init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit_predict(rows.detach().float().cpu().numpy())).long().to(rows.device)
    return [(labels == label).nonzero().squeeze(1) for label in labels.unique()]


def cluster_basis(rows: Tensor, rank: int, threshold: float | None = None) -> Tensor:
    """An orthonormal basis [k, r] of what the rows [n, r] of a cluster have most of, k at most `rank`.

    With `threshold`, only directions count whose share of the squared length is at least that of the largest times
    `threshold`.
    """
    rank = min(rank, *rows.shape)
    gram = rows @ rows.T
    if threshold is not None:
        shares = torch.svd_lowrank(gram, q=len(gram), niter=2)[1]
        rank = max(1, min(rank, int((shares > threshold * shares[0]).sum())))
    directions = torch.svd_lowrank(gram, q=rank, niter=2)[0]
    return torch.linalg.qr(rows.T @ directions).Q.T.contiguous()


def spread_rows(blocks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Blocks [n_i, r_i] as one matrix [out, sum of r_i]: each in rows and columns of its own.

    Args:
        blocks: the blocks.
        rows: where the rows of all blocks, one after the other, belong: [out].
    """
    return torch.block_diag(*blocks).index_select(0, rows.argsort())
