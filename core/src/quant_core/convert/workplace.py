"""The folder beside a destination in which everything is written before one rename.

    .NAME.<pid>.tmp/   locked (``flock``) by its writer as long as that lives

An error or a signal removes it. What a process that was killed outright left behind nobody holds
locked: the next writer of the same destination removes it. Where a file system has no such locks,
it is left alone.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_core.checkpoint.files import io_error

__all__ = ["workplace"]

_TRIES = 8  # times that another writer may take a new folder for a dead one's


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A fresh folder beside ``path``, removed in the end unless it was renamed.

    Raises:
        CheckpointError: ``Q-CKPT-IO``.
    """
    folder = path.parent / f".{path.name}.{os.getpid()}.tmp"
    made = [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_dead(path)
        fd = _make(folder)
    except OSError as err:
        _unmake(made)
        raise io_error(folder, err, "cannot be written") from err
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _unmake(made)
        raise
    finally:
        os.close(fd)
    shutil.rmtree(folder, ignore_errors=True)  # gone already where it was renamed


def _unmake(made: list[Path]) -> None:
    for parent in made:
        try:
            parent.rmdir()
        except OSError:  # someone else put something there meanwhile, or it was never made
            break


def _make(folder: Path) -> int:
    """Make the folder and hold its lock: the descriptor."""
    for _ in range(_TRIES):
        folder.mkdir()
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        _lock(fd)
        if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
        os.close(fd)
    raise FileNotFoundError(2, "removed by other writers as soon as it was made", str(folder))


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by a living writer, or there are no locks here
        return False
    return True


def _clear_dead(path: Path) -> None:
    """Remove what killed writers of ``path`` left."""
    mine = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    for name in os.listdir(path.parent):
        if not mine.fullmatch(name):
            continue
        try:
            fd = os.open(path.parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # no folder, not ours to read, or gone meanwhile
            continue
        try:
            if _lock(fd):
                shutil.rmtree(path.parent / name, ignore_errors=True)
        finally:
            os.close(fd)
