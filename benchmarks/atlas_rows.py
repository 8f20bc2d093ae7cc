"""Results as lines of a file, each written when it is there: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from run import machine

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main_budget(rows: list[Row]) -> list[Row]:
    """Those of the budget that most of them have."""
    budgets = Counter(json.dumps(row["budget"]) for row in rows)
    most = max(budgets, key=lambda budget: budgets[budget], default="")
    return [row for row in rows if json.dumps(row["budget"]) == most]


def add(path: Path, key: Row, make: Callable[[], Row]) -> None:
    """Appends `key` and what `make` finds, with the date, unless a row with that key is there.

    What a method raises is a row too: the others go on.
    """
    if any(key.items() <= row.items() for row in read(path)):
        return
    begin = time.process_time()
    try:
        found = make()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    row = {**key, **found, "seconds": round(time.process_time() - begin, 1), "date": time.strftime("%Y-%m-%d")}
    row["machine"] = f"{machine()}, {torch.get_num_threads()} threads of torch {torch.__version__}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(*key.values(), f"{row['seconds']:.1f} s", row.get("failed", ""), flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t; not a number for less than three values."""
    t = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}.get(len(values), math.nan)
    return mean(values), t * (stdev(values) if len(values) > 1 else math.nan) / math.sqrt(len(values))
