"""Tables and pictures of what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


@dataclass
class Line:
    """A row with what each library measured: the values of its part and of what it is divided by, run by run.

    `same` says whether both computed the same: "yes", "no (by how much)", or "" where nothing was compared.
    """

    name: str
    unit: str
    target: float | None
    over: bool
    ours: list[tuple[float, float]]
    reference: list[tuple[float, float]]
    same: str = ""
    failed: str = ""

    def ratios(self, library: str) -> list[float]:
        """Quotients run by run; what takes no time at all counts as equal."""
        pairs: list[tuple[float, float]] = getattr(self, library)
        if self.over:
            return [value / base if base else 1.0 for value, base in pairs]
        if library == "ours" and self.reference:
            return [o / r if r else 1.0 for (o, _), (r, _) in zip(pairs, self.reference, strict=True)]
        return []

    def value(self, library: str) -> float | None:
        pairs: list[tuple[float, float]] = getattr(self, library)
        return median(value for value, _ in pairs) if pairs else None

    @property
    def base(self) -> float | None:
        """What ours is divided by."""
        return median(base for _, base in self.ours) if self.over and self.ours else None

    @property
    def against_reference(self) -> float | None:
        """Ours divided by the reference's: of the quotients where there is a floor, since that is what drifts least."""
        ours, reference = self.ratios("ours"), self.ratios("reference")
        if self.over:
            return median(ours) / median(reference) if ours and reference else None
        return median(ours) if ours else None

    @property
    def aim(self) -> str:
        """The target, and whether it was reached."""
        if self.target is None:
            return ""
        ratios = self.ratios("ours")
        verdict = "" if not ratios else " (reached)" if median(ratios) <= self.target else " (missed)"
        return f"{self.target:.3g}{verdict}"


def write(path: Path, groups: list[dict[str, Any]], heading: str, conditions: dict[str, str]) -> None:
    """Writes a part of the page at `path` and a picture per group beside it, in a folder of the page's name.

    A part begins with `# heading`, a group in it with `## title`; the other parts and groups of a page that is there
    stay.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts = _sections(path.read_text(encoding="utf-8") if path.exists() else "", "# ")
    sections = _sections(parts.get(f"# {heading}", ""), "## ")
    sections.pop(f"# {heading}", None)
    for group in groups:
        lines = group["lines"]
        text = [f"## {group['title']}", "", group["text"].strip(), "", table(lines), "", summary(lines), ""]
        picture = folder / f"{group['name']}.png"
        if draw(group["title"], group["lines"], picture):
            text += [f"![{group['title']}: ratios]({folder.name}/{picture.name})", ""]
        sections[text[0]] = "\n".join(text)
    top = [f"# {heading}", "", *(f"- {name}: {value}" for name, value in conditions.items()), ""]
    parts[top[0]] = "\n".join(["\n".join(top), *(section.rstrip("\n") + "\n" for section in sections.values())])
    path.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts.values()), encoding="utf-8")


def _sections(text: str, mark: str) -> dict[str, str]:
    """The pieces of a page that begin with a line that `mark` begins, by that line."""
    pieces = re.split(f"^(?={mark})", text, flags=re.MULTILINE)
    return {piece.split("\n", 1)[0]: piece for piece in pieces if piece.strip()}


def table(lines: list[Line]) -> str:
    header = ["", "divisor", "reference", "ours", "reference / divisor", "ours / divisor", "target", "ours / reference"]
    rows = [[*header, "same result"], ["---", *["---:"] * 7, "---"]]
    for line in lines:
        if line.failed and not line.ours:
            rows.append([line.name, *[""] * 7, line.failed])
            continue
        rows.append([
            line.name, _amount(line.base, line.unit), _amount(line.value("reference"), line.unit),
            _amount(line.value("ours"), line.unit), _spread(line.ratios("reference")),
            _spread(line.ratios("ours")) if line.over else "", line.aim, _ratio(line.against_reference),
            "; ".join(filter(None, (line.same, line.failed))),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(lines: list[Line]) -> str:
    """What the table says of all rows of a unit together, in a sentence for each."""
    said = []
    for unit, what in (("s", "times"), ("B", "bytes")):
        rows = [line for line in lines if line.unit == unit and line.over and line.ours]
        against = {line.name: line.against_reference for line in rows if line.reference}
        if len(rows) > 1:
            middle = median(median(line.ratios("ours")) for line in rows)
            behind = [f"{name} ({_ratio(ratio)})" for name, ratio in against.items() if ratio and ratio > 1.05]
            said.append(
                f"{what.capitalize()}: the median of all rows is {_ratio(middle)} of the divisor; more than 5 % above"
                f" the reference: {', '.join(behind) or 'none'}."
            )
    return " ".join(said)


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
    if unit == "B":
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    return f"{value:.3g} {unit}".strip()


def _spread(ratios: list[float]) -> str:
    """The median, and the middle half of the runs where there are enough of them."""
    if not ratios:
        return ""
    if len(ratios) < 4 or max(ratios) == min(ratios):
        return _ratio(median(ratios))
    low, _, high = quantiles(ratios, n=4)
    return f"{_ratio(median(ratios))} ({_ratio(low)} to {_ratio(high)})"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}"


def draw(title: str, lines: list[Line], path: Path) -> bool:
    """A picture of the ratios: to the floor, or to the reference where there is none. False if there is nothing."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.ratios("ours")]
    if not shown:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(shown)), layout="constrained")
    for index, line in enumerate(shown):
        bars = [("ours", 0.19, "tab:blue", median(line.ratios("ours")))]
        if line.reference:
            reference = median(line.ratios("reference")) if line.over else 1.0
            bars.append(("reference", -0.19, "tab:gray", reference))
        for label, shift, color, value in bars:
            axes.barh(index + shift, value, 0.36, color=color, label=label)
            axes.text(value, index + shift, f" {_ratio(value)}", va="center", size=7)
        if line.target is not None:
            axes.plot([line.target] * 2, [index - 0.4, index + 0.4], color="tab:red", label="target")
    names = [line.name.replace("`", "") if line.over else f"{line.name.replace('`', '')} / reference" for line in shown]
    axes.set_yticks(range(len(shown)), names, size=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.6)
    values = [value for line in shown for value in (*line.ratios("ours"), *line.ratios("reference"))]
    if max(values) > 8 * min(values):
        axes.set_xscale("log")
    axes.margins(x=0.12)
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(found.values(), found.keys(), fontsize=8)
    axes.set_title(f"{title} (ratio, less is better)", size=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
