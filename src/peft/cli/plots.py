"""The pictures: a loss curve, the norms of an adapter, a sweep. Written with matplotlib, without a display."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas

INK, FAINT, ACCENT = "#1f3a5f", "#b9c7d8", "#d1495b"


def figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    """(a figure, its axes), without a frame; (None, []), and a note, where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed here (pip install matplotlib)", file=sys.stderr)
        return None, []
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False, **kwargs)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return made, axes


def loss_curve(log: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """The loss over the steps: of training, its running mean, and of evaluation.

    Args:
        log: entries with `step`, and `loss` or `eval_loss`; of further `eval_` metrics those from 0 to 1 are drawn.
        title: above the picture.
        path: where the PNG goes.
    """
    found = pandas.DataFrame(log).set_index("step")
    metrics = found[found.columns.intersection(["eval_accuracy", "eval_f1", "eval_r2", "eval_wer"])]
    made, axes = figure(7 + 3 * bool(metrics.size), 4, 1 + bool(metrics.size))
    if not made:
        return
    empty = pandas.Series(dtype=float)
    train, held_out = found.get("loss", empty).dropna(), found.get("eval_loss", empty).dropna()
    axes[0].plot(train, color=FAINT, linewidth=1, label="training")
    mean = train.ewm(alpha=1 / max(1.0, len(train) / 20), adjust=False).mean()
    axes[0].plot(mean, color=INK, linewidth=2, label="training, running mean")
    if len(held_out):
        axes[0].plot(held_out, "o-", color=ACCENT, markersize=5, linewidth=1.5, label="held out")
    axes[0].set(title=title, xlabel="optimizer step", ylabel="loss")
    for name in metrics:
        axes[1].plot(metrics[name].dropna(), "o-", markersize=4, label=name.removeprefix("eval_"))
    for axis in axes:
        axis.legend(frameon=False)
    made.savefig(path, dpi=140)


def layers(modules: Sequence[Mapping[str, Any]], key: str, title: str, label: str, path: str | Path) -> None:
    """Norms by layer (a line for each kind of module, bars for modules outside the layers) and the spectra of LoRA.

    Args:
        modules: as `inspect.examine` gives them.
        key: which of their norms is drawn; those without one are left out.
        title: above the picture.
        label: what the norm is of.
        path: where the PNG goes.
    """
    frame = pandas.DataFrame(modules).dropna(subset=key).astype({key: float})
    lines = frame[frame.layer.notna()].pivot_table(key, "layer", "kind", sort=False).sort_index()
    bars, spectra = frame[frame.layer.isna()].set_index("kind")[key], frame.dropna(subset="singular_values")
    shares = [width for width, there in ((3.0, lines), (1.5, bars), (3.0, spectra)) if len(there)]
    made, axes = figure(5 + 2 * len(shares), max(4.0, 0.25 * len(bars)), len(shares), width_ratios=shares)
    if not made:
        return
    colours = {kind: f"C{number % 10}" for number, kind in enumerate(lines.columns)}
    if len(lines):
        lines.plot(ax=axes[0], style="o-", color=colours, markersize=5, xlabel="layer", ylabel=label, ylim=(0, None))
        axes[0].xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    if len(bars):
        bars[::-1].plot.barh(ax=axes[bool(len(lines))], color=INK, xlabel="norm" if len(lines) else label, ylabel="")
    for kind, found in zip(spectra.kind, spectra.singular_values, strict=True):
        values = pandas.Series(found, range(1, len(found) + 1)) / found[0]
        axes[-1].semilogy(values, color=colours.get(kind, INK), alpha=0.5)
        axes[-1].set(xlabel="rank", ylabel="singular value by the largest", ylim=(1e-4, 1.5))
    made.suptitle(title)
    made.savefig(path, dpi=140)
