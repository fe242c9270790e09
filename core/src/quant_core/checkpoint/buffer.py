"""Memory that stored tensors are read into: mappings of their own, used again when a tensor dies.

A stored tensor lives as long as one layer is being loaded. On the heap, layers that stay would be
allocated between those that go, and the holes remain: a model of 235 MiB left 94 MiB of them
(glibc 2.36, seven layers of 2 and 8 MiB matrices). And a fresh page costs more than the bytes that
are read into it: 285 MB in pieces of 8 MiB took 0.19 s into new mappings, 0.034 s into one that was
there (page cache, two cores).

So a checkpoint keeps mappings of tensors that died and leases them again, larger than asked for if
need be. It never keeps more than the largest lease so far, and gives everything back when it is
closed or dies. What a model keeps for good, its
float parameters, is read into memory of exactly its size instead, from a pool of its own.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.errors import LimitError, printable
from quant_core.memory import map_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BufferPool"]

_MAPPED = 256 << 10  # bytes from which a mapping of whole pages costs next to nothing


class BufferPool:
    """Leases memory for reading; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []
        self._largest = 0

    def lease(self, nbytes: int, *, path: Path, tensor: str) -> Tensor:
        """Uninitialised uint8 (nbytes,) on the cpu, also inside ``with torch.device("meta")``.

        The memory belongs to the tensor and its views for as long as one of them lives.

        Args:
            path, tensor: what will be read, for the message.

        Raises:
            LimitError: ``Q-LIMIT-MEMORY``.
        """
        import torch

        try:
            if nbytes < _MAPPED or not hasattr(mmap, "MAP_ANONYMOUS"):
                return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            mapping = self._take(nbytes)
            # the storage holds the view, and the view's death hands the mapping back
            view = memoryview(mapping)[:nbytes]
            weakref.finalize(view, _give_back, weakref.ref(self), mapping).atexit = False
            return torch.frombuffer(view, dtype=torch.uint8)
        except (RuntimeError, OSError, OverflowError, MemoryError) as err:
            raise LimitError(
                f"{printable(path.name)}: tensor {printable(tensor)!r} needs {nbytes} bytes, "
                "expected them to be free. Free memory or read a part of it.",
                code="Q-LIMIT-MEMORY",
                path=path,
                tensor=tensor,
                expected=nbytes,
            ) from err

    def _take(self, nbytes: int) -> mmap.mmap:
        """The smallest kept mapping that fits, else a new one."""
        with self._lock:
            self._largest = max(self._largest, nbytes)
            fitting = [m for m in self._free if len(m) >= nbytes]
            if fitting:
                best = min(fitting, key=len)
                self._free.remove(best)
                return best
            del self._free[: len(self._free) // 2]  # the smaller half did not fit
        return map_bytes(nbytes)

    def _keep(self, mapping: mmap.mmap) -> None:
        with self._lock:
            self._free.append(mapping)
            self._free.sort(key=len)
            while sum(map(len, self._free)) > max(self._largest, len(mapping)):
                del self._free[0]

    def clear(self) -> None:
        """Give all kept memory back to the system; leased memory stays with its tensors."""
        with self._lock:
            self._free.clear()
            self._largest = 0


def _give_back(pool: weakref.ref[BufferPool], mapping: mmap.mmap) -> None:
    alive = pool()
    if alive is not None:
        alive._keep(mapping)
