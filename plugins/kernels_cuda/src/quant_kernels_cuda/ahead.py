"""Compiling in threads what will be launched, while something else is done.

NVRTC does not hold the interpreter's lock. What is needed meanwhile waits in ``compile_cached``;
what failed is compiled again where it is needed, and raises there.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

from quant_core.errors import KernelError
from quant_kernels_cuda.compiler import compile_cached

__all__ = ["ahead", "settled"]

log = logging.getLogger("quant_core")

_THREADS = 2
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_begun: dict[tuple[object, ...], Future[None]] = {}


def _compile(kernel: str, defines: tuple[tuple[str, str], ...], arch: str) -> None:
    try:
        compile_cached(kernel, defines, arch)
    except KernelError as err:
        log.warning("compiling %s ahead: %s", kernel, err)


def ahead(kernel: str, defines: tuple[tuple[str, str], ...], arch: str) -> None:
    """Begin ``compile_cached`` of these, once."""
    global _pool
    key = (kernel, defines, arch)
    with _lock:
        if key not in _begun:
            if _pool is None:
                _pool = ThreadPoolExecutor(_THREADS, "quant-compile-ahead")
            _begun[key] = _pool.submit(_compile, *key)


def settled() -> None:
    """Return when all that was begun is done."""
    with _lock:
        running = list(_begun.values())
    wait(running)


def _forked() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()
    _begun.clear()


# a child would inherit locks of the compiler that no thread of its own ever releases
os.register_at_fork(before=settled, after_in_child=_forked)
