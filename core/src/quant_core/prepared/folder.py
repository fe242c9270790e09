"""Where prepared weights lie, how much room they may take, and which entry goes first.

    <folder>/<40 hex digits of the key>/buffers.safetensors

The folder is ``$QUANT_PREPARED_DIR``, else ``prepared`` in the cache folder. Entries may
take ``$QUANT_PREPARED_BYTES`` together (32 GiB); above that the one unused for longest goes first.
Using an entry moves its mtime. Only what has the names above is ever deleted.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant_core.cache import cache_folder
from quant_core.errors import ConfigError, printable

__all__ = ["BUFFERS", "Found", "clear", "default_folder", "entries", "folder_for", "make_room"]

BUFFERS = "buffers.safetensors"
_NAME = re.compile(r"[0-9a-f]{40}")
_OURS = re.compile(r"buffers\.safetensors|\.buffers-.*\.tmp|\.quant-write\.lock.*")
_LIMIT = 32 * 2**30
_SPARE = 2**30  # bytes that a write leaves free on the disk


def default_folder() -> Path:
    """The folder of ``prepared="auto"``."""
    named = os.environ.get("QUANT_PREPARED_DIR")
    if named:
        return Path(os.path.abspath(named))
    return cache_folder("prepared")


def folder_for(prepared: str | os.PathLike[str] | None) -> Path | None:
    """The folder that ``prepared`` names; None for "off".

    Args:
        prepared: "off", "auto" or a folder; None: what ``QUANT_PREPARED`` says, else "off".

    Raises:
        ConfigError: ``Q-CFG-VALUE`` if it names a file.
    """
    text = os.fspath(prepared) if prepared is not None else os.environ.get("QUANT_PREPARED", "")
    if text in ("", "off", "0"):
        return None
    folder = default_folder() if text in ("auto", "1") else Path(os.path.abspath(text))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"prepared: {printable(folder)} is a file, expected 'auto', 'off' or a folder. "
            "Name a folder for prepared weights.",
            code="Q-CFG-VALUE",
            tensor="prepared",
            actual=text,
        )
    return folder


def limit_bytes() -> int:
    """Bytes that all entries may take together.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` if ``QUANT_PREPARED_BYTES`` is no size.
    """
    text = os.environ.get("QUANT_PREPARED_BYTES", "")
    if text and not text.isdecimal():
        raise ConfigError(
            f"QUANT_PREPARED_BYTES is {printable(text)!r}, expected a number of bytes. "
            "Correct or unset the variable.",
            code="Q-CFG-VALUE",
            tensor="QUANT_PREPARED_BYTES",
            actual=text,
        )
    return int(text) if text else _LIMIT


@dataclass(frozen=True, slots=True)
class Found:
    """One entry on disk; a folder without buffers (a writer at work, or one that died) has 0."""

    path: Path
    nbytes: int
    used: float  # seconds since 1970

    @property
    def digest(self) -> str:
        return self.path.name


def entries(folder: Path) -> list[Found]:
    """All entries of ``folder``, the one used last first."""
    found = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        path = folder / name
        if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            s = (path / BUFFERS).stat()
            found.append(Found(path, s.st_size, s.st_mtime))
        except OSError:
            found.append(Found(path, 0, _mtime(path)))
    return sorted(found, key=lambda f: (-f.used, f.digest))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def remove(path: Path) -> bool:
    """Delete one entry: our files, then the folder if nothing else is in it."""
    try:
        names = os.listdir(path)
        for name in sorted(names, key=lambda n: n != BUFFERS):  # the buffers first
            if _OURS.fullmatch(name):
                (path / name).unlink(missing_ok=True)
        path.rmdir()
    except OSError:
        return False
    return True


def make_room(folder: Path, nbytes: int, keep: str) -> str:
    """Delete entries unused for longest until ``nbytes`` more fit.

    Args:
        keep: digest of the entry about to be written.

    Returns:
        "" or why they do not fit.
    """
    limit = limit_bytes()
    if nbytes > limit:
        return f"they take {nbytes} bytes, the cache may hold {limit} (QUANT_PREPARED_BYTES)"
    found = [f for f in entries(folder) if f.digest != keep]
    dead = [f for f in found if f.nbytes == 0 and time.time() - f.used > 24 * 3600]
    total = sum(f.nbytes for f in found)
    for f in (*dead, *reversed([f for f in found if f.nbytes])):
        if f.nbytes and total + nbytes <= limit:
            break
        if remove(f.path):
            total -= f.nbytes
    free = shutil.disk_usage(_existing(folder)).free
    if free < nbytes + _SPARE:
        return f"they take {nbytes} bytes, the disk has {free} free"
    return ""


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def clear(folder: Path, digests: Sequence[str] | None = None) -> list[Found]:
    """Delete entries, all of them or those named; returns what was deleted."""
    wanted = [f for f in entries(folder) if digests is None or f.digest in digests]
    return [f for f in wanted if remove(f.path)]
