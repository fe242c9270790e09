"""Pages of an entry's file in place of memory of one's own: nothing is copied, nothing cleared.

Buffers are then private to a process that writes into them, and shared by all that do not. The
system may drop pages that nobody wrote and fetch them again; they are asked for in huge pages.

What may happen to the file meanwhile: an entry is written under another name and moved into place,
and deleted as a whole; either leaves its pages to those who have them. Nothing ever cuts or
rewrites one in place. Somebody who does so by hand, or a disk that fails, ends the process when it
touches such a page (SIGBUS). File systems on which deleting alone would do that, those of a
network, are not mapped unless ``QUANT_PREPARED_MAP=1`` says so; ``QUANT_PREPARED_MAP=0`` reads
always.
"""

from __future__ import annotations

import mmap
import os
import re
from contextlib import suppress
from pathlib import Path

from quant_core.checkpoint.ahead import start_reading
from quant_core.errors import CheckpointError, ConfigError, printable

__all__ = ["ALIGN", "MAPPED_BYTES", "map_error", "map_file", "mapping_wanted", "maps_safely"]

ALIGN = 64  # bytes of a cache line
MAPPED_BYTES = 64 << 10  # smaller floats of a checkpoint are read: they share pages with others
_LOCAL = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "tmpfs", "xfs", "zfs")
)


def mapping_wanted(folder: Path) -> bool:
    """Whether entries below ``folder`` are mapped: as the environment says, else where it is safe.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` if ``QUANT_PREPARED_MAP`` is neither 0 nor 1.
    """
    text = os.environ.get("QUANT_PREPARED_MAP", "")
    if text not in ("", "0", "1"):
        raise ConfigError(
            f"QUANT_PREPARED_MAP is {printable(text)!r}, expected 0 or 1. "
            "Correct or unset the variable.",
            code="Q-CFG-VALUE",
            tensor="QUANT_PREPARED_MAP",
            expected=("0", "1"),
            actual=text,
        )
    return maps_safely(folder) if not text else text == "1"


def maps_safely(folder: Path) -> bool:
    """Whether the folder is on a local file system: nobody else's machine takes pages away."""
    return _file_system(folder) in _LOCAL


def _file_system(folder: Path, table: str = "/proc/self/mountinfo") -> str:
    """The type of the file system that holds ``folder``, as Linux names it; "" elsewhere."""
    try:
        with open(table, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.split(" ") for line in file]
    except OSError:
        return ""
    real, best, found = os.path.realpath(folder), -1, ""
    for fields in lines:
        if len(fields) < 5 or "-" not in fields:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        inside = point == "/" or real == point or real.startswith(f"{point}/")
        if inside and len(point) >= best:  # a later mount hides an earlier one
            best, found = len(point), fields[fields.index("-") + 1]
    return found


def map_error(path: Path, nbytes: int, err: OSError, instead: str) -> CheckpointError:
    """``Q-CKPT-IO``: the system does not map this file; ``instead`` is what works without."""
    reason = err.strerror or str(err)
    return CheckpointError(
        f"{printable(path)}: cannot be mapped: {reason}, expected a file system that maps files "
        f"and {nbytes} bytes of address space. Copy it to a local disk, or {instead}.",
        code="Q-CKPT-IO",
        path=path,
        actual=reason,
    )


def map_file(path: Path, fd: int) -> mmap.mmap:
    """The whole file, private; what of it is on disk only is fetched from now on.

    Raises:
        OSError: the system refuses.
    """
    mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them: the same pages, smaller
            mapping.madvise(mmap.MADV_HUGEPAGE)
    start_reading([(str(path), 0, len(mapping))])
    return mapping
