"""Peak memory of a training step: the largest resident size of a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from case import Case, Part, Prepared, Row, Scale

TITLE = "Peak memory"
TEXT = """\
The largest resident size of a process that builds the model of the training step in fp32 and trains it for two steps,
from start to end (experts: the Mixtral), once; the process of the floor imports torch and transformers but no adapter
library."""


def cases(scale: Scale) -> list[Case]:
    wanted = {"fp32": 0.0, "fp32, dropout 0.1": 0.1, "experts": 0.0}
    if scale.hidden < 128:
        del wanted["fp32, dropout 0.1"]
    return [_case(scale, name, dropout) for name, dropout in wanted.items()]


def _case(scale: Scale, name: str, dropout: float) -> Case:
    parts = {kind: _child(scale, kind, dropout, name == "experts") for kind in ("floor", "adapter")}
    rows = [Row(f"peak, {name}", "adapter", "floor", unit="B")]
    return Case(name, lambda: Prepared(parts), rows, runs=1, warm_up=False)


def _child(scale: Scale, kind: str, dropout: float, experts: bool) -> Part:
    arguments = [kind, str(dropout), str(int(experts)), repr(asdict(scale))]

    def part(clock: object) -> float:
        child = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
        return float(child.stdout.split()[-1])

    return part


def _main(kind: str, dropout: str, experts: str, sizes: str) -> None:
    import ast

    from case import llama, mixtral

    scale = Scale(**ast.literal_eval(sizes))
    if kind == "floor":
        model = (mixtral if int(experts) else llama)(scale, use_cache=False).train()
    else:
        from step import models

        model = models(scale, "fp32", float(dropout), bool(int(experts)))[1]
    _train(model, scale)
    print(_peak())


def _train(model: object, scale: Scale) -> None:
    import torch

    tokens = torch.randint(scale.vocabulary, (scale.batch, scale.length))
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)  # type: ignore[attr-defined]
    for _ in range(2):
        model(inputs_embeds=embeddings, labels=tokens).loss.backward()  # type: ignore[operator]


def _peak() -> int:
    """Bytes. What getrusage says of a process on Linux includes the one that started it, so the kernel is asked."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _main(*sys.argv[1:])
