"""A seed means the values that it means to huggingface/peft, recorded by `tools/record_starts.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import peft

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import record_starts

RECORDED = json.loads(record_starts.DATA.read_text(encoding="utf-8"))


IDS = [f"{row[0]}{number}" for number, row in enumerate(RECORDED)]


def bits_of_bfloat16_are_those_of_float32() -> bool:
    draws = [torch.rand(8, dtype=d, generator=torch.Generator().manual_seed(0)) for d in (torch.bfloat16, torch.float)]
    return torch.allclose(draws[0].float(), draws[1], atol=0.01)


@pytest.mark.parametrize(("name", "settings", "expected"), RECORDED, ids=IDS)
def test_start_values_of_a_seed(name, settings, expected):
    if name == "RandLoraConfig" and not bits_of_bfloat16_are_those_of_float32():
        pytest.skip("this torch draws bfloat16 otherwise than the one of the record, so the bases are others in both")
    found = record_starts.starts(peft, name, settings)
    assert found.keys() == expected.keys()
    for key, sums in expected.items():
        assert found[key] == pytest.approx(sums, rel=1e-4), key


def test_every_case_is_recorded():
    assert [row[:2] for row in RECORDED] == [list(case) for case in record_starts.CASES]
