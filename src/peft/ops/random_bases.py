"""Fixed random bases, the same for the same seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw_projections(*sizes: tuple[int, int], seed: int) -> list[Tensor]:
    """Random matrices of these sizes, one after the other, uniform in +-sqrt(6 / columns)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.init.kaiming_uniform_(torch.empty(size), generator=generator) for size in sizes]


def draw_bases(r: int, narrow: int, wide: int, seed: int, sparsity: float | None = None) -> tuple[Tensor, Tensor]:
    """Random A [r, 1, narrow] and B [wide, ceil(narrow / r), r] of standard deviation 1, the same for the same seed.

    Args:
        sparsity: None for uniform numbers, else one entry in `sparsity` is 1 or -1 (before scaling), the others 0.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    count = math.ceil(narrow / r)
    with torch.device("cpu"):
        if sparsity is None:
            # In the precision and the order that huggingface/peft draws them in: a seed means the same there.
            drawn = [torch.empty(size, dtype=torch.bfloat16) for size in ((r, 1, narrow), *[(wide, 1, r)] * count)]
            for part in drawn:
                torch.nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator)
            a, b = drawn[0], torch.cat(drawn[1:], dim=1)
        else:
            edge = 1 / (2 * sparsity)
            a, b = (torch.rand(size, generator=generator) for size in ((r, 1, narrow), (wide, count, r)))
            a, b = (((part > 1 - edge).float() - (part < edge).float()) for part in (a, b))
        return (a / a.std()).float(), (b / b.std()).float()
