"""The compiled library: found, loaded beside torch's OpenMP, and asked what this CPU can do.

The library carries no OpenMP runtime of its own. torch has one loaded; its symbols are made global
first, so that both use one pool of threads and ``torch.set_num_threads`` counts for both.

``QUANT_CPU_ISA`` (avx2, avx512, bf16, amx) lowers the instruction set, for tests and comparisons.
It is read when a kernel is first needed; ``library.cache_clear()`` reads it again.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from quant_core.errors import KernelError

__all__ = ["ISAS", "Library", "library", "unavailable"]

ISAS = ("none", "avx2", "avx512", "bf16", "amx")
_FILE = Path(__file__).parent / "_kernels.so"
_VERSION = 32  # of the C interface, as in hatch_build.py


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded functions; ``isa`` indexes ``ISAS``."""

    c: ctypes.CDLL
    isa: int
    vnni: bool


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch has loaded visible to libraries loaded later."""
    import torch  # noqa: F401  loads it

    maps = Path("/proc/self/maps").read_text("utf-8", "replace")
    found = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)
    for path in dict.fromkeys(found):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _load() -> Library | str:
    """The library, or why there is none."""
    if not _FILE.exists():
        return "the package was built without a C compiler"
    try:
        _share_openmp()
        c = ctypes.CDLL(str(_FILE))
    except OSError as err:
        return f"{_FILE.name} does not load: {err}"
    if c.qk_version() != _VERSION:
        return f"{_FILE.name} has interface {c.qk_version()}, expected {_VERSION}; build it again"
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for function in (c.qk_linear, c.qk_linear_int8, c.qk_linear_w8a8, c.qk_rows):
        function.argtypes = [ctypes.c_char_p]
    c.qk_attention.argtypes = [ctypes.c_char_p]
    for function in (c.qk_rms_norm, c.qk_gated, c.qk_rotary, c.qk_gated_mlp, c.qk_decoder_block):
        function.argtypes = [ctypes.c_char_p]
    c.qk_round.argtypes = [ctypes.c_char_p]
    for function in (c.qk_linear_shared, c.qk_linear_w8a8_shared, c.qk_decoder_chain):
        function.argtypes = [ctypes.c_char_p, integer]
    c.qk_native_limits.argtypes = [integer]
    c.qk_in_place.argtypes = [pointer, integer, integer]
    c.qk_native_python.argtypes, c.qk_native_python.restype = [pointer], None
    c.qk_native_api.argtypes = [pointer] * 5
    c.qk_weights_changed.argtypes, c.qk_weights_changed.restype = [], None
    c.qk_release.argtypes, c.qk_release.restype = [integer], None
    c.qk_weights_now.argtypes, c.qk_weights_now.restype = [], integer
    c.qk_load.argtypes = [*[pointer] * 2, *[integer] * 2, pointer]
    c.qk_load.restype = None
    c.qk_load_grid.argtypes = [*[pointer] * 2, *[integer] * 2, pointer]
    c.qk_load_grid.restype = None
    c.qk_all_finite.argtypes = [pointer, integer]
    c.qk_unpack.argtypes, c.qk_unpack.restype = [pointer, integer], None
    c.qk_unload.argtypes = [*[pointer] * 2, *[integer] * 4]
    c.qk_unload.restype = None
    isa = c.qk_isa()
    if isa == 0:
        return "the processor has no AVX2"
    return Library(c, isa, bool(c.qk_has_vnni()))


@functools.cache
def _limited(limit: str) -> Library | str:
    found = _load()
    if isinstance(found, str) or not limit:
        return found
    if limit not in ISAS[1:]:
        raise KernelError(
            f"QUANT_CPU_ISA is {limit!r}, expected one of {', '.join(ISAS[1:])}. "
            "Correct or unset the variable.",
            code="Q-KERNEL-NONE",
            expected=ISAS[1:],
            actual=limit,
        )
    isa = min(found.isa, ISAS.index(limit))
    return Library(found.c, isa, found.vnni and limit != "avx2")


def unavailable() -> str:
    """Why the C kernels cannot run here; "" if they can."""
    found = _limited(os.environ.get("QUANT_CPU_ISA", ""))
    return found if isinstance(found, str) else ""


@functools.cache
def library() -> Library:
    """The loaded library.

    Raises:
        KernelError: ``Q-KERNEL-NONE`` if there is none; ``unavailable`` says so beforehand.
    """
    found = _limited(os.environ.get("QUANT_CPU_ISA", ""))
    if isinstance(found, str):
        raise KernelError(
            f"no compiled CPU kernels: {found}. Install quant-kernels-cpu with a C compiler.",
            code="Q-KERNEL-NONE",
            actual=found,
        )
    found.c.qk_native_limits(found.isa)
    return found
