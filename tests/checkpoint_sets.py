"""Where real checkpoints come from: the full set beside the repository, else the ones shipped here.

``checkpoint_dirs`` is for parametrisation, so it also works while tests are collected.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

__all__ = ["FIXTURES", "REPO", "SHARED", "checkpoint_dirs", "checkpoints_root", "has_shared"]

REPO = Path(__file__).resolve().parent.parent
FIXTURES = REPO / "tests" / "fixtures"
SHARED = REPO.parent / "shared" / "checkpoints"


def has_shared() -> bool:
    """Whether the full set is there."""
    return SHARED.is_dir()


def checkpoints_root() -> Path:
    """The folder of checkpoints that tests use on this machine."""
    return SHARED if has_shared() else FIXTURES


def checkpoint_dirs(prefixes: Iterable[str] = ("",)) -> list[Path]:
    """Folders with an ``expected.json`` whose name starts with one of ``prefixes``, sorted."""
    return [
        d
        for d in sorted(checkpoints_root().iterdir())
        if d.name.startswith(tuple(prefixes)) and (d / "expected.json").is_file()
    ]
