"""The documentation runs as it stands: its Python blocks are executed, its links lead somewhere, translations agree.

The pages of tasks and methods make the models that they use. Those that the quick tour and the README name are there as
tiny ones of the same kind, in folders of the same names; the hub that they push to is a server of the tests.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from hub_server import TOKEN, hub  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def script(page: Path) -> str:
    """The Python blocks of a page as one script, each line at its place, so that a traceback names the page's lines."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        if fence:
            inside = not inside and line.strip() == "```python"
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the models that the pages name."""
    folder = tmp_path_factory.mktemp("models")
    words = {"vocab_size": 272, "max_position_embeddings": 256}
    tiny_models.opt(**words).save_pretrained(folder / "facebook/opt-350m")
    tiny_models.t5(vocab_size=272).save_pretrained(folder / "bigscience/mt0-large")
    tiny_models.whisper().save_pretrained(folder / "openai/whisper-large-v2")
    for name in ("facebook/opt-350m", "bigscience/mt0-large"):
        tiny_models.byte_tokenizer().save_pretrained(folder / name)
    return folder


def run(page: Path, folder: Path, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the page's blocks in a fresh interpreter inside `folder`."""
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the pages that do not speak of devices are for any
    environment.pop("HF_HUB_OFFLINE", None)
    if endpoint is None:
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        environment["HF_ENDPOINT"] = endpoint
    path = folder / "page" / f"{page.stem}.py"  # not beside the models' folders, whose names are those of packages
    path.parent.mkdir()
    path.write_text(script(page), encoding="utf-8")
    done = subprocess.run([sys.executable, path], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_readme_quick_start(models, tmp_path):
    os.symlink(models / "facebook", tmp_path / "facebook")
    printed = run(ROOT / "README.md", tmp_path).stdout
    assert "Adapters are" in printed
    assert files(tmp_path / "opt-350m-lora") == ADAPTER_FILES
    assert len([line for line in script(ROOT / "README.md").splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_figures_of_the_readme_are_those_of_the_benchmarks(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summary = importlib.import_module("summary")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(summary.measured()) == 5 == len(summary.TABLE.search(text)[0].splitlines())
    assert summary.with_figures(text) == text, "run `python benchmarks/summary.py`"


@pytest.mark.slow
def test_quick_tour(models, tmp_path, hub):  # noqa: F811
    for name in ("facebook", "bigscience", "openai"):
        os.symlink(models / name, tmp_path / name)
    run(ROOT / "docs/quicktour.md", tmp_path, hub.url)
    assert set(hub.repos["your-name/mt0-large-lora"].files()) >= ADAPTER_FILES
    for name in ("mt0-large-lora", "opt-350m-lora", "whisper-lora", "opt-350m-prompt"):
        assert files(tmp_path / name) == ADAPTER_FILES
    checkpoints = sorted((tmp_path / "mt0-large-checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        assert files(checkpoint) > ADAPTER_FILES
        assert not files(checkpoint) & {"model.safetensors", "pytorch_model.bin"}
    assert "model.safetensors" in files(tmp_path / "opt-350m-merged")


def test_the_method_of_the_contributors_page_works(tmp_path):
    run(ROOT / "CONTRIBUTING.md", tmp_path)


def run_here(page: Path, folder: Path, monkeypatch) -> None:
    """Runs the page's blocks in this process inside `folder`; skips where a package is not installed."""
    code = script(page)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            pytest.importorskip(str(name).partition(".")[0])
    monkeypatch.chdir(folder)
    exec(compile(code, page.name, "exec"), {"__name__": page.stem})


SHORT = sorted([*(ROOT / "docs/tasks").glob("*.md"), ROOT / "docs/data.md", ROOT / "docs/migration.md"])


of_the_present = tiny_models.needs_transformers_5("has other names and classes than the pages")


@of_the_present
@pytest.mark.parametrize("page", [page for page in SHORT if script(page).strip()], ids=lambda page: page.stem)
def test_the_page_of_a_task_runs(page, tmp_path, monkeypatch):
    run_here(page, tmp_path, monkeypatch)


METHOD_PAGES = sorted(page for page in (ROOT / "docs/methods").glob("*.md") if page.stem != "README")


@of_the_present
@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_the_page_of_a_method_runs(page, tmp_path, monkeypatch):
    run_here(page, tmp_path, monkeypatch)
    assert files(tmp_path / page.stem) > {"README.md", "adapter_config.json"}


CHINESE = {ROOT / "README.md": ROOT / "README.zh.md"} | {
    ROOT / "docs" / page.relative_to(ROOT / "docs/zh"): page for page in sorted((ROOT / "docs/zh").rglob("*.md"))
}


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.stem)
def test_translated_pages_hold_the_same_code(page):
    english, chinese = page.read_text(encoding="utf-8"), CHINESE[page].read_text(encoding="utf-8")
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > len(re.sub(r"```.*?```", "", english, flags=re.DOTALL)) / 8
    # `ast` leaves out the comments, which are translated
    code = [ast.unparse(ast.parse(script(path))) for path in (page, CHINESE[page])]
    assert code[0] == code[1]
    headings = [len(re.findall(r"^#+ ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE))
                for text in (english, chinese)]  # fmt: skip
    assert headings[0] == headings[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []


def test_what_the_page_on_troubles_quotes_is_said_somewhere():
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = [
        node.value
        for path in (ROOT / "src/peft").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = [found[1] for row in rows if (found := re.match(r"`([^`]+)`(?! of)", row))]
    assert len(quoted) > 20
    assert [text for text in quoted if not any(text in constant for constant in said)] == []


def test_the_picture_of_the_rooms_is_complete():
    picture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    source = ROOT / "src/peft"
    rooms = {path.name for path in source.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    modules = {path.name for folder in (source, source / "core") for path in folder.glob("*.py")}
    assert set(re.findall(r"\b(\w+)/ ", picture)) == rooms
    assert set(re.findall(r"\b\w+\.py", picture)) == modules
