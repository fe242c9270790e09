"""Files of a checkpoint: which may be opened, how they are read, how many stay open.

Rule for paths (``resolve_inside``): a name found in an index or a folder must lead to a regular
file inside that folder. Two ways out are refused alike: the name itself ("../x", "/x") and a
symlink. One symlink is allowed by name, that of the Hugging Face hub cache, where a snapshot's
files are links into the blobs of the same repository:

    <repository>/snapshots/<revision>/model.safetensors -> <repository>/blobs/<hash>

Reading is ``pread`` into memory of the caller, never ``mmap``: a file that shrinks under a mapping
kills the process with SIGBUS, and a file overwritten in place changes weights already loaded.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from quant_core.checkpoint.ahead import wait_for
from quant_core.errors import CheckpointError, printable

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["FilePool", "FileState", "OpenFile", "io_error", "resolve_inside"]

_SHARE = 4 << 20  # bytes for which another thread is worth waking
_ALIGN = 2 << 20  # shares end where huge pages do: two threads in one would wait for each other
_MOST_THREADS = 4  # they use up the bandwidth of the memory
_MAX_PREAD = 2**30  # Linux reads at most 2 GiB - 4 KiB in one call


_REMEDIES: dict[int | None, tuple[str, str]] = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT),
        ("room for all of it", "Free some space, or choose another disk"),
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), ("the permission", "Change it, or choose another place")
    ),
    errno.EROFS: ("a file system that can be written", "Choose another place"),
    errno.ENOENT: ("it to exist", "Check the path"),
    errno.ENAMETOOLONG: ("a shorter name", "Choose another one"),
    errno.EIO: ("a disk that works", "Check it, or copy the file from elsewhere"),
    errno.EMFILE: ("room for one more open file", "Raise `ulimit -n`"),
}


def io_error(path: object, err: OSError, doing: str = "cannot be read") -> CheckpointError:
    """``Q-CKPT-IO`` with the operating system's reason in words, and what helps against it."""
    reason = err.strerror or str(err)
    other = ("it to work", "Check that the path exists, its permissions and the disk")
    expected, remedy = _REMEDIES.get(err.errno, other)
    return CheckpointError(
        f"{printable(path)}: {doing}: {reason}, expected {expected}. {remedy}.",
        code="Q-CKPT-IO",
        expected=expected,
        path=path,
        actual=reason,
    )


def resolve_inside(folder: Path, name: str, *, named_by: str = "") -> Path:
    """The real path of ``folder / name`` if the rule above allows it. Opens nothing.

    Args:
        named_by: file that names it, for the message.

    Raises:
        CheckpointError: ``Q-CKPT-PATH``. A file that does not exist is not an error here.
    """
    origin = f"{printable(named_by)}: " if named_by else ""

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"{origin}file {printable(name)!r} {why}, expected a regular file inside "
            f"{printable(folder)}. Correct the name or copy the file into the folder.",
            code="Q-CKPT-PATH",
            path=folder / named_by if named_by else folder,
            expected="a regular file inside the folder",
            actual=name,
        )

    if not name or "\0" in name or "\\" in name:
        raise refuse("is not a valid file name")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or Path(name).drive:
        raise refuse("leads out of the folder")
    base = Path(os.path.realpath(folder))
    try:
        real = Path(os.path.realpath(base / name))
        mode = real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG  # reported as missing by the caller
    except OSError as err:  # a loop of symlinks, a name too long
        raise io_error(folder / name, err) from err
    if not real.is_relative_to(base) and real.parent not in _hub_blobs(base):
        raise refuse(f"is a symlink out of the folder, to {printable(real)}")
    if not stat.S_ISREG(mode):
        raise refuse("is not a regular file")
    return real


def _hub_blobs(base: Path) -> list[Path]:
    """Folders of blobs that symlinks of a hub-cache snapshot may lead into."""
    lineage = [base, *base.parents]
    return [p.parent / "blobs" for p in lineage[1:] if p.name == "snapshots"]


