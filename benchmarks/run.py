"""Speed and memory of floor, reference and this library, in turn and under the same conditions.

    python benchmarks/run.py                 everything, written to docs/benchmarks.md
    python benchmarks/run.py --only 'step'   the rows of groups and cases that match, printed

Floor means the same work without an adapter library; reference means huggingface/peft, which is installed into an
environment of its own on top of the packages of this one. Each library has one process. A run measures all parts of a
case (the floor among them) in one process and then in the other, which of them first changing from run to run; ratios
are taken within a run, or a round of it, and their median is reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).resolve().parent
REFERENCE = "peft==0.21.2"
GROUPS = ("step", "decode", "lora", "methods", "startup", "memory")


class Failed(Exception):
    """A worker could not do what it was asked."""


class Worker:
    """The process of one library, started when it is first asked something."""

    def __init__(self, python: str, arguments: list[str], verbose: bool, environment: dict[str, str] | None = None):
        self.command, self.verbose = [python, str(HERE / "worker.py"), *arguments], verbose
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **request: Any) -> Any:
        """Sends a request and waits for the answer.

        Raises:
            Failed: it raised, or the process ended.
        """
        if self.process is None:
            errors = None if self.verbose else subprocess.DEVNULL
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=self.environment
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.process = None
            raise Failed(f"the process ended with status {status}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def reference_python() -> str:
    """Makes the environment of the reference, if need be: its own package, and every other one of this environment.

    So both libraries run on the very same files of torch and transformers.
    """
    folder = HERE / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    marker = folder / "reference.txt"
    packages = sysconfig.get_path("purelib")
    content = f"{REFERENCE}\n{packages}\n"
    if not marker.exists() or marker.read_text() != content:
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", REFERENCE], check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(own, "packages.pth").write_text(packages + "\n")
        marker.write_text(content)
    return str(python)


def compare(ours: dict[str, Any], reference: dict[str, Any]) -> str:
    """ "yes", or by how much the outcomes of two preparations differ, relative to the largest entry."""
    if not ours["outcome"]:
        return ""
    worst = 0.0
    for name, values in ours["outcome"].items():
        others = reference["outcome"].get(name)
        if others is None or len(others) != len(values):
            return f"no ({name}: {len(values)} values against {len(others or [])})"
        largest = max(map(abs, others), default=0.0) or 1.0
        gaps = [abs(a - b) / largest for a, b in zip(values, others, strict=True)]
        worst = max([worst, *(gap if gap == gap else float("inf") for gap in gaps)])
    return "yes" if worst <= ours["tolerance"] else f"no (differs by {worst:.1e})"


def measure(
    workers: dict[str, Worker], group: str, case: dict[str, Any], runs: int
) -> tuple[dict[str, list[dict[str, float]]], str, dict[str, str]]:
    """What each library measured run by run, whether both computed the same, and what failed where."""
    prepared: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    measured: dict[str, list[dict[str, float]]] = {library: [] for library in workers}
    for library, worker in workers.items():
        try:
            prepared[library] = worker.ask("prepare", group=group, case=case["name"])
            if case["warm_up"]:
                worker.ask("run", rounds=1)
        except Failed as error:
            failed[library] = str(error)
    for index in range(min(runs, case["runs"] or runs)):
        order = [library for library in workers if library not in failed]
        for library in order if index % 2 == 0 else reversed(order):
            try:
                measured[library] += workers[library].ask("run", rounds=case["rounds"])
            except Failed as error:
                failed[library], measured[library] = str(error), []
    same = compare(prepared["ours"], prepared["reference"]) if len(prepared) == 2 else ""
    return measured, same, failed


def lines_of(case: dict[str, Any], measured: dict[str, Any], same: str, failed: dict[str, str]) -> list[report.Line]:
    """A case's rows with their measurements."""
    lines = []
    for row in case["rows"]:
        pairs = {
            library: [(run[row["part"]], run[row["over"]] if row["over"] else 1.0) for run in runs]
            for library, runs in measured.items()
        }
        problem = "; ".join(f"{library}: {error}" for library, error in failed.items())
        lines.append(report.Line(
            row["name"], row["unit"], row["target"], row["over"] is not None, pairs["ours"],
            pairs.get("reference", []), same, problem,
        ))  # fmt: skip
    return lines


