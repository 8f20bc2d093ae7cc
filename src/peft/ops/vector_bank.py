"""Matrices put together from a bank of vectors (arXiv:2405.15179)."""

from __future__ import annotations

import torch
from torch import Tensor


def top_weights(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the k largest logits of each row [..., k], largest first, and their places [..., k]."""
    values, places = logits.topk(k, dim=-1)
    return values.softmax(-1), places


def mix_vectors(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Sums of the k bank vectors with the largest logits, weighted by the softmax over those.

    Args:
        logits: [..., vectors].
        bank: [vectors, length].
        k: vectors in a sum.

    Returns:
        [..., length].
    """
    weights, places = top_weights(logits, k)
    # As a product of matrices: the gradient of picking vectors by index adds up one entry at a time.
    return torch.zeros_like(logits).scatter(-1, places, weights) @ bank


def pack_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All of the logits that `mix_vectors` makes use of.

    Returns:
        (places of the k largest [..., k], in the smallest integers that files have for them; their weights but for
        the last, which the others leave [..., k - 1]).
    """
    weights, places = top_weights(logits, k)
    sizes = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    dtype = next((dtype for limit, dtype in sizes if logits.shape[-1] < limit), torch.int64)
    return places.to(dtype), weights[..., :-1].contiguous()


def unpack_logits(places: Tensor, weights: Tensor, vectors: int) -> Tensor:
    """Logits [..., vectors] that `mix_vectors` makes the same of; minus infinity for vectors that were not picked."""
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    logits = torch.full((*weights.shape[:-1], vectors), -torch.inf, dtype=weights.dtype, device=weights.device)
    return logits.scatter(-1, places.long(), weights.clamp(min=0).log())
