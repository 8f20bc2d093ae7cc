"""Random bases and what the scales make of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft
from peft.ops.random_bases import draw_bases


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 5), st.integers(0, 1000), st.sampled_from([None, 3.0]))
def test_bases_come_from_the_seed(r, narrow, more, seed, sparsity):
    wide = narrow + more
    a, b = draw_bases(r, narrow, wide, seed, sparsity)
    assert a.shape == (r, 1, narrow) and b.shape == (wide, -(-narrow // r), r)
    again = draw_bases(r, narrow, wide, seed, sparsity)
    assert all(torch.equal(x, y) for x, y in zip((a, b), again, strict=True) if x.isfinite().all())


def test_bases_have_deviation_one_and_the_asked_share_of_entries():
    for sparsity in (None, 3.0, 8.0):
        for part in draw_bases(8, 64, 96, 0, sparsity):
            assert abs(part.std().item() - 1) < 0.01
            assert part.dtype == torch.float32
        if sparsity is not None:
            values, counts = part.unique(return_counts=True)
            assert values[1] == 0 and values[0] == -values[2]
            assert abs((counts[0] + counts[2]).item() / part.numel() - 1 / sparsity) < 0.02


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.integers(0, 3), st.integers(0, 1000))
def test_factors_are_the_scaled_bases(r, inputs, outputs, spare, seed):
    """For a layer that is smaller than the largest one, of which the bases have the size."""
    torch.manual_seed(seed)
    (narrow, wide), largest = sorted((inputs, outputs)), max(inputs, outputs) + spare
    net = nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(largest, largest)).double()
    model = peft.get_peft_model(net, peft.RandLoraConfig(r=r, target_modules=["0", "1"], init_weights=False)).double()
    layer = model.base_model.model[0]
    a, b = (getattr(layer, slot)["default"].double() for slot in ("randlora_A", "randlora_B"))
    scale, gamma = (getattr(layer, slot)["default"] for slot in ("randlora_lambda", "randlora_gamma"))
    count = -(-narrow // r)
    rows = [scale[j, i] * gamma[i] * a[j, 0, :narrow] for j in range(r) for i in range(count)]
    columns = [b[:wide, i, j] for i in range(count) for j in range(r)]
    expected = 640 / r * sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
    torch.testing.assert_close(layer.change("default").delta(), expected if inputs <= outputs else expected.T)


def test_trained_scales_make_full_rank():
    torch.manual_seed(0)
    config = peft.RandLoraConfig(r=3, target_modules=["0"], init_weights=False)
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(12, 20)), config).base_model.model[0]
    nn.init.uniform_(layer.randlora_gamma["default"])
    assert torch.linalg.matrix_rank(layer.change("default").delta()) == 12
