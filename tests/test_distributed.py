"""Every method on models that several processes share out: it does what it does in one process.

By default a few cells of the matrix; `make test-distributed` runs all and records what was found, of which
docs/distributed.md is made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import distributed_runs as runs

RECORD = Path(__file__).parent / "data" / "distributed.json"
ALL = bool(os.environ.get("PEFT_DISTRIBUTED"))
FEW = [("LORA", "DDP"), ("HRA", "DDP")]
CELLS = [(method, name) for name in runs.SHARDINGS for method in runs.ALL_METHODS] if ALL else FEW
#: seconds for a cell; processes that take longer are ended
LIMIT = 120.0


@pytest.fixture(scope="module")
def pools():
    """Processes that stay from cell to cell, by how many they are."""
    started = {count: runs.Pool(count) for count in {sharding.processes for sharding in runs.SHARDINGS.values()}}
    yield started
    for pool in started.values():
        pool.close()


@pytest.mark.parametrize(("method", "sharding"), CELLS, ids=[f"{method} {sharding}" for method, sharding in CELLS])
def test_it_does_what_it_does_in_one_process(pools, method, sharding):
    found = runs.outcome(pools[runs.SHARDINGS[sharding].processes], method, sharding, LIMIT)
    if ALL:
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        record.setdefault(sharding, {})[method] = found
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == "yes" or found.startswith("refused: ")
