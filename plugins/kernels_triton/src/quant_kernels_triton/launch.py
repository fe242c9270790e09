"""Starting a compiled kernel with little host time.

Triton's own dispatch inspects every argument on every call. A layer's arguments never change their
kind, so the compiled kernel is looked up by a short key instead, once it exists, and is given
addresses. On CUDA devices Triton only compiles (``compiler``), and ``direct`` launches; elsewhere,
and for what those two do not know, Triton does both. Addresses must be multiples of 16 bytes, which
torch's allocations are; inputs that are not are copied (``aligned``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.calls import planned
from quant_kernels_triton.ahead import ahead
from quant_kernels_triton.arguments import capability
from quant_kernels_triton.compiler import code_of, source_of
from quant_kernels_triton.direct import available, prepare
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.replay import note_launch

__all__ = ["Build", "Start", "aligned", "launch"]

Start = Callable[[tuple[int, int], int, Sequence[Any]], None]
"""grid, stream, arguments: addresses, numbers and descriptors"""

_compiled: dict[Hashable, Start] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is needed to compile: constants, options, and the types that tensors are viewed as."""

    constants: dict[str, Any]
    options: dict[str, Any]
    views: dict[int, torch.dtype] = field(default_factory=dict)  # position of the argument: type


def aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _triton(fn: Jitted, grid: tuple[int, int], args: Sequence[Any], b: Build) -> Start | None:
    """Launch by Triton, and its launcher for later calls; None in the interpreter."""
    jitted = fn.function()
    args = [a.triton() if isinstance(a, Descriptor) else a for a in args]
    compiled = jitted[grid](*args, **b.constants, **b.options)
    if not hasattr(compiled, "run"):
        return None
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    values = tuple(b.constants[name] for name in jitted.arg_names[len(args) :])

    def start(grid: tuple[int, int], stream: int, args: Sequence[Any]) -> None:
        args = [a.triton() if isinstance(a, Descriptor) else a for a in args]
        run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *args, *values)

    return start


def _own(fn: Jitted, args: Sequence[Any], b: Build, device: int | None) -> Start | None:
    """The kernel past Triton's launcher, or None where that is needed."""
    found = capability(device)
    if device is None or not found or not available():  # no CUDA device, or the interpreter
        return None
    code = code_of(fn, args, b.constants, b.options, found)
    return None if code is None else prepare(code, device)


def launch(
    fn: Jitted,
    key: Hashable,
    grid: tuple[int, int],
    args: tuple[Any, ...],
    device: int | None,
    build: Callable[[], Build],
) -> None:
    """Run ``fn`` on the current stream of ``device``.

    Args:
        fn: a jitted function whose constants come after its arguments.
        key: with the device, everything that the build and the kinds and the divisibility of
            ``args`` depend on.
        args: run-time arguments; integers that change between calls of one key must be marked
            ``do_not_specialize`` in ``fn``.
        build: called where the kernel is not compiled yet.
    """
    held = None if planned.jobs is not None else _compiled.get((key, device))
    if held is None:
        b = build()
        typed = [
            a.view(-1).view(b.views[i]) if i in b.views and a.dtype != b.views[i] else a
            for i, a in enumerate(args)
        ]
        if planned.jobs is not None:
            source = source_of(fn, typed, b.constants, b.options, capability(device))
            planned.jobs += [] if source is None else [functools.partial(ahead, source)]
            return
        held = _own(fn, typed, b, device)
        if held is None:
            if (start := _triton(fn, grid, typed, b)) is not None:
                _compiled[key, device] = start
            return
        _compiled[key, device] = held
    note_launch(held, grid, args)
    stream = torch._C._cuda_getCurrentRawStream(device)
    held(grid, stream, [a.data_ptr() if isinstance(a, Tensor) else a for a in args])
