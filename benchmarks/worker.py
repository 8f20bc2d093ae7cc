"""One library's side of the benchmarks: a process that is told what to measure, one line of JSON at a time."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
import warnings
from importlib import import_module, metadata
from typing import Any

import torch
from case import SCALES, Case, Clock, Prepared


class Worker:
    """Holds the case that is being measured."""

    def __init__(self, scale: str, cpu_time: str, threads: str):
        self.scale = SCALES[scale]
        self.now = time.process_time if int(cpu_time) else time.perf_counter
        if int(threads):
            torch.set_num_threads(int(threads))
        self.groups: dict[str, dict[str, Case]] = {}
        self.prepared: Prepared | None = None

    def about(self) -> dict[str, Any]:
        """Versions and the device."""
        names = ("peft", "torch", "transformers", "safetensors")
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        return {"versions": {n: metadata.version(n) for n in names}, "threads": torch.get_num_threads(), "gpu": device}

    def group(self, name: str) -> dict[str, Any]:
        """What a group says of itself, and its cases."""
        module = import_module(name)
        self.groups[name] = {case.name: case for case in module.cases(self.scale)}
        listed = [
            {**vars(case), "prepare": None, "rows": [vars(row) for row in case.rows]}
            for case in self.groups[name].values()
        ]
        return {"title": module.TITLE, "text": module.TEXT.format(s=self.scale), "cases": listed}

    def prepare(self, group: str, case: str) -> dict[str, Any]:
        """Lets go of the last case and makes the next one ready."""
        self.prepared = None
        gc.collect()
        if group not in self.groups:
            self.group(group)
        if case not in self.groups[group]:
            raise KeyError(f"{case} is not known here")
        self.prepared = self.groups[group][case].prepare()
        outcome = {name: tensor.tolist() for name, tensor in self.prepared.outcome.items()}
        return {"outcome": outcome, "tolerance": self.prepared.tolerance}

    def run(self, rounds: int) -> list[dict[str, float]]:
        """Measures every part of the case in turn, so often: seconds, or what the part returns."""
        assert self.prepared is not None
        measured: list[dict[str, float]] = [{} for _ in range(rounds)]
        for found in measured:
            for name, part in self.prepared.parts.items():
                gc.collect()
                clock = Clock(self.now)
                value = part(clock)
                found[name] = clock.seconds if value is None else value
        return measured


def main() -> None:
    # Answers alone go where the driver listens; whatever else is printed goes to the standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
