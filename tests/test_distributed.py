"""Every method on models that several processes share out: it does what it does in one process.

By default a few cells of the matrix; `make test-distributed` runs all and records what was found, of which
docs/distributed.md is made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

import distributed_runs as runs
from processes import Pool
from shardings import DTENSOR

RECORD = Path(__file__).parent / "data" / "distributed.json"
ALL = bool(os.environ.get("PEFT_DISTRIBUTED"))
FEW = [
    ("LORA", "FSDP2"), ("HRA", "FSDP2 first"), ("IA3", "TP colwise"), ("LORA DoRA", "TP rowwise"),
    ("VBLORA", "FSDP1"), ("LORA DoRA", "FSDP1 flat"), ("LORA DoRA", "ZeRO-3 first"), ("LN_TUNING", "ZeRO-3"),
    ("XLORA", "FSDP1 flat"), ("SHADOW", "FSDP1"), ("SHADOW", "DDP"), ("SHADOW", "FSDP2 first"),
    ("ADAPTION_PROMPT", "FSDP1"), ("LORA experts", "ZeRO-3 first"), ("LORA modules_to_save", "ZeRO-3 first"),
]  # fmt: skip
EVERY = [(method, name) for name, way in runs.SHARDINGS.items() for method in way.methods or runs.ALL_METHODS]
CELLS = EVERY if ALL else FEW
#: what is refused, by what is said of it: the library does, but for torch's word on units of FSDP1
REFUSED = [
    "is to train are shared out already", "works on the keys and values of all attention heads",
    "that tensor parallelism shares out", "uniform `requires_grad`",
    "which is not supported by",
]  # fmt: skip
#: seconds for a cell; processes that take longer are ended
LIMIT = 600.0 if ALL else 120.0


@pytest.fixture(scope="module")
def pools():
    """Processes that stay from cell to cell, by how many they are."""
    started = {count: Pool(count) for count in {sharding.processes for sharding in runs.SHARDINGS.values()}}
    yield started
    for pool in started.values():
        pool.close()


@pytest.mark.parametrize(("method", "sharding"), CELLS, ids=[f"{method} {sharding}" for method, sharding in CELLS])
def test_it_does_what_it_does_in_one_process(pools, method, sharding):
    skip_without(runs.SHARDINGS[sharding].needs)
    found = runs.outcome(pools[runs.SHARDINGS[sharding].processes], method, sharding, LIMIT)
    if ALL:
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        record.setdefault(sharding, {})[method] = found
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == "yes" or (found.startswith("refused: ") and any(said in found for said in REFUSED))


def skip_without(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.slow
def test_trainer():
    skip_without("deepspeed")
    processes = Pool(2)  # of their own: accelerate has one state for a process
    try:
        answers = processes.run(runs.by_trainer, LIMIT)
    finally:
        processes.close(kill=True)
    assert [answer[:2] for answer in answers] == [("seen", None)] * 2


#: what is special to some -> the package without which it cannot be tried
TASKS = {
    runs.dropout_is_the_same: DTENSOR, runs.resumed: DTENSOR, runs.cut_up: "torch",
    runs.limited_in_half_precision_fsdp1: "torch", runs.limited_in_half_precision_fsdp2: DTENSOR,
    runs.limited_in_half_precision_zero: "deepspeed",
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_what_is_special(pools, task):
    skip_without(TASKS[task])
    answers = pools[2].run(task, LIMIT)
    assert [answer[:2] for answer in answers] == [("seen", None)] * 2


def test_what_tensor_parallelism_does_not_know_is_refused(pools):
    skip_without(DTENSOR)
    for kind, said in pools[2].run(runs.what_is_refused, LIMIT):
        assert kind == "seen"
        assert re.search(r"'1' is a LayerNorm that tensor parallelism shares out .* exclude_modules", said)
