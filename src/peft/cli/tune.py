"""`peft tune`: the learning rate, and the rank, by short runs on the user's data, one candidate after the other."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas
from transformers import TrainerCallback

from peft.cli import models
from peft.cli.options import refuse
from peft.cli.parse import init_types, method_named
from peft.cli.plan import Plan, learning_rate, prepare
from peft.cli.plots import figure
from peft.cli.train import build
from peft.cli.watch import NoNumber, console
from peft.registry import METHODS

#: steps of a candidate
STEPS = 60


def run(options: Any, fields: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    out = console()
    options = replace(options, max_steps=options.max_steps or STEPS)
    refuse(any(rate <= 0 for rate in options.lrs), f"--lrs must be positive, got {options.lrs}")
    kind = METHODS[method_named(options.method)].config_class
    idle = "r" not in (own := init_types(kind)) or "target_r" in own  # which AdaLoRA has in its place
    words = f"--ranks sets the field r, and {options.method} has none that counts ({kind.__name__})"
    refuse(options.ranks and idle, words)
    plan = prepare(options, fields, trainer, out)
    refuse(plan.arguments.push_to_hub, "--push-to-hub: candidates are not kept; what they tell is for `peft train`")
    words = "--eval-split: candidates are compared on what is held out, and nothing is"
    refuse(plan.held_out is None, words)
    middle = learning_rate(method_named(options.method), models.config_of(plan.base))
    rates = options.lrs or [middle * 3.0**power for power in (0, -1, 1, -2, 2)]  # the likeliest first
    rows: list[dict[str, Any]] = []
    best: list[float] = []
    configs = {rank: replace(plan.config, r=rank) for rank in options.ranks} or {None: plan.config}
    for (rank, config), rate in product(configs.items(), rates):
        losses, steps = _tried(plan, rate, copy(config), best)
        rows.append({"lr": rate, "rank": rank, "loss": min(losses), "steps": steps})
        best = min(best or losses, losses, key=min)
        words = f", rank {rank}" if rank else ""
        early = f" (behind, and stopped at step {steps})" if steps < options.max_steps else ""
        out.print(f"learning rate {rate:.2g}{words}: held out {min(losses):.4f}{early}")
    first = min(rows, key=lambda row: row["loss"])
    if not math.isfinite(first["loss"]):
        raise RuntimeError("the loss was no number with any candidate: lower --lrs may help")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "tune.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    _draw(rows, output / "tune.png")
    words = f"--lr {first['lr']:.2g}" + (f" --r {first['rank']}" if first["rank"] else "")
    edge = first["lr"] in (min(rates), max(rates)) and len(rates) > 1
    out.print(f"Best: {words}" + ("; it is the last of the candidates: try --lrs beyond it too" if edge else ""))


class _Behind(TrainerCallback):
    """Ends a run that has gained less than half of what the best one before it had gained at the same step.

    Args:
        best: that one's losses on what is held out, from before its first step on; empty if there is none.
    """

    def __init__(self, best: list[float]):
        self.best, self.losses = best, list[float]()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.losses.append(loss if math.isfinite(loss := metrics["eval_loss"]) else math.inf)
        if 1 < len(self.losses) <= len(self.best):
            start, best = self.best[0], self.best[len(self.losses) - 1]
            control.should_training_stop |= self.losses[-1] > (start + best) / 2


def _tried(plan: Plan, rate: float, config: Any, best: list[float]) -> tuple[list[float], int]:
    """The losses on what is held out, infinite where it was no number, and after how many steps the run ended."""
    plan = replace(plan, config=config, arguments=copy(plan.arguments))
    plan.arguments.learning_rate = rate
    behind = _Behind(best)
    with tempfile.TemporaryDirectory() as plan.arguments.output_dir:
        trainer = build(plan, console(quiet=True))
        trainer.add_callback(behind)
        with suppress(NoNumber):
            trainer.train()
            return behind.losses, trainer.state.global_step
    return [math.inf], trainer.state.global_step


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    made, axes = figure(6, 4)
    for axis in axes:
        for rank, points in pandas.DataFrame(rows).sort_values("lr").groupby("rank", dropna=False, sort=False):
            axis.plot("lr", "loss", "o-", data=points, label=f"rank {rank}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss on what is held out", title="Short runs")
        axis.legend(frameon=False)
        made.savefig(path, dpi=140)
