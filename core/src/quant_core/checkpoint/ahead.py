"""Reading ahead: the disk works while the processor does something else.

A load reads a matrix, rearranges it, reads the next: disk and processor wait for each other. And
pages of a mapped file are fetched when they are first touched. So a thread of its own reads files
into the system's page cache, step by step in the order of their use, and throws the bytes away:
0.06 s of a processor per GB (Linux 6.18). Who reads what the thread has not come to yet waits for
it: two that fetch the same pages take longer than one.

Steps that are in the cache are not read, nothing is where all are, and nothing where the files
would not fit beside what else is in memory. It is a hint: a file that cannot be read is left to
whoever needs it, with an error of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Part", "available_bytes", "reading_ahead", "start_reading", "wait_for"]

_STEP = 8 << 20  # bytes that are in the cache if their first one is
_PIECE = 1 << 20  # bytes read at once: they stay in the second-level cache
_LEAST = 64 << 20  # bytes that are there before a thread has started
_SHARE = 0.5  # of the memory that is free

Part = tuple[str, int, int]
_Step = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _File:
    fd: int
    size: int
    missing: frozenset[int]  # where the steps begin that are on disk only


def available_bytes() -> int:
    """Memory that can be had without swapping, as Linux sees it; 0 where it cannot be told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    return 0


def _missing(fd: int, size: int) -> list[int]:
    """Starts of the steps that are on disk only; none where the system does not tell.

    ``mincore`` looks without reading: ``RWF_NOWAIT`` starts to read what it does not find.
    """
    look = getattr(ctypes.CDLL(None), "mincore", None)
    if look is None or not size:
        return []
    found, there = [], ctypes.c_ubyte()
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        for at in range(0, size, _STEP):
            page = ctypes.c_void_p(ctypes.addressof(first) + at)
            if look(page, ctypes.c_size_t(1), ctypes.byref(there)) == 0 and not there.value & 1:
                found.append(at)
        del first
    return found


class _Job:
    """One thread's work: steps of files in order, and which of them are behind it."""

    def __init__(self, files: Mapping[str, _File], order: Iterable[_Step]) -> None:
        self._files = files
        self._left = dict.fromkeys(s for s in order if s[1] in files[s[0]].missing)
        self._changed = threading.Condition()
        self.stopped = not self._left

    def run(self) -> None:
        piece = memoryview(bytearray(_PIECE))
        try:
            for path, start in list(self._left):
                file = self._files[path]
                for at in range(start, min(start + _STEP, file.size), _PIECE):
                    if self.stopped:
                        return
                    os.preadv(file.fd, [piece[: file.size - at]], at)
                with self._changed:
                    del self._left[path, start]
                    self._changed.notify_all()
        except OSError:  # whoever needs it says what is wrong
            return
        finally:
            self.stop()
            for path, file in self._files.items():
                _jobs.pop(path, None)
                os.close(file.fd)

    def wait(self, path: str, offset: int, nbytes: int) -> None:
        first = offset // _STEP * _STEP
        steps = [(path, at) for at in range(first, offset + nbytes, _STEP)]
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or not any(s in self._left for s in steps))

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


_jobs: dict[str, _Job] = {}
"""Real path -> who is reading that file ahead."""


def wait_for(path: str, offset: int, nbytes: int) -> None:
    """Return once nobody is about to read that part of a file ahead."""
    job = _jobs.get(path)
    if job is not None:
        job.wait(path, offset, nbytes)


def _open(path: str) -> _File | None:
    """The file, if much of it is on disk only."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(fd).st_size
        missing = frozenset(_missing(fd, size))
    except BaseException:
        os.close(fd)
        raise
    if len(missing) * _STEP > _LEAST:
        return _File(fd, size, missing)
    os.close(fd)
    return None


def _opened(paths: Iterable[str]) -> dict[str, _File]:
    found: dict[str, _File] = {}
    for path in paths:
        try:
            file = _open(path)
        except (OSError, ValueError):  # gone, or cut short: left to whoever needs it
            continue
        if file is not None:
            found[path] = file
    return found


def start_reading(parts: Sequence[Part], *, waited_for: bool = False) -> _Job | None:
    """Begin; None if there is nothing to do. The thread ends by itself, or by ``stop``.

    Args:
        parts: (path, first byte, number of bytes) in the order of their use.
        waited_for: whether ``wait_for`` waits for it.
    """
    if not sys.platform.startswith("linux"):
        return None
    real = {path: os.path.realpath(path) for path in dict.fromkeys(p for p, _, _ in parts)}
    files = _opened(real.values())
    if not files or sum(f.size for f in files.values()) > _SHARE * available_bytes():
        for file in files.values():
            os.close(file.fd)
        return None
    order = [
        (real[path], at)
        for path, offset, nbytes in parts
        if real[path] in files
        for at in range(offset // _STEP * _STEP, offset + nbytes, _STEP)
    ]
    job = _Job(files, order)
    if waited_for:
        _jobs.update(dict.fromkeys(files, job))
    threading.Thread(target=job.run, name="quant-ahead", daemon=True).start()
    return job


@contextmanager
def reading_ahead(parts: Sequence[Part]) -> Iterator[None]:
    """Inside, ``parts`` are read ahead of whoever reads them in this order."""
    job = start_reading(parts, waited_for=True)
    try:
        yield
    finally:
        if job is not None:
            job.stop()
