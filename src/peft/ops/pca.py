"""Principal components of data that comes in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from peft.ops.principal import seeded


class IncrementalPca:
    """The first principal components of all rows seen so far (Ross et al. 2008, doi:10.1007/s11263-007-0075-7).

    A batch is put below the components found before, each times its singular value, and a row for the shift of the
    mean; the decomposition of that has the new components. It is a randomised one, with a seed of its own, so that the
    outcome depends on the data alone.

    Args:
        count: how many components to keep.

    Attributes:
        components: unit vectors [count, features], the most important first; None before the first batch.
        singular_values: [count].
        shares: of the variance that each explains [count].
        similarity: cosine of each component with what it was a batch before; empty as long as there is no such.
    """

    def __init__(self, count: int):
        self.count = count
        self.components: Tensor | None = None
        self.singular_values = torch.empty(0)
        self.shares = self.similarity = torch.empty(0)
        self._seen = 0
        self._mean = self._scatter = torch.zeros(())

    def update(self, rows: Tensor) -> None:
        """Takes in a batch [rows, features] of at least `count` rows."""
        rows = rows.float()
        total, mean = self._seen + len(rows), rows.mean(0)
        centred, shift = rows - mean, self._mean - mean
        # The sum of squares about the mean of each feature, of old and new rows together.
        between = shift.square() * (self._seen * len(rows) / total)
        self._scatter = self._scatter + centred.square().sum(0) + between
        if self.components is not None:
            drift = shift * (self._seen * len(rows) / total) ** 0.5
            centred = torch.cat((self.singular_values[:, None] * self.components, centred, drift[None]))
        with seeded(centred.device, 42):
            _, values, components = torch.svd_lowrank(centred, q=min(2 * self.count, *centred.shape), niter=4)
        found, before = components.T[: self.count], self.components
        # A direction has no sign.
        self.similarity = torch.empty(0) if before is None else torch.cosine_similarity(found, before).abs()
        self.components, self.singular_values = found, values[: self.count]
        self.shares = self.singular_values.square() / self._scatter.sum().clamp(min=torch.finfo(rows.dtype).tiny)
        self._mean = mean if self._seen == 0 else (self._mean * self._seen + mean * len(rows)) / total
        self._seen = total

    def is_stable(self, count: int, tau: float) -> bool:
        """Whether the first components stay as they are from batch to batch."""
        return len(self.similarity) > 0 and bool((self.similarity[:count] >= tau).all())

    def directions(self, count: int, whiten: bool) -> Tensor:
        """The first components [count, features]; over the roots of their singular values, if `whiten`."""
        assert self.components is not None
        directions = self.components[:count]
        return directions / self.singular_values[:count, None].sqrt() if whiten else directions
