"""Where this project keeps what can be made again: one folder, a part of it for each purpose.

    <folder>/kernels    measured costs       quant bench --save
    <folder>/prepared   prepared weights     load_model(..., prepared="auto")
    <folder>/cuda, ...  compiled kernels     kernel packages, under names of their own

The folder is ``$QUANT_CACHE``, else ``quant-core`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(part: str) -> Path:
    """The folder of one purpose; it may not exist yet."""
    if named := os.environ.get("QUANT_CACHE"):
        return Path(os.path.abspath(named)) / part
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.abspath(base)) / "quant-core" / part
