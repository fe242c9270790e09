"""Calling a compiled Triton kernel: past the Python half of Triton's launcher where it is known.

    compiled.run(grid, stream, ...)   Triton's own: a closure, two allocators, a loop over arguments
    raw(grid, stream, ...)            the C function below it, with the TMA descriptor ready

The C function is looked for in the launcher object of Triton 3.6 (arguments one by one) and of 3.8
(arguments as one tuple, read by annotations). Where it is not found as expected, Triton's own is
called: the same launch, with more of the host's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["launcher"]

_KEPT = 256  # descriptors of one kernel: as many buffers and sizes of x

Launch = Callable[[int, int, int, Sequence[Any]], None]
"""grid x, grid y, stream, arguments: addresses, integers, and a descriptor first if there is one"""


def launcher(compiled: Any, values: tuple[Any, ...]) -> Launch:
    """What runs ``compiled`` with the compile-time constants ``values`` behind its arguments."""
    return _direct(compiled, values) or _own(compiled, values)


def _own(compiled: Any, values: tuple[Any, ...]) -> Launch:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(x: int, y: int, stream: int, args: Sequence[Any]) -> None:
        run(x, y, 1, stream, function, metadata, None, None, None, *args, *values)

    return launch


def _below(run: Any) -> tuple[Any, Any] | None:
    """(C function, what Triton knows of the descriptor, or None) of a launcher; None if unknown."""
    outer = run.launch
    cells = getattr(outer, "__closure__", None)
    if not cells:
        return outer, None
    held = dict(zip(outer.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))
    meta = held.get("tensordesc_meta")
    if "launcher" not in held or not meta or len(meta) != 1 or meta[0] is None:
        return None
    if meta[0].get("fp4_padded") or meta[0].get("is_im2col"):
        return None
    return held["launcher"], meta[0]


def _encoder(run: Any, meta: Any) -> Callable[[Any], list[Any]] | None:
    """Descriptor object -> the arguments that it stands for, kept per address and size."""
    from triton.runtime import driver

    utils = driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None)
    fill = fill or getattr(utils, "fill_tma_descriptor", None)
    types = getattr(sys.modules[type(run).__module__], "TMA_DTYPE_DEVICE_TO_HOST", None)
    if fill is None or types is None:
        return None
    fixed = meta["swizzle"], meta["elem_size"], types[meta["elem_type"]], meta["block_size"]
    kept: dict[tuple[int, int], list[Any]] = {}

    def encode(desc: Any) -> list[Any]:
        at, shape, strides = desc.base.data_ptr(), desc.shape, desc.strides
        found = kept.get((at, shape[0]))  # columns are those of the kernel
        if found is None:
            if len(kept) >= _KEPT:
                kept.clear()
            made = fill(at, *fixed, shape, strides, 0)
            found = kept[at, shape[0]] = [made, *shape, *strides]
        return found

    return encode


def _direct(compiled: Any, values: tuple[Any, ...]) -> Launch | None:
    run = compiled.run
    names = ("launch", "launch_cooperative_grid", "launch_pdl", "global_scratch_size")
    if any(not hasattr(run, name) for name in (*names, "profile_scratch_size")):
        return None
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    below = _below(run)
    if below is None:
        return None
    raw, meta = below
    encode = None if meta is None else _encoder(run, meta)
    if meta is not None and encode is None:
        return None
    head = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    hooks = (compiled.packed_metadata, None, None, None)
    tupled = hasattr(run, "arg_annotations") and hasattr(run, "kernel_signature")
    kinds = (run.arg_annotations, run.kernel_signature) if tupled else ()

    def launch(x: int, y: int, stream: int, args: Sequence[Any]) -> None:
        given = args if encode is None else (*encode(args[0]), *args[1:])
        if tupled:
            raw(x, y, 1, stream, *head, *hooks, None, None, *kinds, (*given, *values))
        else:
            raw(x, y, 1, stream, *head, None, None, *hooks, *given, *values)

    return launch