def machine() -> str:
    """The processor, its cores and the memory."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (OSError, ValueError, AttributeError):
        memory = ""
    return f"{name}, {os.cpu_count()} cores{memory}, {platform.system()}, Python {platform.python_version()}"


def conditions(workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, str]:
    """Machine, versions, date and settings.

    Raises:
        SystemExit: the libraries do not run on the same torch.
    """
    about = {library: worker.ask("about") for library, worker in workers.items()}
    versions = [dict(entry["versions"]) for entry in about.values()]
    ours = versions[0].pop("peft")
    listed = ", ".join(f"{name} {version}" for name, version in versions[0].items())
    if len(versions) == 2:
        reference = versions[1].pop("peft")
        if versions[0] != versions[1]:
            raise SystemExit(f"The reference runs on other versions than ours: {versions[1]}, ours on {versions[0]}.")
        listed = f"huggingface/peft {reference}, {listed}"
    clock = "processor time" if options.cpu_time else "wall time"
    where = {"GPU": about["ours"]["gpu"]} if about["ours"]["gpu"] else {}
    return {
        "machine": machine(), **where,
        "versions": f"peft (ours) {ours}, {listed}",
        "date": datetime.date.today().isoformat(),
        "measured": f"{clock}, {about['ours']['threads']} threads, medians of up to {options.runs} alternating runs,"
        f" some of several rounds (in brackets the middle half), scale {options.scale!r}; each library is divided by"
        " the floor of its own process",
    }  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", help='only what matches, in "group: case"')
    parser.add_argument("--runs", type=int, help="runs of each case (default 9; quick 3; smoke 1)")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", dest="scale", action="store_const", const="quick", default="full",
                       help="smaller files and models where that is what takes long")  # fmt: skip
    scale.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="tiny: only to see it run")
    parser.add_argument("--no-reference", action="store_true", help="ours and the floor alone")
    parser.add_argument("--reference-python", metavar="PATH", help="an interpreter that has the reference")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a machine that is busy")
    parser.add_argument("--out", type=Path, help="page to write (default docs/benchmarks.md, if everything runs)")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    options = parser.parse_args(arguments)
    options.runs = options.runs or {"full": 9, "quick": 3, "smoke": 1}[options.scale]
    return options


def main(
    arguments: list[str] | None = None,
    groups: tuple[str, ...] = GROUPS,
    heading: str = "Benchmarks",
) -> int:
    """Runs what the arguments ask for; 1 if ours failed somewhere or computed something else than the reference."""
    options = parse(arguments)
    out = options.out
    if out is None and options.scale == "full" and not options.only and not options.no_reference:
        out = HERE.parent / "docs" / "benchmarks.md"
    if options.cpu_time:  # threads that look out for the end of others' work would count as working
        os.environ["OMP_WAIT_POLICY"] = "passive"
    common = [options.scale, str(int(options.cpu_time)), str(options.threads)]
    workers = {"ours": Worker(sys.executable, common, options.verbose)}
    if not options.no_reference:
        # A PYTHONPATH may well lead to ours.
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        workers["reference"] = Worker(options.reference_python or reference_python(), common, options.verbose, clean)
    try:
        known = conditions(workers, options)
        results, status = [], 0
        for group in groups:
            found = workers["ours"].ask("group", name=group)
            cases = [c for c in found["cases"] if re.search(options.only or "", f"{group}: {c['name']}")]
            lines = []
            for case in cases:
                print(f"{group}: {case['name']} ...", file=sys.stderr, flush=True)
                measured, same, failed = measure(workers, group, case, options.runs)
                lines += lines_of(case, measured, same, failed)
                status |= int("ours" in failed or same.startswith("no"))
            if lines:
                results.append({"name": group, "title": found["title"], "text": found["text"], "lines": lines})
                print(f"\n{found['title']}\n\n{report.table(lines)}\n", flush=True)
                if out:  # after each group, so that a run that is broken off leaves what it has
                    report.write(out, results, heading, known)
    finally:
        for worker in workers.values():
            worker.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
