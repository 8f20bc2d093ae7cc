"""`import peft` is cheap, and no optional package is needed for it."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft
from peft import compat

SOURCE = Path(peft.__file__).parent
#: what may be imported at the top of a module: the required dependencies, besides Python's own library
REQUIRED = {"peft", "torch", "numpy", "safetensors", "huggingface_hub", "packaging", "yaml"}
#: files of single commands, which are imported when it is known that what they need is installed, and what that is
COMMAND_FILES = {path for path in (SOURCE / "cli").glob("*.py") if path.stem not in ("__init__", "parse", "options")}
OF_COMMANDS = {"transformers", "pandas", "rich", "tqdm"}
OPTIONAL = (
    "transformers", "accelerate", "datasets", "diffusers", "bitsandbytes", "typer", "rich", "matplotlib",
)  # fmt: skip


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `code`."""
    report = "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_peft_loads_no_method_and_no_other_library():
    new = loaded_after("import peft") - loaded_after("import torch")
    heavy = {name for name in new if name.startswith(("peft.tuners", "peft.cli")) or name.split(".")[0] in OPTIONAL}
    assert heavy == set()
    # within 10 % of the time of `import torch`, by what is loaded rather than by the clock
    foreign = {name for name in new if name.split(".")[0] != "peft"}
    assert len(foreign) < 100, sorted(foreign)


@pytest.mark.parametrize("name", ["LoraConfig", "get_peft_model", "PeftModel", "PeftModelForCausalLM", "TaskType"])
def test_a_public_name_does_not_load_transformers(name):
    loaded = loaded_after(f"import peft; peft.{name}")
    assert not loaded & set(OPTIONAL)


def test_using_one_method_loads_no_other():
    methods = {name.split(".")[2] for name in loaded_after("import peft; peft.HRAConfig()") if "peft.tuners." in name}
    assert methods == {"hra"}


def test_every_public_name_resolves_without_optional_packages():
    block = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # `import name` raises ImportError
import peft
for name in peft.__all__:
    getattr(peft, name)
"""
    assert "peft.tuners.lora" in loaded_after(block)


def test_names_are_listed_and_unknown_ones_say_so():
    assert set(peft.__all__) <= set(dir(peft))
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        peft.LoraConfg  # noqa: B018


ATTRIBUTE_PATHS = [
    *compat.OLD_PATHS,
    *compat.METHOD_PATHS,
    *(f"peft.tuners.lora.{leaf}" for leaf in ("layer", "layer.Linear", "LoraLayer", "model", "eva", "variants")),
    *("peft.tuners.LoraConfig", "peft.optimizers.loraplus", "peft.helpers"),
]


def test_submodules_and_old_paths_load_on_attribute_access():
    # Each as if nothing of the library had been imported before; torch may stay, for it takes seconds.
    code = f"""
import sys, torch
for path in {ATTRIBUTE_PATHS!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        del sys.modules[name]
    import peft
    value = eval(path)
    assert value.__name__ in (path, path.rpartition(".")[2]), (path, value)
"""
    loaded_after(code)


def test_asking_a_folder_for_one_module_loads_no_other_method():
    loaded = loaded_after("import peft; peft.tuners.hra.layer.HRALayer; peft.utils.other")
    assert {name.split(".")[2] for name in loaded if name.startswith("peft.tuners.")} == {"hra"}
    assert not any(name.startswith("torch") for name in loaded_after("import peft; peft.utils.other, peft.tuners"))


@pytest.mark.parametrize("path", ["peft", "peft.tuners", "peft.tuners.hra", "peft.tuners.lora", "peft.utils"])
def test_a_submodule_that_is_not_there_is_a_missing_attribute(path):
    with pytest.raises(AttributeError, match=rf"module '{path}' has no attribute 'nothing'"):
        importlib.import_module(path).nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {path} import nothing", {})


def module_level_imports(tree: ast.Module) -> set[str]:
    """Packages that importing a module of this syntax tree imports (what stands under TYPE_CHECKING aside)."""
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        todo += ast.iter_child_nodes(node)
    return found


def test_the_search_for_imports_sees_what_runs_on_import():
    tree = ast.parse(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "class K:\n    import g\n    def m(self):\n        import h\ntry:\n    import i\nexcept"
        " ImportError:\n    import j\n"
    )
    assert module_level_imports(tree) == {"a", "c", "f", "g", "i", "j"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_optional_packages_are_imported_where_they_are_used(path):
    imported = module_level_imports(ast.parse(path.read_text(encoding="utf-8")))
    assert imported - REQUIRED - sys.stdlib_module_names <= (OF_COMMANDS if path in COMMAND_FILES else set())
