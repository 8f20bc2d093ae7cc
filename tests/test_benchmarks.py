"""The benchmarks still run: tiny, once, without the reference. Of their numbers none is asserted but losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft

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


def test_training_is_compared_step_by_step(tmp_path):
    asked = ["--smoke", "--only", "^(IA3|LORA)$", "--reference-python", sys.executable]
    places = ["--kept", str(tmp_path / "kept.json"), "--out", str(tmp_path / "page.md")]
    done = run("parity.py", *asked, *places)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = measured((tmp_path / "page.md").read_text(encoding="utf-8"))
    assert [row[0] for row in rows[1:]] == ["[IA3](methods/ia3.md)", "[LORA](methods/lora.md)"]
    assert [row[-1] for row in rows[1:]] == ["yes", "yes"]
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    kept["IA3"]["reference"][1] += 0.01
    (tmp_path / "kept.json").write_text(json.dumps(kept), encoding="utf-8")
    again = run("parity.py", "--smoke", "--only", "nothing", "--reference-python", sys.executable, *places)
    rows = measured((tmp_path / "page.md").read_text(encoding="utf-8"))
    assert again.returncode == 1 and [row[-1] for row in rows[1:]] == ["no", "yes"]


def test_every_method_trains_as_the_reference_does():
    rows = measured((FOLDER.parent / "docs" / "parity.md").read_text(encoding="utf-8"))[1:]
    names = {f"[{method.value}](methods/{method.value.lower()}.md)" for method in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {row[0] for row in rows} == names
    assert {row[-1] for row in rows} == {"yes", "within noise"}


def measured(text: str) -> list[list[str]]:
    """The rows of a page's tables, without the headers."""
    lines = [line.strip("|") for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if row[0] and row[0] != "---"]


def test_the_atlas_goes_on_where_it_was(tmp_path):
    (tmp_path / "choosing.md").write_text("<!-- written by `python benchmarks/atlas.py --page` -->\n<!-- end -->\n.")
    asked = ["--smoke", "--methods", "LORA", "IA3", "--data", str(tmp_path / "data")]
    asked += ["--out", str(tmp_path / "atlas.md")]
    done = run("atlas.py", *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "atlas.md").read_text(encoding="utf-8")
    assert {"LORA", "IA3"} <= {row["method"] for row in lines(tmp_path, "planted")}
    assert not any("failed" in row for part in ("planted", "real", "claims") for row in lines(tmp_path, part))
    for picture in ("planted", "real"):
        assert f"(atlas/{picture}.png)" in page and (tmp_path / f"atlas/{picture}.png").stat().st_size
    assert page.count("| [LoRA]") == 2 and "confirmed" in page
    choosing = (tmp_path / "choosing.md").read_text(encoding="utf-8")
    assert "[LoRA](methods/lora.md)" in choosing and choosing.endswith("end -->\n.")
    real = tmp_path / "data/atlas_real.jsonl"
    written = real.read_text(encoding="utf-8").splitlines(keepends=True)
    real.write_text("".join(written[:-1]), encoding="utf-8")
    again = run("atlas.py", "real", *asked)
    assert again.returncode == 0 and len(again.stdout.splitlines()) == 1
    assert len(lines(tmp_path, "real")) == len(written) == 7  # three rates of two methods, and the base model


def lines(folder: Path, part: str) -> list[dict]:
    text = (folder / f"data/atlas_{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
