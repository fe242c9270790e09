"""What the ops of kernel packages share: checks of a call's tensors, and fake answers.

A package's op usually takes (x, buffers, text of the operation); its fake implementation, which
tracing asks for shapes, is one of those here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.spec_json import op_from_text

__all__ = [
    "Planned",
    "check_input",
    "copy_exactly_",
    "fake_embedding",
    "fake_grouped",
    "fake_linear",
    "planned",
    "unobserved",
]

_TENSORS = (Tensor, torch.nn.Parameter)


def check_input(x: Tensor, k: int) -> None:
    """x must be floats [..., K].

    Raises:
        LayoutError: ``Q-LAYOUT-INPUT``.
    """
    if x.dim() < 1 or x.shape[-1] != k or not x.is_floating_point():
        raise LayoutError(
            f"input has shape {tuple(x.shape)} {x.dtype}, expected a float tensor [..., {k}]. "
            "Pass the layer's own activations.",
            code="Q-LAYOUT-INPUT",
            expected=k,
            actual=tuple(x.shape),
        )


def copy_exactly_(name: str, target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)`` that neither broadcasts nor casts.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE``, naming the buffer.
    """
    if target.shape != value.shape or target.dtype != value.dtype:
        raise LayoutError(
            f"{name} has shape {tuple(value.shape)} {value.dtype}, expected "
            f"{tuple(target.shape)} {target.dtype}. The parts of one layer differ in layout.",
            code="Q-LAYOUT-SHAPE",
            expected=tuple(target.shape),
            actual=tuple(value.shape),
        )
    target.copy_(value)


class Planned(threading.local):
    """Of this thread, while a bound function is run on tensors without memory (device "meta") only
    to find out what it will need (``kernels.ahead``): an op's Python function runs then, and in the
    place of a launch adds a job, which begins to compile and returns at once.

    Attributes:
        jobs: those found; None while calls are meant.
        capability: of the device that is planned for, 90 for 9.0.
    """

    jobs: list[Callable[[], None]] | None = None
    capability: int = 0


planned = Planned()


def unobserved(x: Tensor) -> bool:
    """Whether nothing wants to see an op here: no tracing, no mode, an ordinary tensor on a GPU.

    Then an op's Python function may be called directly, which saves the dispatcher's part of the
    host's time.
    """
    if planned.jobs is not None:
        return True
    return (
        not torch.compiler.is_compiling()
        and type(x) in _TENSORS
        and x.is_cuda
        and not torch._C._len_torch_dispatch_stack()
    )


def fake_linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], op_from_text(op_text).size("n"))


def fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    return x.new_empty(x.shape[0], op_from_text(op_text).size("n"))


def fake_embedding(ids: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op = op_from_text(op_text)
    dtype: torch.dtype = getattr(torch, op.act_dtype)
    return torch.empty(*ids.shape, op.size("k"), dtype=dtype, device=ids.device)
