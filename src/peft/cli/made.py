"""What is made or converted once and kept, and said while it goes on; transformers, without its own words."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def transformers() -> Any:
    """The library, without its progress bars and its advice."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def cache() -> Path:
    """Where converted models are kept: `PEFT_HOME`, by default `~/.cache/peft`."""
    kept = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft"
    return Path(os.environ.get("PEFT_HOME") or kept).absolute()


@contextmanager
def speaking(words: str) -> Iterator[None]:
    """Says `words` every ten seconds."""
    over = threading.Event()

    def speak() -> None:
        while not over.wait(10):
            print(words, file=sys.stderr, flush=True)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def made_once(folder: Path, words: str) -> Iterator[Path]:
    """A folder to write into that becomes `folder` once it is whole; says `words`, and that it goes on."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{words}, once, into {folder} (a minute or two)", file=sys.stderr, flush=True)
    with TemporaryDirectory(dir=folder.parent) as unfinished, speaking("... still at it"):
        yield Path(unfinished, folder.name)
        with suppress(OSError):  # another process was faster
            Path(unfinished, folder.name).rename(folder)
