"""Dropout masks of one bit per element: cheap to draw, and all that a backward pass has to keep."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

#: binary digits that a probability is rounded to; 0.1 becomes 0.10010
DIGITS = 12


@lru_cache(maxsize=64)
def rounded(p: float) -> tuple[int, ...]:
    """A probability as binary digits after the point, the last first, trailing zeros left out."""
    count = min(max(round(p * 2**DIGITS), 1), 2**DIGITS - 1)
    digits = [count >> i & 1 for i in range(DIGITS)]
    return tuple(digits[digits.index(1) :])


def drop_probability(p: float) -> float:
    """The probability that `p` is rounded to."""
    digits = rounded(p)
    return sum(digit * 2.0 ** (i - len(digits)) for i, digit in enumerate(digits))


def draw_mask(numel: int, p: float, device: torch.device) -> Tensor:
    """Random bits, packed in bytes: each is 1, for "keep", with probability 1 - p.

    64 bits are drawn at once: with independent fair words w, `m | w` halves the distance of the share of ones in m to
    1, and `m & w` halves the share, so one word per binary digit of p gives exactly that share.

    Args:
        numel: number of elements; the result has a byte for every eight of them, and up to seven bytes more.
        p: probability of "drop", rounded to `DIGITS` binary digits.
        device: where; its default generator is drawn from.
    """
    count, digits = -(-numel // 64), rounded(p)
    if device.type == "cpu":
        # torch draws word by word here, from the Mersenne Twister; this generator takes a fifth of that time.
        seed = int(torch.empty((), dtype=torch.int64).random_())
        source = np.random.SFC64(seed)
        words = (torch.from_numpy(source.random_raw(count).view(np.int64)) for _ in digits)
    else:
        words = (torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None) for _ in digits)
    dropped = next(words)  # the last digit is 1
    for digit, fair in zip(digits[1:], words, strict=True):
        dropped = dropped.bitwise_or_(fair) if digit else dropped.bitwise_and_(fair)
    return dropped.bitwise_not_().view(torch.uint8)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may be needed where gradients are wanted
def _factors(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: for each byte of a mask, what its eight elements are multiplied with."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (bits / (1 - drop_probability(p))).to(dtype)


def mask_factors(mask: Tensor, p: float, like: Tensor) -> Tensor:
    """What dropout multiplies `like` with, in its shape and dtype: 0, or 1 / (1 - p)."""
    table = _factors(p, like.dtype, like.device)
    flat = torch.nn.functional.embedding(mask.int(), table).view(-1)
    return flat[: like.numel()].view(like.shape)


#: entries of a matrix that `pieces` takes at a time on a CPU: few enough for its cache
_PIECE = 1 << 17


def pieces(mask: Tensor, p: float, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`mask_factors` for some rows of a matrix at a time, with the place of these rows; they may be overwritten."""
    count, width = like.shape
    rows = max(8, _PIECE // width & -8) if like.device.type == "cpu" else count  # whole bytes of the mask
    for first in range(0, count, rows):
        some = slice(first, min(first + rows, count))
        yield some, mask_factors(mask[first * width // 8 :][: -(-rows * width // 8)], p, like[some])
