"""Every method trained to the end with both libraries: the same seed, data and 200 steps, written to docs/parity.md.

    python benchmarks/parity.py                what is not measured yet
    python benchmarks/parity.py --only LORA    these methods anew

What has been measured lies in build/parity.json, so a run that is broken off goes on where it was. Each library has one
process, as in `run.py`. Training carries every rounding on, some methods further than others; so where the losses are
not the same to the fourth digit, the reference runs twice more, with base weights that are off by their last bit.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from case import SCALES, Case, Prepared, Scale, llama, twin
from methods import method_config

import peft

ROOT = Path(__file__).resolve().parents[1]
TITLE, TEXT = "Training to the end", ""
STEPS, FIRST, LAST = 200, 20, 10
SIZE = Scale(hidden=32, intermediate=64, layers=2, vocabulary=16, batch=4, length=12)
RATE = 3e-3
#: what is the same, whatever else differs; and how far beyond the reference's own spread a difference may go
SAME, SPREAD = 1e-4, 4.0
#: where the last bit of each base weight moves to, by the name of the run
NUDGES = {"up": 9.0, "down": -9.0}
_SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": STEPS, "tinit": 20, "tfinal": 80, "deltaT": 5},
    "C3A": {"block_size": 16},
    "MISS": {"r": 16},
    "POLY": {"n_tasks": 3},
    "ROAD": {"group_size": 16},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 8},
}
PAGE = """\
# Trained with both libraries

With the same seed, data and settings, training goes the same way here and in huggingface/peft. A Llama of two layers
that continues sequences with a stride of one to three is trained for {steps} steps (AdamW, {rate}) on strides of five
and seven, in float32, with the default settings of each method (smaller where they do not fit its width) on all linear
layers where it has targets to choose.

The loss at the end is the mean of the last {last} steps; differences are the largest in any step. "yes" is below
{same:g}. Where it is not, `own` is how far the reference is from itself when each base weight is off by its last bit,
up or down: "within noise" is at most {spread:g} times that, in the first {first} steps and in all. In DEFT and
FRoD, which are made of decompositions, a last bit is seen in the first steps. In the others training
itself enlarges it, after {first} steps that agree; such a difference says nothing about which library learns better.
What else differs is in [Differences](differences.md).

Written by `python benchmarks/parity.py` on {date}: {versions}; {machine}.

| method | start | end, ours | end, reference | difference, {first} steps | own | difference, all | own | the same |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


# ---- in the process of one library


def cases(scale: Scale) -> list[Case]:
    steps = 3 if scale == SCALES["smoke"] else STEPS
    names = [method.value for method in peft.PEFT_TYPE_TO_CONFIG_MAPPING]
    return [
        Case(f"{name} {nudge}".strip(), functools.partial(_trained, name, nudge, steps), [])
        for name in names
        for nudge in ("", *NUDGES)
    ]


def sequences(step: int, strides: list[int]) -> torch.Tensor:
    """Tokens [batch, length] that go on by a stride for each sample, the same for a step in every process."""
    generator = torch.Generator().manual_seed(step)
    first, which = (torch.randint(n, (SIZE.batch, 1), generator=generator) for n in (SIZE.vocabulary, len(strides)))
    return (first + torch.tensor(strides)[which] * torch.arange(SIZE.length)) % SIZE.vocabulary


