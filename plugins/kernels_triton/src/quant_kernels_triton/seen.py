"""Whether a call on a tensor may pass torch's dispatcher by, and on which device it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_device", "plain"]

_TENSORS = (torch.Tensor, torch.nn.Parameter)


def plain(x: Tensor) -> bool:
    """Whether nothing wants to see an op here: no tracing, no mode, an ordinary tensor on a GPU.

    Then the op's Python function is called directly, which saves the dispatcher's part of the
    host's time.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _TENSORS
        and x.is_cuda
        and not torch._C._len_torch_dispatch_stack()
    )


def on_device(x: Tensor, run: Callable[..., None], *args: Any) -> None:
    """``run(*args)`` with the device of ``x`` as the current one."""
    if x.is_cuda and x.device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(x.device):
            run(*args)
    else:
        run(*args)
