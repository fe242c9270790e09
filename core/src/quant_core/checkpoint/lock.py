"""One writer for a folder: a lock file that the system lets go of when its owner dies.

The file says who holds it, ``PID HOST``; what counts is the advisory lock on it (``flock``), which
no killed process keeps. So a file without a lock on it is a dead writer's: it is taken over, and
what that writer left under temporary names is removed. Where a file system has no such locks, the
file alone counts, and one that is left has to be deleted by hand.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

__all__ = ["take_lock"]

_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
_TRIES = 8  # times that the file may vanish while it is opened


def take_lock(path: Path) -> int | None:
    """Hold the lock file ``path``; to let go, unlink it and close what is returned.

    Returns:
        Its open descriptor, or None if a living writer holds it.

    Raises:
        OSError: the folder cannot be written.
    """
    for _ in range(_TRIES):
        fd, ours = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno in _HELD or not ours:
                os.close(fd)
                return None  # held; or there are no locks here, and the file counts
        if _is_at(fd, path):
            if not ours:
                _clear_after(fd, path.parent)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return fd
        os.close(fd)  # its owner was done with it just now; the next file is another one
    return None


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether it was made here."""
    try:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644), True
    except FileExistsError:
        if path.is_dir():
            raise
        return os.open(path, os.O_CREAT | os.O_RDWR, 0o644), False


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _clear_after(fd: int, folder: Path) -> None:
    """Remove the temporary files of the dead writer that the lock file names."""
    owner = re.match(rb"(\d{1,10})\b", os.pread(fd, 64, 0))
    if owner is None:
        return
    mine = re.compile(rf"\..+-\d{{5}}\.{int(owner[1])}\.tmp")
    for name in os.listdir(folder):
        if mine.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
