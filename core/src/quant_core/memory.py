"""Memory on the cpu that large tensors live in: mappings of huge pages, poisoned until written.

The first touch of a page costs more than the bytes put into it: 330 MB of fresh 4 KiB pages took
0.146 s to fill, 0.020 s as pages of 2 MiB (Linux 6.18, one core). Where the system gives huge pages
on request (``madvise``), large buffers ask for them; elsewhere nothing changes.

What is read again and again gains from them too: a model's weights, 66 MB in parts of a fifth of a
megabyte, were streamed through by one core in 2.26 ms instead of 2.36. So a kernel's smaller
buffers lie side by side in mappings of 8 MiB, each of which lives as long as one of them does.

Buffers start poisoned: NaN for floats, all bits set for codes. A part that is forgotten then shows.
Whoever writes every byte of a large buffer anyway says so with ``written_whole``; that saves one
pass over it. Small buffers are poisoned always.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "MAPPED_BYTES",
    "collector_paused",
    "empty",
    "give_back",
    "map_bytes",
    "poisoned",
    "written_whole",
]

MAPPED_BYTES = 2 << 20  # one huge page
_SHARED_BYTES = 4 * MAPPED_BYTES  # of a mapping in which smaller buffers lie
_LEAST_BYTES = 4 << 10  # one page: smaller buffers stay on torch's heap
_LINE = 64

_state = threading.local()
_lock = threading.Lock()
_shared: tuple[mmap.mmap | None, int] = (None, 0)  # where the next small buffer goes


def map_bytes(nbytes: int) -> mmap.mmap:
    """A private anonymous mapping, of huge pages where the system has them.

    Raises:
        OSError, OverflowError: no memory.
    """
    large = nbytes >= MAPPED_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    # Linux 6.18 begins a mapping with a huge page only where it holds nothing but huge pages
    size = -(-nbytes // MAPPED_BYTES) * MAPPED_BYTES if large else nbytes
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if large:
        if size != nbytes:
            mapping.resize(nbytes)
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them: the same memory in small pages
            return mapping
    return mapping


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """As ``torch.empty``; a large tensor on the cpu lies in a mapping of its own.

    Raises:
        MemoryError, RuntimeError: no memory.
    """
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    large = nbytes >= MAPPED_BYTES and torch.device(device).type == "cpu"
    if not large or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        mapping = map_bytes(nbytes)
    except (OSError, OverflowError) as err:
        raise MemoryError(f"{nbytes} bytes for a buffer of shape {shape}") from err
    return torch.frombuffer(mapping, dtype=dtype).view(shape)


def _room(nbytes: int) -> tuple[mmap.mmap, int]:
    """A place of ``nbytes`` in a mapping that other buffers lie in too."""
    global _shared
    with _lock:
        mapping, start = _shared
        if mapping is None or start + nbytes > _SHARED_BYTES:
            mapping, start = map_bytes(_SHARED_BYTES), 0
        _shared = mapping, start + -(-nbytes // _LINE) * _LINE
        return mapping, start


def _buffer(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """As ``empty``, for what stays as long as a model does."""
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    elsewhere = not _LEAST_BYTES <= nbytes < MAPPED_BYTES or torch.device(device).type != "cpu"
    if elsewhere or not hasattr(mmap, "MADV_HUGEPAGE"):
        return empty(shape, dtype, device)
    try:
        mapping, start = _room(nbytes)
    except (OSError, OverflowError) as err:
        raise MemoryError(f"{nbytes} bytes for a buffer of shape {shape}") from err
    count = nbytes // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)


@contextmanager
def written_whole(from_bytes: int = MAPPED_BYTES) -> Iterator[None]:
    """Inside, and in this thread, ``poisoned`` leaves buffers of ``from_bytes`` as they are.

    For a caller that goes on to write all rows and all experts of what it allocates; with 0, every
    byte of every buffer.
    """
    before = getattr(_state, "from_bytes", None)
    _state.from_bytes = from_bytes
    try:
        yield
    finally:
        _state.from_bytes = before


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A buffer whose unwritten values show: NaN for floats, all ones for bits."""
    out = _buffer(shape, dtype, device)
    spared = getattr(_state, "from_bytes", None)
    if spared is not None and out.numel() * dtype.itemsize >= spared:
        return out
    if dtype.is_floating_point:
        return out.fill_(float("nan"))
    return out.fill_(-1 if dtype.is_signed else 255)


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles meanwhile: for work whose many small objects stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back() -> None:
    """Return to the system what the C heap holds and nobody uses.

    glibc keeps holes between blocks in use: 40 to 150 MiB after loads that repack. Looking for them
    takes 0.03 to 5 ms. Other C libraries have no such call; nothing happens there.
    """
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
