"""Every method on models that several processes share out: it does what it does in one process.

By default a few cells of the matrix; `make test-distributed` runs all and records what was found, of which
docs/distributed.md is made.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import distributed_runs as runs

RECORD = Path(__file__).parent / "data" / "distributed.json"
ALL = bool(os.environ.get("PEFT_DISTRIBUTED"))
FEW = [("LORA", "FSDP2"), ("HRA", "FSDP2 first"), ("IA3", "TP colwise"), ("LORA DoRA", "TP rowwise")]
CELLS = [(method, name) for name in runs.SHARDINGS for method in runs.ALL_METHODS] if ALL else FEW
#: what does not hold, and why
BROKEN = {
    ("LILY", "FSDP2"): "layers share modules, which fully_shard by block does not take (TypeError); after it, they may",
    ("CPT", "FSDP2"): "the bound on the prompt is kept to in each forward pass, and not in the shards that are trained",
}
#: seconds for a cell; processes that take longer are ended
LIMIT = 120.0


@pytest.fixture(scope="module")
def pools():
    """Processes that stay from cell to cell, by how many they are."""
    started = {count: runs.Pool(count) for count in {sharding.processes for sharding in runs.SHARDINGS.values()}}
    yield started
    for pool in started.values():
        pool.close()


@pytest.mark.parametrize(
    ("method", "sharding"),
    [
        pytest.param(*cell, marks=pytest.mark.xfail(strict=True, reason=BROKEN[cell]) if cell in BROKEN else ())
        for cell in CELLS
    ],
    ids=[f"{method} {sharding}" for method, sharding in CELLS],
)
def test_it_does_what_it_does_in_one_process(pools, method, sharding):
    found = runs.outcome(pools[runs.SHARDINGS[sharding].processes], method, sharding, LIMIT)
    if ALL:
        record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        record.setdefault(sharding, {})[method] = found
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == "yes" or found.startswith("refused: ")


@pytest.mark.parametrize("task", [runs.dropout_is_the_same, runs.resumed])
def test_what_is_special(pools, task):
    answers = pools[2].run(task, LIMIT)
    assert [answer[:2] for answer in answers] == [("seen", None)] * 2


def test_what_tensor_parallelism_does_not_know_is_refused(pools):
    for kind, said in pools[2].run(runs.what_is_refused, LIMIT):
        assert kind == "seen"
        assert re.search(r"'1' is a LayerNorm that tensor parallelism shares out .* exclude_modules", said)
