"""What papers say of LoRA's variants, tried on something small: a network for digits that learns to read them turned.

A network of three layers is trained on scikit-learn's digits; then adapters learn from 200 images that are turned
by a quarter. Each variant has its best learning rate; each seed its own network, images and adapters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from atlas_rows import Row, add, interval
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import peft
from peft.optimizers import create_loraplus_optimizer

WIDTH = 256
#: settings of LoraConfig, and the ratio of LoRA+ apart
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"LoRA r={r}": {"r": r} for r in (2, 8, 256)},
    **{f"rsLoRA r={r}": {"r": r, "use_rslora": True} for r in (2, 8, 256)},
    "PiSSA r=8": {"r": 8, "init_lora_weights": "pissa"},
    "LoRA+ r=8": {"r": 8, "ratio": 16.0},
    "DoRA r=2": {"r": 2, "use_dora": True},
    "DoRA r=8": {"r": 8, "use_dora": True},
}
LOSS, EARLY, WRONG = "held-out loss", "training loss after a tenth of the steps", "wrong answers in %"


@dataclass(frozen=True)
class Budget:
    steps: int = 200
    seeds: int = 10
    rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1.2e-2, 3e-2, 7e-2)


@dataclass(frozen=True)
class Claim:
    """That `better` has less of `measure` than `worse`; each at its best learning rate, or at that of `tuned`.

    With `within`, that `worse` has at most so much more, so that there is no need for `better`.
    """

    source: str
    words: str
    better: str
    worse: str
    measure: str
    tuned: tuple[str, str] | None = None
    within: float | None = None


RS, PLUS = "[2312.03732](https://arxiv.org/abs/2312.03732)", "[2402.12354](https://arxiv.org/abs/2402.12354)"
PISSA, DORA = "[2404.02948](https://arxiv.org/abs/2404.02948)", "[2402.09353](https://arxiv.org/abs/2402.09353)"
TUNED = "[2602.04998](https://arxiv.org/abs/2602.04998)"
CLAIMS = (
    Claim(RS, "rsLoRA: at rank 256, with the learning rate that is best at rank 8, it ends lower than LoRA",
          "rsLoRA r=256", "LoRA r=256", LOSS, ("rsLoRA r=8", "LoRA r=8")),
    Claim(RS, "rsLoRA: at rank 256 it ends lower than LoRA, each with its best learning rate",
          "rsLoRA r=256", "LoRA r=256", LOSS),
    Claim(RS, "rsLoRA: a rank of 256 ends lower than one of 2", "rsLoRA r=256", "rsLoRA r=2", LOSS),
    Claim(RS, "LoRA without it gains nothing from that rank (0.02 at most) with the best learning rate of rank 2",
          "LoRA r=256", "LoRA r=2", LOSS, ("LoRA r=2", "LoRA r=2"), within=0.02),
    Claim(PISSA, "PiSSA starts faster than LoRA", "PiSSA r=8", "LoRA r=8", EARLY),
    Claim(PISSA, "PiSSA ends lower than LoRA", "PiSSA r=8", "LoRA r=8", LOSS),
    Claim(PLUS, "LoRA+: a rate for B 16 times that for A starts faster", "LoRA+ r=8", "LoRA r=8", EARLY),
    Claim(PLUS, "LoRA+: and ends lower", "LoRA+ r=8", "LoRA r=8", LOSS),
    Claim(DORA, "DoRA ends lower than LoRA at a small rank", "DoRA r=2", "LoRA r=2", LOSS),
    *(Claim(TUNED, f"With its learning rate tuned, LoRA is within 2 points of {name.split()[0]}",
            name, "LoRA r=8", WRONG, within=2.0) for name in ("rsLoRA r=8", "PiSSA r=8", "LoRA+ r=8", "DoRA r=8")),
)  # fmt: skip


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, answers = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(answers)


@lru_cache
def _task(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The pretrained network; what adapters learn from, and what they are tested on."""
    images, answers = _digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    first, training, held_out = order[:700], order[700:900], order[900:]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(60):
        cross_entropy(net(images[first].flatten(1)), answers[first]).backward()
        optimizer.step()
        optimizer.zero_grad()
    turned = images.rot90(dims=(1, 2)).flatten(1)
    return net, [(turned[part], answers[part]) for part in (training, held_out)]


def trained(variant: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """What one run comes to."""
    settings = dict(VARIANTS[variant])
    ratio = settings.pop("ratio", 1.0)
    net, ((images, answers), (other_images, other_answers)) = _task(seed)
    torch.manual_seed(seed)
    config = peft.LoraConfig(lora_alpha=16, target_modules=["0", "2", "4"], **settings)
    model = peft.get_peft_model(copy.deepcopy(net), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.Adam, lr=rate, loraplus_lr_ratio=ratio)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found: dict[str, float] = {}
    for step in range(steps):
        loss = cross_entropy(model(images), answers)
        if step == steps // 10:
            found[EARLY] = loss.item()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model(other_images)
    found[LOSS] = cross_entropy(logits, other_answers).item()
    found[WRONG] = 100 * (logits.argmax(1) != other_answers).float().mean().item()
    return {name: round(value, 5) for name, value in found.items()}


def run(path: Path, budget: Budget) -> None:
    for variant, rate in itertools.product(VARIANTS, budget.rates):
        key = {"variant": variant, "rate": rate, "budget": list(astuple(budget)[:2])}
        add(path, key, partial(seeds, variant, rate, budget))


def seeds(variant: str, rate: float, budget: Budget) -> Row:
    return {"seeds": [trained(variant, rate, seed, budget.steps) for seed in range(budget.seeds)]}


def checked(rows: Sequence[Row], claim: Claim) -> tuple[list[float], list[float], str]:
    """What the two sides come to, by seed, and a verdict."""

    def values(variant: str, rate: float) -> list[float]:
        row = next(row for row in rows if (row["variant"], row["rate"]) == (variant, rate))
        return [seed[claim.measure] for seed in row["seeds"]]

    def best(variant: str) -> float:
        rates = [row["rate"] for row in rows if row["variant"] == variant]
        return min(rates, key=lambda rate: mean(values(variant, rate)))

    tuned = claim.tuned or (claim.better, claim.worse)
    better, worse = values(claim.better, best(tuned[0])), values(claim.worse, best(tuned[1]))
    middle, half = interval([w - b for b, w in zip(better, worse, strict=True)])
    least, most = middle - half, middle + half
    if claim.within is None:
        verdict = "confirmed here" if least > 0 else "the opposite here" if most < 0 else "not seen here"
    else:
        verdict = "confirmed" if most <= claim.within else "the opposite" if least > claim.within else "not confirmed"
        verdict += " here"
    return better, worse, f"{verdict}: {middle:+.2g} ± {half:.2g}"
