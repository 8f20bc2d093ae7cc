"""`peft tune`: the learning rate, and the rank, by short runs on the user's data, one candidate after the other."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.cli import models
from peft.cli.options import Tune
from peft.cli.parse import OptionError, method_named
from peft.cli.plan import learning_rate, prepare
from peft.cli.plots import drawn, figure
from peft.cli.train import console, fit

#: steps of a candidate
STEPS = 60


def run(options: Tune, fields: Mapping[str, Any], trainer: Mapping[str, Any]) -> int:
    out = console()
    options = replace(options, max_steps=options.max_steps or STEPS)
    plan = prepare(options, fields, trainer, out)
    if min(options.ranks, default=1) < 1:
        raise OptionError(f"--ranks have to be 1 or more, got {min(options.ranks)}")
    if plan.held_out is None:
        raise OptionError("--eval-split: candidates are compared on what is held out, and nothing is")
    middle = learning_rate(method_named(options.method), models.config_of(plan.base))
    rates = options.lrs or [middle * 3.0**power for power in (-2, -1, 0, 1, 2)]
    ranks: list[int | None] = [*options.ranks] or [None]
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        for rate in rates:
            more = {**fields, "r": rank} if rank else fields
            row = {"lr": rate, "rank": rank, "loss": _tried(replace(options, lr=rate), more, trainer)}
            rows.append(row)
            out.print(f"learning rate {rate:.2g}{f', rank {rank}' if rank else ''}: held out {row['loss']:.4f}")
    best = min(rows, key=lambda row: row["loss"])
    if not math.isfinite(best["loss"]):
        raise RuntimeError("the loss was no number with any candidate: lower --lrs may help")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "tune.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    _draw(rows, ranks, output / "tune.png")
    words = f"--lr {best['lr']:.2g}" + (f" --r {best['rank']}" if best["rank"] else "")
    edge = best["lr"] in (min(rates), max(rates)) and len(rates) > 1
    out.print(f"Best: {words}" + ("; it is the last of the candidates: try --lrs beyond it too" if edge else ""))
    return 0


def _tried(options: Tune, fields: Mapping[str, Any], trainer: Mapping[str, Any]) -> float:
    """The lowest loss on what is held out; infinite where the loss was no number."""
    from rich.console import Console

    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare(replace(options, output=folder), fields, trainer, quiet)
        try:
            log = fit(plan, quiet).log
        except RuntimeError as error:
            if "the loss is" not in str(error):
                raise
            return math.inf
    return min(entry["eval_loss"] for entry in log if "eval_loss" in entry and math.isfinite(entry["eval_loss"]))


def _draw(rows: list[dict[str, Any]], ranks: Sequence[int | None], path: Path) -> None:
    if not drawn():
        return
    made, (axis,) = figure(6, 4)
    for rank in ranks:
        points = [(row["lr"], row["loss"]) for row in rows if row["rank"] == rank and math.isfinite(row["loss"])]
        axis.plot(*zip(*points, strict=True), "o-", label=f"rank {rank}" if rank else None)
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss on what is held out", title="Short runs")
    if len(ranks) > 1:
        axis.legend(frameon=False)
    made.savefig(path, dpi=140)
