"""On which device a call runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_device"]


def on_device(x: Tensor, run: Callable[..., None], *args: Any) -> None:
    """``run(*args)`` with the device of ``x`` as the current one."""
    if x.is_cuda and x.device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(x.device):
            run(*args)
    else:
        run(*args)
