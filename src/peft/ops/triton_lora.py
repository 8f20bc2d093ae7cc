"""Triton kernels for the products of a low-rank adapter. What each computes in plain torch stands in `ops/fused.py`.

This file needs the package triton, so it is imported where a kernel is to run, and nowhere else.

Each kernel goes over a large matrix once, in tiles, and keeps sums in float32. A dropout mask exists in registers only:
whether an element is kept follows from a seed, its row and its column (Philox, Salmon et al. 2011), whatever the tile.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

#: rows and columns of a tile; 16 rows are the fewest that a matrix unit takes
ROWS, COLUMNS = 16, 128
#: rows of a tile where a sum runs over rows
SUMMED_ROWS = 32


@triton.jit
def _rows_of(index, block, rows, ROUTED: tl.constexpr, BM: tl.constexpr):
    """Row numbers of a block, and which of them there are."""
    place = block * BM + tl.arange(0, BM)
    if ROUTED:
        row = tl.load(index + place)
        return row, row >= 0
    return place, place < rows


@triton.jit
def _kept(seed, row, start, threshold, BN: tl.constexpr):
    """The mask of some rows and of BN columns from `start` on; four neighbours share one call of the generator."""
    quad = start // 4 + tl.arange(0, BN // 4)
    column, line = tl.broadcast(quad[None, :], row[:, None])
    zero = column * 0
    r0, r1, r2, r3 = tl.philox(tl.load(seed), column, line, zero, zero)
    random = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(row.shape[0], BN)
    return (random >> 8).to(tl.int32) >= threshold


@triton.jit
def _down(
    x, a, low, index, owner, seed, rows, size, r, a_owner, a_r, a_size, scale, threshold, share,
    ROUTED: tl.constexpr, DROP: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """low[split] = scale drop(x) A^T over the columns of one split; x is [rows, size], A [r, size] or one per owner."""
    block, split = tl.program_id(0), tl.program_id(1)
    row, there = _rows_of(index, block, rows, ROUTED, BM)
    if ROUTED:
        a += tl.load(owner + block).to(tl.int64) * a_owner
    rank = tl.arange(0, BR)
    total = tl.zeros((BM, BR), tl.float32)
    for start in range(split * share, min(split * share + share, size), BK):
        column = start + tl.arange(0, BK)
        inside = column < size
        tile = tl.load(
            x + row[:, None].to(tl.int64) * size + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if DROP:
            tile = tl.where(_kept(seed, row, start, threshold, BK), tile, 0.0)
        factor = tl.load(
            a + rank[None, :] * a_r + column[:, None] * a_size, mask=inside[:, None] & (rank < r)[None, :], other=0.0
        )
        if WIDE:
            tile, factor = tile.to(tl.float32), factor.to(tl.float32)
        total = tl.dot(tile, factor.to(tile.dtype), total, input_precision="ieee")
    place = (split.to(tl.int64) * rows + row)[:, None] * r + rank[None, :]
    tl.store(low + place, total * scale, mask=there[:, None] & (rank < r)[None, :])


@triton.jit
def _up(
    base, low, b, out, index, owner, seed, rows, size, r, b_owner, b_size, b_r, scale, threshold,
    ADD: tl.constexpr, ROUTED: tl.constexpr, DROP: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out = base + drop(scale low B^T), tile by tile; `base` may be `out`. B is [size, r] or one per owner."""
    block, start = tl.program_id(0), tl.program_id(1) * BN
    row, there = _rows_of(index, block, rows, ROUTED, BM)
    if ROUTED:
        b += tl.load(owner + block).to(tl.int64) * b_owner
    column, rank = start + tl.arange(0, BN), tl.arange(0, BR)
    inside, ranked = column < size, rank < r
    few = tl.load(low + row[:, None].to(tl.int64) * r + rank[None, :], mask=there[:, None] & ranked[None, :], other=0.0)
    factor = tl.load(
        b + column[None, :].to(tl.int64) * b_size + rank[:, None] * b_r,
        mask=inside[None, :] & ranked[:, None],
        other=0.0,
    )
    if WIDE:
        few, factor = few.to(tl.float32), factor.to(tl.float32)
    product = tl.dot(few, factor, input_precision="ieee") * scale
    if DROP:
        product = tl.where(_kept(seed, row, start, threshold, BN), product, 0.0)
    place = row[:, None].to(tl.int64) * size + column[None, :]
    valid = there[:, None] & inside[None, :]
    if ADD:
        product += tl.load(base + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, product, mask=valid)


