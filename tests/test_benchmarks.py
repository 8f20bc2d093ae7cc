"""The benchmarks still run: tiny, once, without the reference. No number of theirs is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SOME = "step: fp32$|decode: decode fp32|startup: (experts|files|merge)|methods: (LORA|IA3|PROMPT_TUNING)$"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_group_is_measured_and_written(tmp_path):
    page = tmp_path / "page.md"
    done = run("run.py", "--smoke", "--no-reference", "--verbose", "--only", SOME, "--out", str(page))
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text(encoding="utf-8")
    for group in ("step", "decode", "startup", "methods"):
        assert f"(page/{group}.png)" in text and (tmp_path / "page" / f"{group}.png").stat().st_size
    rows = measured(text)
    assert rows and all(row[3] and not row[2] for row in rows)


def measured(text: str) -> list[list[str]]:
    """The rows of a page's tables, without the headers."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if row[0] and row[0] != "---"]