@dataclass(frozen=True, slots=True)
class FileState:
    """What must stay the same while a checkpoint is in use."""

    inode: int
    size: int
    mtime_ns: int

    @staticmethod
    def of(fd: int) -> FileState:
        s = os.fstat(fd)
        return FileState(s.st_ino, s.st_size, s.st_mtime_ns)


def threads_for(nbytes: int) -> int:
    """How many threads share a read: as many as torch computes on, where it is loaded."""
    if nbytes < 2 * _SHARE:
        return 1
    threads = getattr(sys.modules.get("torch"), "get_num_threads", os.cpu_count)
    limit = threads() or 1
    return max(1, min(limit, _MOST_THREADS, nbytes // _SHARE))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="quant-read")


if hasattr(os, "register_at_fork"):  # a child has the pool but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


class OpenFile:
    """One open file: exact reads, any number of threads."""

    def __init__(self, path: Path) -> None:
        """Open the regular file ``path`` for reading; raises ``Q-CKPT-IO``."""
        self.path = path
        self._name = os.path.realpath(path)
        self.users = 0
        self.evicted = False
        try:  # O_NONBLOCK: a FIFO put in the file's place must not hang us
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            raise io_error(path, err) from err
        s = os.fstat(self.fd)
        if not stat.S_ISREG(s.st_mode):
            os.close(self.fd)
            raise CheckpointError(
                f"{printable(path)}: is not a regular file, expected one. "
                "Give the path of the checkpoint itself.",
                code="Q-CKPT-IO",
                path=path,
            )
        self.state = FileState(s.st_ino, s.st_size, s.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; returns the bytes read, fewer at the end of the file.

        A large buffer is shared among threads: copying out of the page cache, and touching fresh
        memory, is work for a processor.
        """
        size, count = len(buffer), threads_for(len(buffer))
        wait_for(self._name, offset, size)
        if count == 1:
            return self._read_part(buffer, offset)
        from concurrent.futures import wait

        step = -(-size // count // _ALIGN) * _ALIGN
        starts = range(step, size, step)
        rest = [
            _pool().submit(self._read_part, buffer[at : at + step], offset + at) for at in starts
        ]
        try:
            done = self._read_part(buffer[:step], offset)
        finally:
            wait(rest)  # nobody writes into the buffer after this call
        for at, share in zip(starts, rest, strict=True):
            got = share.result()
            done += got if done == at else 0
        return done

    def _read_part(self, buffer: memoryview, offset: int) -> int:
        done = 0
        try:
            while done < len(buffer):
                n = os.preadv(self.fd, [buffer[done : done + _MAX_PREAD]], offset + done)
                if n == 0:
                    break
                done += n
        except OSError as err:
            raise io_error(self.path, err, f"reading at byte {offset + done} failed") from err
        return done

    def read(self, size: int, offset: int) -> bytes:
        """At most ``size`` bytes from ``offset``."""
        raw = bytearray(size)
        return bytes(raw[: self.read_into(memoryview(raw), offset)])

    def close(self) -> None:
        os.close(self.fd)


class FilePool:
    """Open files by path, at most ``limit`` idle at a time, least recently used closed first.

    A file in use by a thread is closed only after its last user, so at most ``limit`` plus the
    number of reading threads are open.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._files: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def open(self, path: Path) -> Iterator[OpenFile]:
        """The open file ``path``, for the length of the ``with`` block."""
        file = self._acquire(path)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                if file.evicted and not file.users:
                    file.close()

    def _acquire(self, path: Path) -> OpenFile:
        with self._lock:
            if self._closed:
                raise CheckpointError(
                    f"{printable(path)}: the checkpoint is closed, expected it open. "
                    "Read before close(), or open it again.",
                    code="Q-CKPT-CLOSED",
                    path=path,
                )
            file = self._files.get(path)
            if file is None:
                while len(self._files) >= self._limit:
                    self._evict()
                file = self._files[path] = OpenFile(path)
            self._files.move_to_end(path)
            file.users += 1
            return file

    def _evict(self) -> None:
        _, file = self._files.popitem(last=False)
        file.evicted = True
        if not file.users:
            file.close()

    def close(self) -> None:
        """Close all files; one in use is closed by its last user."""
        with self._lock:
            self._closed = True
            while self._files:
                self._evict()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()
