"""Many values drawn from one short vector (arXiv:2506.00799)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=1)  # the layers of an adapter ask for the same one after the other
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def assign_entries(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which entry of a vector each of many values takes, each entry as often as any other, in random order.

    Args:
        count: number of values.
        length: of the vector. Where it is longer than there are values, some entries are not taken.
        seed: of the order.

    Returns:
        Indices [count], and their scales [count]: 1 over the root of how often the index is taken, so that the values
        are a projection of the vector that keeps its norm.
    """
    rng = np.random.default_rng(seed)
    index = np.arange(length).repeat(count // length)
    index = np.concatenate((index, rng.choice(length, count % length, replace=False)))
    rng.shuffle(index)
    times = np.bincount(index, minlength=length)
    return torch.from_numpy(index), torch.from_numpy((1 / np.sqrt(times[index])).astype(np.float32))


def take_entries(vector: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """vector[index] * scale, of the shape of both."""
    # The gradient of `gather` takes a fraction of the time of that of indexing.
    return vector.gather(0, index.flatten()).view(index.shape) * scale.to(vector.dtype)