@functools.cache
def pretrained(steps: int) -> Any:
    """A small Llama that knows how to go on by one, two or three."""
    model = llama(SIZE, use_cache=False).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(steps):
        _step(model, optimizer, sequences(step, [1, 2, 3]), {})
    return model.requires_grad_(False).eval()


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, more: dict[str, Any]) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, **more).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _trained(method: str, nudge: str, steps: int) -> Prepared:
    """The loss of every step, from base weights whose last bit is nudged."""
    base = twin(pretrained(steps))
    for name, parameter in pretrained(steps).named_parameters() if nudge else ():
        to = torch.full_like(parameter.data, NUDGES[nudge])
        base.get_parameter(name).data = torch.nextafter(parameter.data, to)
    with TemporaryDirectory() as folder:
        config = method_config(method, SIZE, folder, _SETTINGS.get(method, {}))
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config).train()
    more: dict[str, Any] = {}
    if method in ("POLY", "MULTITASK_PROMPT_TUNING"):
        more["task_ids"] = torch.arange(SIZE.batch) % 3
    if method == "CPT":
        more["input_type_mask"] = torch.full((SIZE.batch, SIZE.length), 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    torch.manual_seed(1)  # for dropout
    losses = []
    for step in range(steps):
        losses.append(_step(model, optimizer, sequences(1000 + step, [5, 7]), more))
        if method == "ADALORA":
            model.base_model.update_and_allocate(step)
    return Prepared({}, {"losses": torch.tensor(losses, dtype=torch.float64)})


# ---- in the process that compares them


def apart(one: list[float], other: list[float], steps: int) -> float:
    """The largest difference of two runs in their first steps."""
    return max(abs(a - b) for a, b in zip(one[:steps], other[:steps], strict=True))


def row(method: str, runs: dict[str, Any]) -> tuple[str, bool]:
    """A line of the table, and whether it is as it should be."""
    name = f"[{method}](methods/{method.lower()}.md)"
    failed = [f"no: {run} raises {losses}" for run, losses in runs.items() if isinstance(losses, str)]
    if failed:
        return f"| {name} | | | | | | | | {'; '.join(failed)} |", False
    ours, reference = runs["ours"], runs["reference"]
    nudged = [runs[nudge] for nudge in NUDGES if nudge in runs]
    cells, within = [], True
    for steps in (FIRST, len(ours)):
        found = apart(ours, reference, steps)
        own = max((apart(reference, losses, steps) for losses in nudged), default=0.0)
        within &= found <= max(SPREAD * own, SAME)
        cells += [f"{found:.1e}", f"{own:.1e}" if nudged else ""]
    verdict = "no" if not within else "within noise" if nudged else "yes"
    ends = [f"{sum(losses[-LAST:]) / len(losses[-LAST:]):.4f}" for losses in (ours, reference)]
    return f"| {name} | {ours[0]:.4f} | {' | '.join([*ends, *cells])} | {verdict} |", within


def train_with_both(method: str, workers: dict[str, Any]) -> dict[str, Any]:
    """The losses of a method with each library, or what was raised."""
    import run

    runs: dict[str, Any] = {}

    def ask(library: str, case: str, key: str) -> None:
        try:
            runs[key] = workers[library].ask("prepare", group="parity", case=case)["outcome"]["losses"]
        except run.Failed as error:
            runs[key] = str(error)

    ask("ours", method, "ours")
    ask("reference", method, "reference")
    whole = all(isinstance(losses, list) for losses in runs.values())
    for nudge in NUDGES if whole and apart(runs["ours"], runs["reference"], STEPS) > SAME else ():
        ask("reference", f"{method} {nudge}", nudge)
    return runs


def main(arguments: list[str] | None = None) -> int:
    """1 if some loss is another than the reference's by more than noise."""
    import run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", help="these methods, measured anew")
    parser.add_argument("--smoke", dest="scale", action="store_const", const="smoke", default="full")
    parser.add_argument("--reference-python", metavar="PATH", help="an interpreter that has the reference")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "parity.json", help="what has been measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md", help="page to write")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    options = parser.parse_args(arguments)
    common = [options.scale, "0", "1"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may lead to ours
    python = options.reference_python or run.reference_python()
    workers = {
        "ours": run.Worker(sys.executable, common, options.verbose),
        "reference": run.Worker(python, common, options.verbose, clean),
    }
    kept = json.loads(options.kept.read_text(encoding="utf-8")) if options.kept.exists() else {}
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    names = sorted(method.value for method in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    try:
        for name in names:
            if re.search(options.only, name) if options.only else name not in kept:
                print(f"{name} ...", file=sys.stderr, flush=True)
                kept[name] = train_with_both(name, workers)
                options.kept.write_text(json.dumps(kept), encoding="utf-8")
        rows = {name: row(name, kept[name]) for name in names if name in kept}
        versions = {library: worker.ask("about")["versions"] for library, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    others = ", ".join(f"{name} {version}" for name, version in versions["ours"].items() if name != "peft")
    page = PAGE.format(
        steps=STEPS, rate=RATE, first=FIRST, last=LAST, same=SAME, spread=SPREAD, date=datetime.date.today(),
        versions=f"peft {versions['ours']['peft']}, huggingface/peft {versions['reference']['peft']}, {others}",
        machine=run.machine(), rows="\n".join(text for text, _ in rows.values()),
    )  # fmt: skip
    options.out.write_text(page, encoding="utf-8")
    print(page)
    return int(not all(good for _, good in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
