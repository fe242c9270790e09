"""Whether kernels run in Triton's interpreter."""

from __future__ import annotations

import os

__all__ = ["interpreting"]


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels, which then run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
