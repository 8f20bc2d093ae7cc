"""Old import paths of the reference implementation, as rows: path -> where its names live now."""

from __future__ import annotations

OLD_PATHS: dict[str, tuple[str, ...]] = {}


def install() -> None:
    """Makes the old paths importable."""
