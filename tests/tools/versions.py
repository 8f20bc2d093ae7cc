"""Runs the tests against other versions of what the library stands on, each in an environment of its own.

    python tests/tools/versions.py                  all of them, all tests (hours)
    python tests/tools/versions.py oldest -k LORA   one of them; what follows goes to pytest

The environments are made in .versions/, once. On Linux, PyPI's torch brings CUDA along, some gigabytes for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = (
    "pytest", "pytest-xdist", "hypothesis", "scikit-learn", "bitsandbytes", "hqq",
    "rich", "matplotlib", "jsonargparse", "docstring_parser", "soundfile", "argcomplete", "gguf",
)  # fmt: skip
#: the lower bounds of pyproject.toml, the first of transformers' present series, and whatever is newest. Two packages
#: are not there for the oldest: torchao 0.18 needs torch 2.6, and trl 1.16 needs accelerate 1.10; their tests are
#: skipped.
VERSIONS = {
    "oldest": (
        "torch==2.4.*", "transformers==4.57.*", "accelerate==1.3.*", "numpy==1.26.*", "safetensors==0.4.5",
        "datasets==4.0.*", "pandas==2.0.*", "pyarrow<18",  # later ones need numpy 2
    ),
    "transformers5": ("torch", "transformers==5.0.*", "accelerate", "trl==1.16.*", "datasets", "pandas", "torchao"),
    "newest": ("torch", "transformers", "accelerate", "trl", "datasets", "pandas", "torchao"),
}  # fmt: skip


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there."""
    folder = ROOT / ".versions" / name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *VERSIONS[name], *TOOLS, "pyyaml"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
        ready.touch()
    return python


def main(arguments: list[str]) -> int:
    names = [arguments.pop(0)] if arguments and arguments[0] in VERSIONS else list(VERSIONS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--dist", "worksteal", *arguments]
    codes = {name: subprocess.run([python_of(name), *command], cwd=ROOT, env=environment).returncode for name in names}
    failed = [name for name, code in codes.items() if code]
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(names)}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
