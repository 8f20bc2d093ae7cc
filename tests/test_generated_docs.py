"""docs/support.md and docs/methods/ are what `python docs/generate.py` writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from peft.registry import METHODS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_of_what_works_on_what(generate):
    assert generate.stale(generate.pages(methods=False)) == [], "run `python docs/generate.py`"


@pytest.mark.slow
def test_the_pages_of_the_methods(generate):
    assert generate.stale(generate.pages(support=False)) == [], "run `python docs/generate.py`"


def test_texts_are_those_of_methods():
    texts = yaml.safe_load((DOCS / "methods.yaml").read_text(encoding="utf-8"))
    assert set(texts) <= set(METHODS) and all({"name", "use"} <= set(text) for text in texts.values())
