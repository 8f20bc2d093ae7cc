"""Matrices that repeat one block."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft.ops.shards import Tiled, shard_sums, transform_shards

small = st.integers(1, 5)


@settings(deadline=None, max_examples=40)
@given(out=small, r=small, extra=st.integers(0, 12), seed=st.integers(0, 99))
def test_sums_of_shards_make_the_product_with_the_tiled_block(out, r, extra, seed):
    generator = torch.Generator().manual_seed(seed)
    block, x = torch.randn(r, out, generator=generator), torch.randn(2, 3, r + extra, generator=generator)
    tiled = Tiled(block, r + extra).dense()
    assert torch.equal(tiled, torch.stack([block[j % r] for j in range(r + extra)], dim=1))
    torch.testing.assert_close(shard_sums(x, r) @ block, x @ tiled.T, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(out=small, width=small, r=small, seed=st.integers(0, 99))
def test_each_block_is_transformed(out, width, r, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, blocks = torch.randn(out * r, width * r, generator=generator), torch.randn(out, r, r, generator=generator)
    changed = transform_shards(weight, blocks)
    for j in range(out):
        for k in range(width):
            place = slice(j * r, (j + 1) * r), slice(k * r, (k + 1) * r)
            expected = weight[place] + weight[place] @ blocks[j] + blocks[j]
            torch.testing.assert_close(changed[place], expected, rtol=1e-4, atol=1e-5)