@triton.jit
def _summed(
    low, x, total, seed, rows, size, r, scale, threshold, share,
    DROP: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """total[split] = scale low^T drop(x) over the rows of one split: [r, size]."""
    start, split = tl.program_id(0) * BK, tl.program_id(1)
    column, rank = start + tl.arange(0, BK), tl.arange(0, BR)
    inside, ranked = column < size, rank < r
    result = tl.zeros((BR, BK), tl.float32)
    for first in range(split * share, min(split * share + share, rows), BM):
        row = first + tl.arange(0, BM)
        there = row < rows
        tile = tl.load(
            x + row[:, None].to(tl.int64) * size + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if DROP:
            tile = tl.where(_kept(seed, row, start, threshold, BK), tile, 0.0)
        few = tl.load(
            low + row[None, :].to(tl.int64) * r + rank[:, None], mask=there[None, :] & ranked[:, None], other=0.0
        )
        if WIDE:
            tile, few = tile.to(tl.float32), few.to(tl.float32)
        result = tl.dot(few, tile.to(few.dtype), result, input_precision="ieee")
    place = (split * r + rank).to(tl.int64)[:, None] * size + column[None, :]
    tl.store(total + place, result * scale, mask=ranked[:, None] & inside[None, :])


#: The interpreter keeps bfloat16 as integers, and multiplies them as such: there, products are taken in float32.
INTERPRETED = isinstance(_down, InterpretedFunction)


def down(
    x: Tensor,
    a: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    blocks: tuple[Tensor, Tensor] | None = None,
    splits: int | None = None,
) -> Tensor:
    """scale drop(x) A^T: [rows, r]. `a` is [r, size]; with `blocks`, [owners, r, size].

    `splits`: into how many pieces the sum is cut; by default as many as keep the device busy.
    """
    (rows, size), r = x.shape, a.shape[-2]
    number = triton.cdiv(rows, ROWS) if blocks is None else len(blocks[1])
    splits, share = _cut(size, COLUMNS, number, splits, x.device)
    low = torch.empty(splits, rows, r, device=x.device, dtype=torch.float32 if splits > 1 else x.dtype)
    index, owner = blocks or (x, x)
    strides = a.stride() if blocks else (0, *a.stride())
    with _on(x.device):
        _down[(number, splits)](
            x, a, low, index, owner, x if seed is None else seed, rows, size, r, *strides, *_factors(scale, p), share,
            ROUTED=blocks is not None, DROP=p > 0, WIDE=INTERPRETED, BM=ROWS, BK=COLUMNS, BR=_padded(r),
        )  # fmt: skip
    return low.sum(0).to(x.dtype) if splits > 1 else low[0]


def add_up(
    base: Tensor | None,
    low: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    out: Tensor | None = None,
    blocks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """base + drop(scale low B^T): [rows, size], written to `out`, which may be `base`, or to a new tensor.

    `b` is [size, r]; with `blocks`, [owners, size, r], and rows that are in no block are left as they are.
    """
    (rows, r), size = low.shape, b.shape[-2]
    out = torch.empty(rows, size, device=low.device, dtype=low.dtype) if out is None else out
    number = triton.cdiv(rows, ROWS) if blocks is None else len(blocks[1])
    index, owner = blocks or (low, low)
    strides = b.stride() if blocks else (0, *b.stride())
    with _on(low.device):
        _up[(number, triton.cdiv(size, COLUMNS))](
            out if base is None else base, low, b, out, index, owner, low if seed is None else seed, rows, size, r,
            *strides, *_factors(scale, p),
            ADD=base is not None, ROUTED=blocks is not None, DROP=p > 0, WIDE=INTERPRETED,
            BM=ROWS, BN=COLUMNS, BR=_padded(r),
        )  # fmt: skip
    return out


def add_up_(base: Tensor | None, low: Tensor, b: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """`add_up` into `base`, or into a new tensor if there is none."""
    return add_up(base, low, b, scale, p, seed, out=base)


def summed(low: Tensor, x: Tensor, scale: float, p: float, seed: Tensor | None, splits: int | None = None) -> Tensor:
    """scale low^T drop(x): [r, size], summed over the rows of both."""
    (rows, size), r = x.shape, low.shape[-1]
    number = triton.cdiv(size, COLUMNS)
    splits, share = _cut(rows, SUMMED_ROWS, number, splits, x.device)
    total = torch.empty(splits, r, size, device=x.device, dtype=torch.float32 if splits > 1 else x.dtype)
    with _on(x.device):
        _summed[(number, splits)](
            low, x, total, x if seed is None else seed, rows, size, r, *_factors(scale, p), share,
            DROP=p > 0, WIDE=INTERPRETED, BM=SUMMED_ROWS, BK=COLUMNS, BR=_padded(r),
        )  # fmt: skip
    return total.sum(0).to(x.dtype) if splits > 1 else total[0]


def _factors(scale: float, p: float) -> tuple[float, int]:
    """What products are multiplied with, and below which of 2^24 equally likely numbers an element is dropped."""
    return scale / (1 - p), round(p * 2**24)


def _padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def _cut(length: int, step: int, others: int, splits: int | None, device: torch.device) -> tuple[int, int]:
    """Pieces that a sum of `length` terms is cut into, and the terms of each, a multiple of `step`."""
    steps = triton.cdiv(length, step)
    splits = max(1, 2 * _processors(device) // others) if splits is None else splits
    share = triton.cdiv(steps, min(splits, steps))
    return triton.cdiv(steps, share), share * step


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> Any:
    """Kernels run on the current device, wherever their arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
