"""What the site needs beyond docs/: pages from the root of the repository, and links that fit where they lie."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
#: file of the repository -> page of the site
PAGES = {"README.md": "index.md"} | {name: name for name in ("README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links are those of the repository; of a page they have to be those of the site."""
    here = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == here), None)
    source = source or (here if here.startswith("examples/") else f"docs/{here}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        target = PAGES.get(target, target.removeprefix("docs/"))
        if (ROOT / "docs" / target).is_dir():
            target += "/README.md"
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    blocks = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(text if text.startswith("```") else LINK.sub(on_site, text) for text in blocks)
