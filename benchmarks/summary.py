"""The five figures that the README begins with, and their picture, from docs/benchmarks.md.

python benchmarks/summary.py    # draws docs/benchmarks/summary.png, writes the tables of the READMEs
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: row of docs/benchmarks.md -> its name in the picture; in the order of the READMEs' tables
ROWS = {
    "`from peft import LoraConfig, PeftModel, get_peft_model` / `import torch`": "import of LoraConfig, get_peft_model",
    "step, fp32, dropout 0.1": "a training step, LoRA with dropout",
    "bytes kept, fp32, dropout 0.1": "memory kept for backward, LoRA with dropout",
    "token, fp32, 32 different / one": "a token for 32 users with an adapter each",
    "from_pretrained / load_file and copy": "loading an adapter of 200 MB",
}
TABLE = re.compile(r"(?<=\|---\|---:\|---:\|\n)(\|.*\n)+")


def measured() -> dict[str, tuple[str, str, float]]:
    """Row -> what was measured of the reference, of this library, and the second divided by the first."""
    found = {}
    for line in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in ROWS:
            found[cells[0]] = (cells[2], cells[3], float(cells[7]))
    return found


def with_figures(text: str) -> str:
    """A README with the figures of today in its first table of that form; the names of the rows stay."""
    figures = measured()

    def rows(table: re.Match[str]) -> str:
        names = [line.split("|")[1].strip() for line in table[0].splitlines()]
        pairs = [(name, *figures[row][:2]) for name, row in zip(names, ROWS, strict=True)]
        return "".join(f"| {name} | {theirs} | {ours} |\n" for name, theirs, ours in pairs)

    return TABLE.sub(rows, text, count=1)


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figures = measured()
    shares = [100 * figures[row][2] for row in ROWS]
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(ROWS.values()), [100] * len(ROWS), color="#d9d9d9", label="huggingface/peft 0.21.2")
    axes.barh(list(ROWS.values()), shares, color="#2a7de1", height=0.5, label="here")
    for place, row in enumerate(ROWS):
        axes.text(shares[place] + 1, place, f"{figures[row][1]} instead of {figures[row][0]}", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("% of the reference; less is better")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(ROOT / "docs/benchmarks/summary.png")
    for page in (ROOT / "README.md", ROOT / "README.zh.md"):
        page.write_text(with_figures(page.read_text(encoding="utf-8")), encoding="utf-8")
