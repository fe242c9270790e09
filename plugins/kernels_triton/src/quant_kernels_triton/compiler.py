"""The code of a jitted function for arguments: of this process, from the disk, or compiled."""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_kernels_triton.ahead import awaited
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.machine_code import Code, Source, Typed, lowered, stored

__all__ = ["code_of", "source_of"]

_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "u1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def _typed(loose: Container[str], names: Sequence[str], args: Sequence[Any]) -> Typed | None:
    """As Triton types ``args``; None if one is of a kind that is not known here.

    Args:
        loose: names of arguments of which the type alone matters.
    """
    types, aligned, ones = [], [], []
    for i, (name, a) in enumerate(zip(names, args, strict=False)):
        at: int | None = None
        if isinstance(a, Tensor):
            if a.dtype not in _NAMES:
                return None
            types.append(f"*{_NAMES[a.dtype]}")
            at = a.data_ptr()
        elif isinstance(a, bool):
            types.append("u1")
        elif isinstance(a, float):
            types.append("fp32")
        elif isinstance(a, int):
            types.append("i32" if -(1 << 31) <= a < 1 << 31 else "i64")
            at = None if name in loose else a
            if at == 1:
                ones.append(i)
        elif isinstance(a, Descriptor):
            order = "plain" if a.plain else "swizzled"
            types.append(f"tensordesc<{_NAMES[a.dtype]}[{','.join(map(str, a.box))}],{order}>")
        else:
            return None
        if at is not None and at % 16 == 0:
            aligned.append(i)
    return Typed(tuple(types), tuple(aligned), tuple(ones))


def source_of(
    fn: Jitted, args: Sequence[Any], constants: dict[str, Any], options: dict[str, Any],
    capability: int,
) -> Source | None:  # fmt: skip
    """What the code of ``fn`` for arguments like ``args`` is made of; None if Triton has to type
    them.

    Args:
        args: run-time arguments; only their types, and whether they are multiples of 16, matter.
    """
    typed = _typed(fn.loose, fn.names, args)
    if typed is None:
        return None
    return Source(
        module=fn.module, name=fn.name, typed=typed, constants=constants, options=options,
        capability=capability,
    )  # fmt: skip


_held: dict[Path, Code | None] = {}
_locks: dict[Path, threading.Lock] = {}


def code_of(
    fn: Jitted, args: Sequence[Any], constants: dict[str, Any], options: dict[str, Any],
    capability: int,
) -> Code | None:  # fmt: skip
    """The code of ``fn`` for arguments like ``args``, see ``source_of``.

    Returns:
        None if Triton has to launch it.
    """
    source = source_of(fn, args, constants, options, capability)
    if source is None:
        return None
    file = source.file
    with _locks.setdefault(file, threading.Lock()):
        if file not in _held:
            found = stored(file)
            if found is None:
                awaited(file, source)
                found = stored(file) or lowered(source, file)
            _held[file] = found
        return _held[file]
