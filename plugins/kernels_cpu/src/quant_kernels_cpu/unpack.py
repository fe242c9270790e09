"""Core's operation ``unpack`` in C, for eight codes in a word; csrc/unpack.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.kernels.unpack import unpack_all
from quant_core.packing import Packed
from quant_core.spec import OpSpec, Packing
from quant_kernels_cpu.library import ISAS, library
from quant_kernels_cpu.offered import no_c_call

__all__ = ["UNPACK", "CpuUnpack"]

_PLAIN = Packing(word="int32")


class _Packed(ctypes.Structure):
    """``qk_packed`` of csrc/unpack.h."""

    _fields_ = [
        ("from", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("slot", ctypes.c_int64 * 8),
    ]


def _known(packed: Packed, out: Tensor) -> bool:
    """Whether the words are whole, of eight codes, and follow each other."""
    words, (rows, count), order = packed.words, packed.shape, packed.packing.order
    plain = packed.bits == 4 and replace(packed.packing, order=None, straddle=True) == _PLAIN
    whole = tuple(words.shape) == (rows, count // 8) and count % 8 == 0
    here = words.device.type == out.device.type == "cpu" and words.dtype == torch.int32
    return plain and (order is None or len(order) == 8) and whole and here and words.is_contiguous()


def _run(buffers: Sequence[Tensor], work: Sequence[tuple[Packed, Tensor]]) -> None:
    mine, others = [], []
    for packed, out in work:
        if not _known(packed, out):
            others.append((packed, out))
        elif out.numel():
            slot = (ctypes.c_int64 * 8)(*(packed.packing.order or range(8)))
            words = packed.words
            mine.append(_Packed(words.data_ptr(), out.data_ptr(), words.numel(), slot))
    if mine:
        library().c.qk_unpack((_Packed * len(mine))(*mine), len(mine))
    unpack_all(others)


class CpuUnpack(Weightless):
    """Words of all tensors in one call, shared among threads."""

    name = "cpu_unpack"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if odd := no_c_call(op, "unpack"):
            return odd
        return Accepted(cost=1.0, note=ISAS[library().isa])

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return _run


UNPACK = CpuUnpack()
