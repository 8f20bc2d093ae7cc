"""The pictures: a loss curve, and the norms of an adapter. Written with matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INK, FAINT, ACCENT = "#1f3a5f", "#b9c7d8", "#d1495b"


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **kwargs)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def loss_curve(log: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """The loss over the steps: of training, its running mean, and of evaluation.

    Args:
        log: entries with `step`, and `loss` or `eval_loss` or both.
        title: above the picture.
        path: where the PNG goes.
    """
    train = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    figure, (axis,) = _figure(7, 4)
    if train:
        steps, losses = zip(*train, strict=True)
        axis.plot(steps, losses, color=FAINT, linewidth=1, label="training")
        keep = 1 - 1 / max(1.0, len(losses) / 20)
        mean, smooth = losses[0], []
        for loss in losses:
            mean = keep * mean + (1 - keep) * loss
            smooth.append(mean)
        axis.plot(steps, smooth, color=INK, linewidth=2, label="training, running mean")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color=ACCENT, markersize=5, linewidth=1.5, label="held out")
        for step, loss in (held_out[0], held_out[-1]):
            axis.annotate(
                f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center", color=ACCENT
            )
    axis.set(title=title, xlabel="optimizer step", ylabel="loss per token (nats)")
    axis.margins(y=0.12)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=140)


def norms(rows: Sequence[tuple[str, int | None, float]], title: str, label: str, path: str | Path) -> None:
    """Norms by layer: a line for each kind of module, and bars for modules outside the layers.

    Args:
        rows: (kind of module, index of its layer or None, norm).
        title: above the picture.
        label: what the norm is of.
        path: where the PNG goes.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    bars: list[tuple[str, float]] = []
    for kind, layer, norm in rows:
        if layer is None:
            bars.append((kind, norm))
        else:
            lines.setdefault(kind, []).append((layer, norm))
    shares = [width for width, there in ((3.0, lines), (1.5, bars)) if there]
    figure, axes = _figure(5 + 2 * len(shares), max(4.0, 0.25 * len(bars)), len(shares), width_ratios=shares)
    if lines:
        for (kind, points), marker in zip(lines.items(), "osD^vP*X<>hd" * math.ceil(len(lines) / 12), strict=False):
            axes[0].plot(*zip(*sorted(points), strict=True), marker=marker, markersize=5, linewidth=1.5, label=kind)
        axes[0].set(xlabel="layer", ylabel=label, ylim=(0, 1.08 * max(row[2] for row in rows) or 1))
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    if bars:
        names, values = zip(*bars, strict=True)
        axes[-1].barh(names, values, color=INK, height=0.5)
        axes[-1].invert_yaxis()
        axes[-1].set(xlabel="norm" if lines else label)
    figure.suptitle(title)
    figure.savefig(path, dpi=140)
