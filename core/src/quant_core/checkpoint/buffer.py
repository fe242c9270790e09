"""Memory that stored tensors are read into: a mapping of its own for each large one.

Such a tensor lives as long as one layer is being loaded. On the heap, layers that stay would be
allocated between those that go, and the holes remain: a model of 235 MiB left 94 MiB of them
(glibc 2.36, seven layers of 2 and 8 MiB matrices). A mapping goes back to the system when its
tensor dies.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.errors import LimitError, printable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_buffer"]

_MAPPED = 256 << 10  # bytes from which a mapping of whole pages costs next to nothing


def read_buffer(nbytes: int, *, path: Path, tensor: str) -> Tensor:
    """Uninitialised uint8 (nbytes,) on the cpu, also inside ``with torch.device("meta")``.

    Args:
        path, tensor: what will be read, for the message.

    Raises:
        LimitError: ``Q-LIMIT-MEMORY``.
    """
    import torch

    try:
        if nbytes >= _MAPPED and hasattr(mmap, "MAP_ANONYMOUS"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, OSError, OverflowError, MemoryError) as err:
        raise LimitError(
            f"{printable(path.name)}: tensor {printable(tensor)!r} needs {nbytes} bytes, "
            "expected them to be free. Free memory or read a part of it.",
            code="Q-LIMIT-MEMORY",
            path=path,
            tensor=tensor,
            expected=nbytes,
        ) from err
