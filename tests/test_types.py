"""Type checkers and editors see the public names as they are: what is misspelled in a user's script is an error."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import peft
from peft.core.tuner import BaseTuner
from peft.registry import METHODS

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import make_stub

#: a user's script, in which the lines that end so have a mistake
SCRIPT = Path(__file__).parent / "data" / "user_script.py"
WRONG = "# wrong"
SOURCE = Path(peft.__file__).parent.parent


@pytest.fixture(scope="module")
def wrong() -> list[int]:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, start=1) if line.endswith(WRONG)]


def test_the_stub_is_what_the_table_says():
    assert make_stub.STUB.read_text(encoding="utf-8") == make_stub.stub(), "run tests/tools/make_stub.py"


def test_mypy_finds_the_mistakes_in_a_users_script_and_no_others(wrong, tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run(
        [*command, "--follow-imports", "silent", str(SCRIPT)],
        env={**os.environ, "MYPYPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    found = re.findall(rf"{SCRIPT.name}:(\d+): error", run.stdout)
    assert [int(line) for line in found] == wrong, run.stdout + run.stderr


def test_pyright_finds_the_mistakes_in_a_users_script_and_no_others(wrong, tmp_path):
    pytest.importorskip("basedpyright")
    settings = {"extraPaths": [str(SOURCE)], "typeCheckingMode": "standard", "include": [str(SCRIPT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    run = subprocess.run([*command, "-p", str(tmp_path)], capture_output=True, text=True)
    found = {entry["range"]["start"]["line"] + 1 for entry in json.loads(run.stdout)["generalDiagnostics"]}
    assert sorted(found) == wrong, run.stdout


# ---- what a model passes on


def declared() -> dict[str, ast.FunctionDef | None]:
    """The names in the stub of what a model passes on; methods with their syntax tree."""
    tree = ast.parse((SOURCE / "peft" / "delegated.pyi").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    return {
        node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.target): node
        if isinstance(node, ast.FunctionDef)
        else None
        for node in body
        if isinstance(node, (ast.FunctionDef, ast.AnnAssign))
    }


def tuner_classes() -> list[type]:
    models = [BaseTuner, *(row.model_class for row in METHODS.values() if not row.prompt)]
    return [*(model.method_class for model in models), *models]


def test_what_a_tuner_has_is_declared_as_it_is():
    checked = 0
    for name, node in declared().items():
        owner = next((cls for cls in tuner_classes() if hasattr(cls, name)), None)
        if owner is None or node is None or hasattr(nn.Module, name):
            continue
        parameters = inspect.signature(getattr(owner, name)).parameters.values()
        assert [argument.arg for argument in node.args.args] == [parameter.name for parameter in parameters], name
        given = [repr(p.default) for p in parameters if p.default is not p.empty]
        assert [repr(ast.literal_eval(default)) for default in node.args.defaults] == given, name
        checked += 1
    assert checked > 10


def test_what_is_declared_is_there():
    transformers = pytest.importorskip("transformers")
    from tiny_models import llama

    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM"))
    somewhere = [*tuner_classes(), transformers.PreTrainedModel]
    missing = [n for n in declared() if not hasattr(model, n) and not any(hasattr(cls, n) for cls in somewhere)]
    assert missing == ["hf_device_map"], "which is there on models that accelerate has spread out"


def test_public_methods_of_all_tuners_are_declared_or_the_models_own():
    wanted = {"merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"}
    assert wanted <= declared().keys()
    assert not declared().keys() & vars(peft.PeftModel).keys(), "declared twice"
