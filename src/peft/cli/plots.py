"""The pictures: a loss curve, the norms of an adapter, a sweep. Written with matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INK, FAINT, ACCENT = "#1f3a5f", "#b9c7d8", "#d1495b"


def figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    """(a figure, its axes), without a frame and with a faint grid."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False, **kwargs)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return made, axes


def drawn() -> bool:
    """Whether there is matplotlib to draw with."""
    return find_spec("matplotlib") is not None


def loss_curve(log: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> bool:
    """The loss over the steps: of training, its running mean, and of evaluation. False where there is no matplotlib.

    Args:
        log: entries with `step`, and `loss` or `eval_loss`; of further `eval_` metrics those from 0 to 1 are drawn.
        title: above the picture.
        path: where the PNG goes.
    """
    if not drawn():
        return False
    train = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    metrics = {name for entry in log for name in entry if name in ("eval_accuracy", "eval_f1", "eval_r2")}
    made, axes = figure(7 + 3 * bool(metrics), 4, 1 + bool(metrics))
    axis = axes[0]
    if train:
        steps, losses = zip(*train, strict=True)
        axis.plot(steps, losses, color=FAINT, linewidth=1, label="training")
        keep, mean, smooth = 1 - 1 / max(1.0, len(losses) / 20), losses[0], []
        for loss in losses:
            mean = keep * mean + (1 - keep) * loss
            smooth.append(mean)
        axis.plot(steps, smooth, color=INK, linewidth=2, label="training, running mean")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color=ACCENT, markersize=5, linewidth=1.5, label="held out")
        for step, loss in (held_out[0], held_out[-1]):
            place = dict(textcoords="offset points", xytext=(0, 8), ha="center", color=ACCENT)
            axis.annotate(f"{loss:.2f}", (step, loss), **place)
    axis.set(title=title, xlabel="optimizer step", ylabel="loss")
    axis.margins(y=0.12)
    for name in sorted(metrics):
        rows = [(entry["step"], entry[name]) for entry in log if name in entry]
        axes[1].plot(*zip(*rows, strict=True), "o-", markersize=4, label=name.removeprefix("eval_"))
    for axis in axes:
        axis.legend(frameon=False)
    made.savefig(path, dpi=140)
    return True


def layers(modules: Sequence[Mapping[str, Any]], key: str, title: str, label: str, path: str | Path) -> bool:
    """Norms by layer (a line for each kind of module, bars for modules outside the layers) and the spectra of LoRA.

    Args:
        modules: as `inspect.examine` gives them.
        key: which of their norms is drawn; those without one are left out.
        title: above the picture.
        label: what the norm is of.
        path: where the PNG goes.

    Returns:
        False where there is no matplotlib.
    """
    if not drawn():
        return False
    lines: dict[str, list[Mapping[str, Any]]] = {}
    rows = [module for module in modules if module[key] is not None]
    bars = [module for module in rows if module["layer"] is None]
    for module in rows:
        if module["layer"] is not None:
            lines.setdefault(module["kind"], []).append(module)
    spectra = [module for module in modules if module["singular_values"]]
    shares = [width for width, there in ((3.0, lines), (1.5, bars), (3.0, spectra)) if there]
    made, axes = figure(5 + 2 * len(shares), max(4.0, 0.25 * len(bars)), len(shares), width_ratios=shares)
    colours = {kind: f"C{number % 10}" for number, kind in enumerate(lines)}
    for (kind, points), marker in zip(lines.items(), "osD^vP*X<>hd" * math.ceil(len(lines) / 12), strict=False):
        points.sort(key=lambda module: module["layer"])
        places = [module["layer"] for module in points]
        axes[0].plot(places, [module[key] for module in points], f"{marker}-", markersize=5, label=kind)
        axes[0].set(xlabel="layer", ylabel=label, ylim=(0, 1.08 * max(module[key] for module in rows) or 1))
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    if bars:
        axis = axes[bool(lines)]
        axis.barh([module["kind"] for module in bars], [module[key] for module in bars], color=INK, height=0.5)
        axis.invert_yaxis()
        axis.set(xlabel="norm" if lines else label)
    for module in spectra:
        values = [value / module["singular_values"][0] for value in module["singular_values"]]
        axes[-1].semilogy(range(1, len(values) + 1), values, color=colours.get(module["kind"], INK), alpha=0.5)
        axes[-1].set(xlabel="rank", ylabel="singular value by the largest", ylim=(1e-4, 1.5))
    made.suptitle(title)
    made.savefig(path, dpi=140)
    return True
