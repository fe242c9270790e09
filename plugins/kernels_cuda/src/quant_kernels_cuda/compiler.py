"""Compiles the package's CUDA source with NVRTC, at first use, and keeps the result on disk.

No compiler of the system, no headers and no GPU are needed: NVRTC is a library that comes with
torch's CUDA builds or with ``nvidia-cuda-nvrtc``. A compiled variant takes 0.3 to 0.7 s and 50 KB.

The cache is a folder of files ``<key>.cubin`` as ``quant_core.cache`` keeps them. The key covers
source, headers, options, architecture and the version of NVRTC. What compiling took is logged at
level DEBUG, and is in the record's attribute ``stages``.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from quant_core.cache import cache_folder, keep, kept
from quant_core.errors import KernelError

__all__ = ["Compiler", "compile_cached", "compiler", "sources", "unavailable"]

log = logging.getLogger("quant_core")

_OLDEST = (12, 1)  # st.async


def _candidates() -> Iterator[str]:
    if named := os.environ.get("QUANT_NVRTC"):
        yield named
        return
    for folder in sys.path:
        for pattern in ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*"):
            found = sorted(glob.glob(os.path.join(folder, pattern)), reverse=True)
            yield from (f for f in found if "builtins" not in f and ".alt." not in f)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from sorted(glob.glob(os.path.join(home, "lib64", "libnvrtc.so*")))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class Compiler:
    """NVRTC behind three calls."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._rtc = library
        self.name = name
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)

    def _check(self, result: int, what: str) -> None:
        if result:
            self._rtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            text = self._rtc.nvrtcGetErrorString(result).decode()
            raise KernelError(
                f"{what} of {self.name} gave {text}, expected success. Set QUANT_NVRTC to the "
                "libnvrtc of a CUDA 12.1 or newer installation.",
                code="Q-KERNEL-COMPILE",
                actual=text,
            )

    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities it compiles for, as 80, 90, ..."""
        count = ctypes.c_int()
        self._check(self._rtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumArchs")
        held = (ctypes.c_int * count.value)()
        self._check(self._rtc.nvrtcGetSupportedArchs(held), "nvrtcGetSupportedArchs")
        return tuple(held)

    def compile(
        self, name: str, source: str, headers: dict[str, str], options: tuple[str, ...]
    ) -> bytes:
        """The cubin of ``source``, called ``name`` in messages.

        Raises:
            KernelError: ``Q-KERNEL-COMPILE`` with the compiler's messages.
        """
        rtc, program = self._rtc, ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(t.encode() for t in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(n.encode() for n in headers))
        self._check(
            rtc.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
            ),
            "nvrtcCreateProgram",
        )
        try:
            args = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            if rtc.nvrtcCompileProgram(program, len(options), args):
                message = self._read(program, "ProgramLog").decode(errors="replace").strip("\0\n ")
                raise KernelError(
                    f"NVRTC {self.version[0]}.{self.version[1]} refused the kernel's source: "
                    f"{message[:2000]}\nexpected to compile with {' '.join(options)}. "
                    "Report this, or set QUANT_KERNELS to other kernels.",
                    code="Q-KERNEL-COMPILE",
                    actual=message[:2000],
                )
            return self._read(program, "CUBIN")
        finally:
            rtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._rtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        held = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._rtc, f"nvrtcGet{what}")(program, held), what)
        return held.raw


@functools.cache
def _find() -> Compiler | str:
    tried = []
    for name in dict.fromkeys(_candidates()):
        try:
            found = Compiler(ctypes.CDLL(name), name)
        except (OSError, AttributeError, KernelError) as err:
            tried.append(f"{name}: {err}")
            continue
        if found.version >= _OLDEST:
            return found
        tried.append(f"{name}: version {found.version}")
    log.debug("no usable NVRTC:\n  %s", "\n  ".join(tried))
    return "install nvidia-cuda-nvrtc, or set QUANT_NVRTC to libnvrtc.so of CUDA 12.1 or newer"


def unavailable() -> str:
    """Why nothing can be compiled here; "" if it can."""
    found = _find()
    return found if isinstance(found, str) else ""


def compiler() -> Compiler:
    """The NVRTC of this process.

    Raises:
        KernelError: ``Q-KERNEL-COMPILE`` if there is none.
    """
    found = _find()
    if isinstance(found, str):
        raise KernelError(
            f"NVRTC, which compiles CUDA kernels, was not found; {found}.",
            code="Q-KERNEL-COMPILE",
        )
    return found


@functools.cache
def sources(name: str = "decode") -> tuple[str, dict[str, str]]:
    """(``name``.cu, its headers by name)."""
    folder = Path(__file__).parent / "csrc"
    headers = {f.name: f.read_text("utf-8") for f in sorted(folder.glob("*.cuh"))}
    return (folder / f"{name}.cu").read_text("utf-8"), headers


_locks: dict[Path, threading.Lock] = {}


def compile_cached(name: str, defines: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The cubin of ``name``.cu under ``defines`` for ``arch`` ("90"), from the disk if it is there.

    Raises:
        KernelError: ``Q-KERNEL-COMPILE``.
    """
    source, headers = sources(name)
    options = (f"--gpu-architecture=sm_{arch}", "--std=c++17", "-default-device",
               *(f"-D{name}={value}" for name, value in defines))  # fmt: skip
    rtc = compiler()
    text = "\0".join((source, *headers, *headers.values(), *options, str(rtc.version)))
    file = cache_folder("cuda") / f"{hashlib.sha256(text.encode()).hexdigest()}.cubin"
    with _locks.setdefault(file, threading.Lock()):
        held = kept(file)
        if held is None:
            start = time.perf_counter()
            held = rtc.compile(f"{name}.cu", source, headers, options)
            took = time.perf_counter() - start
            log.debug("compiled %s, seconds: %.3f", name, took, extra={"stages": {"NVRTC": took}})
            keep(file, held)
    return held
