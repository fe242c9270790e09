"""The operators of ``csrc/dispatch.c``: implementations in C for torch's dispatcher.

A call of an operator that is implemented in Python costs 5 to 8 us beside the arithmetic, one in C
less than 3. That counts in compiled graphs, where a step is some hundred calls. The stable C ABI
of torch 2.10 and later has what C needs; with an older torch the implementations in Python stay.
Nothing else differs, but that an error is a RuntimeError.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quant_core.errors import QuantError
from quant_kernels_cpu.descriptor import BYTES, DTYPES
from quant_kernels_cpu.library import Library

__all__ = ["BLOCK", "FLOATS", "INT8", "Block", "Layer", "register_native"]

log = logging.getLogger("quant_core")

_VERSION = 2 << 56 | 10 << 48  # of torch's stable ABI, as torch/headeronly/version.h counts
_FUNCTIONS = (
    *("aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_dim"),
    *("aoti_torch_get_dtype", "aoti_torch_get_data_ptr", "aoti_torch_delete_tensor_object"),
    *("aoti_torch_empty_strided", "aoti_torch_copy_"),
    *("torch_list_size", "torch_list_get_item", "torch_delete_list"),
    *("torch_string_length", "torch_string_c_str", "torch_delete_string"),
    *("torch_call_dispatcher", "aoti_torch_check"),
)
"""In the order of ``torch_api`` in csrc/dispatch.c."""

_PYTHON = (
    *("PyGILState_Ensure", "PyGILState_Release"),
    *("PyDict_GetItem", "PyList_GetItem", "PyErr_Clear"),
)
"""In the order of ``python_api`` in csrc/dispatch.h."""


FLOATS, INT8, BLOCK = range(3)
"""Kinds of layout texts, as csrc/dispatch.c counts them."""


class Layer(ctypes.Structure):
    """``layout`` of csrc/dispatch.c: what a layout text says."""

    _fields_ = [
        ("text", ctypes.c_char_p),
        ("length", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("op", ctypes.c_void_p),
        ("slots", ctypes.c_int64 * 8),
        *((name, ctypes.c_int64) for name in ("buffers", "n", "k", "type")),
    ]


class Block(ctypes.Structure):
    """``block`` of csrc/dispatch.c: what the text of a decoder layer says."""

    _fields_ = [
        ("head", Layer),
        *((name, ctypes.c_int64) for name in ("mark", "type", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("dim", "rotated", "norms")),
        ("form", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in ("act", "qkv", "sides", "up_first")),
    ]


_Describe = Callable[[str, int], Layer | Block]
_Filler = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
_Holder = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
_Reader = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_kept: list[Any] = []
"""Whatever C holds an address of, for the life of the process."""


def _torch_library() -> ctypes.CDLL | None:
    """torch's own library if it has every function, else None."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        lib = ctypes.CDLL(str(path))
        for name in (*_FUNCTIONS, "aoti_torch_library_init_impl", "torch_library_impl"):
            getattr(lib, name)
    except (OSError, AttributeError) as err:
        log.debug("operators of quant_kernels_cpu stay in Python: %s", err)
        return None
    return lib


def _reader(c: ctypes.CDLL, describe: _Describe) -> Any:
    """What C calls for a layout text that it has not seen."""

    def read(at: int, length: int, kind: int) -> int:
        text = ctypes.string_at(at, length)
        try:
            made = describe(text.decode(), kind)
        except (QuantError, ValueError, TypeError, KeyError) as err:
            log.error("layout %s cannot be read: %s", text[:200], err)
            return 1
        head = made.head if isinstance(made, Block) else made
        head.text, head.length, head.kind = text, length, kind
        _kept.append((made, text))
        return int(c.qk_native_layout(ctypes.byref(made)))

    return _Reader(read)


def _give_python(c: ctypes.CDLL) -> None:
    """Let C look at dicts and lists (csrc/dispatch_layer.c); without, it asks Python."""
    try:
        found = [getattr(ctypes.pythonapi, name) for name in _PYTHON]
    except AttributeError as err:
        log.debug("handles are looked up in Python: %s", err)
        return
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in found]
    c.qk_native_python((ctypes.c_void_p * len(addresses))(*addresses))


def register_native(
    lib: Library, names: tuple[str, ...], describe: _Describe, fill: Callable[[int], int],
    held: Callable[[int], int],
) -> bool:  # fmt: skip
    """Register ``quant_cpu::name`` for each of ``names`` from C; False if that cannot be.

    Args:
        describe: (layout text, its kind) -> all of ``Layer`` or ``Block`` but the text.
        fill: fills the table of weights at an address; not 0 where there is none.
        held: where the tensors are that a handle at an address stands for; 0 where there are none.
    """
    api = _torch_library()
    if api is None:
        return False
    c = lib.c
    functions = (ctypes.c_void_p * len(_FUNCTIONS))(
        *(ctypes.cast(getattr(api, name), ctypes.c_void_p).value for name in _FUNCTIONS)
    )

    def number(dtype: torch.dtype) -> int:
        return int(getattr(api, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")())

    known = {**DTYPES, torch.bool: BYTES}
    pairs = [n for dtype, ours in known.items() for n in (number(dtype), ours)]
    numbers = (ctypes.c_int64 * 9)(*pairs, number(torch.int64))
    reader = _reader(c, describe)
    filler, holder = _Filler(fill), _Holder(held)
    c.qk_native_api(functions, numbers, reader, filler, holder)
    _give_python(c)
    handle = ctypes.c_void_p()
    failed = api.aoti_torch_library_init_impl(
        b"quant_cpu", b"CPU", b"dispatch.c", ctypes.c_uint32(0), ctypes.byref(handle)
    )
    for name in names:
        failed = failed or api.torch_library_impl(
            handle, name.encode(), getattr(c, f"qk_op_{name}"), ctypes.c_uint64(_VERSION)
        )
    if failed:
        raise QuantError(
            "quant_kernels_cpu: torch refused its operators, expected them to be registered once. "
            "Import the package once a process.",
            code="Q-KERNEL-NONE",
        )
    _kept.append((functions, numbers, reader, filler, holder, handle))
    return True
