"""What published packages take of `peft`: package, file, name and verdict.

    python tests/tools/scan_packages.py                      the wheels that PyPI has now
    python tests/tools/scan_packages.py --wheels FOLDER      those in a folder
    python tests/tools/scan_packages.py --write              also renew tests/data/packages.json, which the tests read

Read are: imports from `peft` and below it, attributes taken of what was imported (`LoraModel._create_and_replace`), and
dotted names in strings (`"peft.tuners.lora.layer"`). Nothing of a package is run. The verdict is `here` or `missing`; a
name is `guarded` where it stands in a `try` that catches its absence. LEFT_OUT says why a name is not here.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "accelerate", "autotrain-advanced", "axolotl", "diffusers", "llamafactory", "lm_eval", "ms-swift", "optimum",
    "sentence-transformers", "torchtitan", "transformers", "trl", "unsloth", "unsloth_zoo",
)  # fmt: skip
DATA = Path(__file__).parent.parent / "data" / "packages.json"
#: names that are not here (and what is below them), and why
LEFT_OUT = {
    "peft.BoneConfig": "not in huggingface/peft 0.21.2 either; MissConfig is its successor",
    "peft.BoneModel": "not in huggingface/peft 0.21.2 either",
    "peft.tuners.param_wrapper": "not in huggingface/peft 0.21.2 either; axolotl takes another way where it exists",
    "peft.config.PeftConfigMixin.from_pretrained_origin": "put there by ms-swift itself",
    "peft.tuners.lora.variants.MiCALinearVariant": "a part of the mechanism that works otherwise here",
    "peft.utils.save_and_load._maybe_shard_state_dict_for_tp": "sharding is not a step of loading of its own here",
}
#: what a `try` around a use must catch for its absence to do no harm
CATCHES = {"ImportError", "ModuleNotFoundError", "AttributeError", "Exception", "BaseException"}
#: a name of this package in a string
DOTTED = re.compile(r"peft(\.[A-Za-z_]\w*)+")


@dataclass(frozen=True, order=True)
class Use:
    """One use of a name of `peft` in a file; `guarded` if its absence is caught there."""

    name: str
    package: str
    file: str
    guarded: bool


class Uses(ast.NodeVisitor):
    """Collects the dotted names of `peft` that a module uses, with whether each is guarded."""

    def __init__(self) -> None:
        self.bound: dict[str, str] = {}
        self.found: set[tuple[str, bool]] = set()
        self._guards = 0

    def _add(self, name: str) -> None:
        self.found.add((name, self._guards > 0))

    def visit_Try(self, node: ast.Try) -> None:
        caught = {
            part
            for handler in node.handlers
            for part in (re.findall(r"\w+", ast.unparse(handler.type)) if handler.type else ["Exception"])
        }
        guards = bool(caught & CATCHES)
        self._guards += guards
        for child in node.body:
            self.visit(child)
        self._guards -= guards
        for child in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "peft":
                self._add(alias.name)
                self.bound[alias.asname or "peft"] = alias.name if alias.asname else "peft"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and (node.module or "").split(".")[0] == "peft":
            for alias in node.names:
                name = node.module if alias.name == "*" else f"{node.module}.{alias.name}"
                self._add(str(name))
                self.bound[alias.asname or alias.name] = str(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            parts, inner = [inner.attr, *parts], inner.value
        if isinstance(inner, ast.Name) and inner.id in self.bound and isinstance(node.ctx, ast.Load):
            self._add(".".join([self.bound[inner.id], *parts]))
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            self._add(node.value)


def uses_in(source: str) -> set[tuple[str, bool]]:
    """(name, guarded) of every use in a module's source text."""
    uses, tree = Uses(), ast.parse(source)
    uses.visit(tree)  # twice, for imports may stand below what uses them
    uses.visit(tree)
    return uses.found


def scan(wheel: Path) -> Iterator[Use]:
    """The uses in a wheel."""
    package = "-".join(wheel.name.split("-")[:2])
    with zipfile.ZipFile(wheel) as archive:
        for file in sorted(archive.namelist()):
            if file.endswith(".py"):
                text = archive.read(file).decode("utf-8", errors="replace")
                if "peft" in text:
                    try:
                        found = uses_in(text)
                    except SyntaxError:  # templates
                        continue
                    yield from (Use(name, package, file, guarded) for name, guarded in sorted(found))


def is_here(name: str) -> bool:
    """Whether a dotted name can be had: imported as far as it goes, attributes from there on."""
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(parts[:i]))
                continue
            except ImportError:
                return False
        value = getattr(value, part)
    return True


def left_out(name: str) -> str | None:
    """Why a name is not here, if that is on purpose."""
    found = (reason for path, reason in LEFT_OUT.items() if name == path or name.startswith(f"{path}."))
    return next(found, None)


def download(folder: Path) -> None:
    """Puts the newest wheel of each package into a folder."""
    for package in PACKAGES:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "-d", str(folder), package], check=True, stderr=subprocess.DEVNULL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="a folder with wheels, in place of downloading them")
    parser.add_argument("--write", action="store_true", help=f"renew {DATA.name}")
    parser.add_argument("--all", action="store_true", help="also the names that are here")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.wheels or Path(temporary)
        if options.wheels is None:
            download(folder)
        wheels = sorted(folder.glob("*.whl"))
        uses = sorted(use for wheel in wheels for use in scan(wheel))
    here = {name: is_here(name) for name in {use.name for use in uses}}
    for use in uses:
        if options.all or not here[use.name]:
            reason = left_out(use.name)
            verdict = "here" if here[use.name] else f"left out: {reason}" if reason else "missing"
            print(f"{use.package}  {use.file}  {use.name}  {verdict}{', guarded' if use.guarded else ''}")
    print(f"{len(here)} names in {len(wheels)} packages, {sum(here.values())} of them here")
    if options.write:
        names: dict[str, list[str]] = {}
        for use in uses:
            names.setdefault(use.name, [])
            if use.package not in names[use.name]:
                names[use.name].append(use.package)
        DATA.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
