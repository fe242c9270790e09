"""Where this project keeps what can be made again: one folder, a part of it for each purpose.

    <folder>/kernels    measured costs       quant bench --save
    <folder>/prepared   prepared weights     load_model(..., prepared="auto")
    <folder>/cuda, ...  compiled kernels     kernel packages, under names of their own

The folder is ``$QUANT_CACHE``, else ``quant-core`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

``keep`` and ``kept`` are for files that are made once: the SHA-256 of the content, then the
content. Files are written under another name and renamed, so processes may share the folder; a
damaged file is as good as none.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "cache_there", "keep", "kept"]

log = logging.getLogger("quant_core")

_SUM = 32  # bytes of SHA-256


def cache_folder(part: str) -> Path:
    """The folder of one purpose; it may not exist yet."""
    return Path(os.path.abspath(_folder(part)))


def cache_there(part: str) -> bool:
    """Whether that folder is there; asked for every kernel that accepts an operation."""
    return os.path.isdir(_folder(part))


def _folder(part: str) -> str:
    if named := os.environ.get("QUANT_CACHE"):
        return f"{named}/{part}"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{base}/quant-core/{part}"


def kept(file: Path) -> bytes | None:
    """What ``keep`` wrote; None if it is not there, or damaged, which is warned about."""
    try:
        held = file.read_bytes()
    except OSError:
        return None
    if len(held) > _SUM and hashlib.sha256(held[_SUM:]).digest() == held[:_SUM]:
        return held[_SUM:]
    log.warning("%s is damaged; it is made again", file)
    return None


def keep(file: Path, content: bytes) -> None:
    """Write ``content`` for ``kept``; where that is not possible one warning says so."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(hashlib.sha256(content).digest() + content)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as err:
        _warn_once(str(file.parent), str(err))


@functools.cache
def _warn_once(folder: str, reason: str) -> None:
    log.warning("%s cannot be written (%s); what is made there is not kept", folder, reason)
