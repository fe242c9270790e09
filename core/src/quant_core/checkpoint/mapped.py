"""Stored tensors as pages of their file: nothing is read before it is used, nothing is copied.

Whoever writes into such a tensor writes into a copy of his own; the file stays as it is. A file
that is deleted or replaced leaves its pages to those who have them. What is not safe: a file that
is cut short in place ends the process when a lost page is touched (SIGBUS), and one that is
overwritten in place changes weights already loaded. It is so wherever weights are mapped;
transformers maps the floats of a safetensors file on the cpu too (5.23).
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.checkpoint.files import FileState, OpenFile
from quant_core.checkpoint.sniff import changed_error
from quant_core.prepared.pages import map_error, map_file
from quant_core.spec import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FileMaps"]


class FileMaps:
    """The mapped files of one checkpoint, each mapped once. Threads may ask at the same time."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def tensor(
        self, path: Path, state: FileState, info: TensorInfo, dtype: torch.dtype,
        shape: tuple[int, ...],
    ) -> Tensor | None:  # fmt: skip
        """All of a stored tensor; None where it is empty, or not aligned to its own elements.

        Args:
            path, state: the file, and what it was when its header was read.

        Raises:
            CheckpointError: ``Q-CKPT-CHANGED`` if the file is another one by now, ``Q-CKPT-IO``.
        """
        import torch

        if not info.nbytes or info.offset % dtype.itemsize:
            return None
        mapping = self._maps.get(path) or self._map(path, state, info)
        flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=info.offset)
        return flat.view(shape)

    def _map(self, path: Path, state: FileState, info: TensorInfo) -> mmap.mmap:
        with self._lock:
            known = self._maps.get(path)
            if known is not None:
                return known
            file = OpenFile(path)
            try:
                if file.state != state:
                    expected = f"{state.size} bytes"
                    raise changed_error(path, info.file, expected, file.state.size, info.name)
                mapping = map_file(path, file.fd)
            except OSError as err:
                instead = "load with mmap=False (--no-mmap)"
                raise map_error(path, state.size, err, instead) from err
            finally:
                os.close(file.fd)
            self._maps[path] = mapping
            return mapping

    def clear(self) -> None:
        """Forget the mappings; each lives on in its tensors."""
        with self._lock:
            self._maps.clear()
