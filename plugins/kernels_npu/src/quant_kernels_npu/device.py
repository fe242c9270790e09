"""Is ``torch_npu`` there? It is imported only when an operation is asked for on an NPU."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from quant_core.errors import KernelError
from quant_core.kernels.base import Rejected
from quant_core.spec import OpSpec

__all__ = ["check_words", "torch_npu", "unavailable"]


def torch_npu() -> ModuleType:
    """The module; ``unavailable`` says before whether it imports."""
    return importlib.import_module("torch_npu")


def unavailable(op: OpSpec, operators: tuple[str, ...]) -> Rejected | None:
    """Why ``op`` cannot run on an NPU of this process; None if it can."""
    if op.device[0] != "npu":
        return Rejected(axis="device", have=op.device[0], need="npu")
    try:
        module = torch_npu()
    except (ImportError, OSError) as err:  # OSError: the driver's libraries are not found
        return Rejected(axis="torch_npu", have=str(err) or type(err).__name__, need="an import")
    lost = [name for name in operators if not hasattr(module, name)]
    if lost:
        have = f"{getattr(module, '__version__', 'unknown version')} without {', '.join(lost)}"
        return Rejected(axis="torch_npu", have=have, need="a version that has them")
    return None


@functools.cache
def check_words(device: str) -> None:
    """The operators' own packing of 4-bit codes is ours: eight a word, the first in the low bits.

    No page states the order, so it is asked once a process.

    Raises:
        KernelError: ``Q-KERNEL-WORDS`` if it is another one.
    """
    import torch

    codes = (torch.arange(64, dtype=torch.int32, device=device) * 5 % 16 - 8).view(4, 16)
    shifts = 4 * torch.arange(8, dtype=torch.int64, device=device)
    ours = ((codes.long() & 15).view(4, 2, 8) << shifts).sum(-1).to(torch.int32)
    theirs = torch_npu().npu_convert_weight_to_int4pack(codes)
    if theirs.shape != ours.shape or not bool((theirs == ours).all()):
        raise KernelError(
            "npu_convert_weight_to_int4pack packs 4-bit codes in another order than known here, "
            "expected eight a word along the last axis, the first in the low bits. Report the "
            "version of torch_npu, and leave 4-bit kernels out (QUANT_KERNELS).",
            code="Q-KERNEL-WORDS",
            expected=tuple(ours.shape),
            actual=tuple(theirs.shape),
        )
