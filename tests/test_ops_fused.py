"""The choice of Triton kernels, the masks they make, and (in `triton_cases.py`, in other processes) the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft.ops.fused import keep_mask, wanted

torch.set_num_threads(1)
CASES = Path(__file__).with_name("triton_cases.py")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_compute_what_their_twins_do(device):
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    interpret = "1" if device == "interpreter" else "0"
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES), TRITON_INTERPRET=interpret
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from peft.ops import triton_lora

POINTERS = {**dict.fromkeys(("x", "a", "b", "base", "out"), "*bf16"), "low": "*bf16", "total": "*fp32",
            "index": "*i32", "owner": "*i32", "seed": "*i64", "scale": "fp32"}
CHOICES = dict(ADD=True, DROP=True, ROUTED=True, WIDE=False, BM=32, BK=128, BN=128, BR=16)
for kernel in (triton_lora._down, triton_lora._up, triton_lora._summed):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in CHOICES else POINTERS.get(name, "i32") for name in names}
    constants = {(index,): CHOICES[name] for index, name in enumerate(names) if name in CHOICES}
    made = triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 80, 32))
    assert "mma.sync" in made.asm["ptx"], kernel
    print(made.metadata.name)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """A GPU is needed to run them, not to compile them; the interpreter takes more than the compiler does."""
    pytest.importorskip("triton", minversion="3.7")  # how a compiler is called by hand differs from version to version
    done = python("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["_down", "_up", "_summed"]


def test_they_are_off_until_they_are_switched_on():
    report = """
import importlib, os, sys
from peft.ops import fused
print(fused.enabled)
for value in ("", "0", "1", "yes"):
    os.environ["PEFT_TRITON"] = value
    try:
        print(importlib.reload(fused).enabled)
    except ValueError as error:
        print(str(error).split(":")[0])
print("peft.ops.triton_lora" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PEFT_TRITON"}
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, env=environment)
    expected = ["False", "False", "False", "True", "PEFT_TRITON='yes' is not understood", "False"]
    assert done.stdout.splitlines() == expected, done.stderr[-3000:]


def test_on_the_cpu_they_are_not_wanted(monkeypatch):
    monkeypatch.setattr("peft.ops.fused.enabled", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not wanted(torch.ones(64, 8), 4)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_masks_drop_the_share_they_are_asked_to_independently(p):
    rows, size = 500, 803
    kept = keep_mask(torch.tensor([2**50 + 3]), rows, size, p).double()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    centred = kept - kept.mean()
    for down, right in ((0, 1), (0, 2), (0, 4), (1, 0), (2, 0), (1, 1)):
        neighbours = centred[down:, right:] * centred[: rows - down, : size - right]
        assert abs(neighbours.mean().item()) < 5 * p * (1 - p) / n**0.5
    assert not torch.equal(kept, keep_mask(torch.tensor([2**50 + 4]), rows, size, p).double())
