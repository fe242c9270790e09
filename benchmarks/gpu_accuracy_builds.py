"""Compiles, without touching a GPU, what the calls of ``gpu_accuracy.py`` will run.

Compiling is most of the work of a run over hundreds of kinds of weights, and needs a processor
only; a few processes that use the GPU then find everything in the caches on disk. A call is made
as it will be, but with tensors that have no memory ("meta"): block sizes are chosen and constants
made by the same code, and at the place of a launch the kernel is compiled for sm_90 instead.

What cannot be followed this way (products of torch's own) is compiled where it first runs.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from gpu_accuracy_cases import INPUTS, WEIGHTS, make_op
from gpu_accuracy_common import EXPERTS, TOKENS, Cell, Send, candidates, rule_rows
from torch import Tensor

from quant_core.kernels.base import Kernel
from quant_core.spec import OpSpec

__all__ = ["FAMILIES", "H100", "PARTS", "build", "prepare", "pretend", "start", "task"]

Limits = tuple[int, int, tuple[int, ...], str]
H100: Limits = (132, 232448, (66, 44, 32, 24, 21, 17, 16), "90")
"""``quant_kernels_cuda.driver.device_limits`` of an H100; a run takes its own device's."""


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


_seen: set[Any] = set()


def _compile(
    fn: Any, key: Any, grid: tuple[int, int], args: tuple[Any, ...], device: int | None,
    build: Callable[[], Any],
) -> None:  # fmt: skip
    """In the place of ``quant_kernels_triton.launch.launch``."""
    if key in _seen:
        return
    _seen.add(key)
    b = build()
    typed = [a.view(-1).view(b.views[i]) if i in b.views and a.dtype != b.views[i] else a
             for i, a in enumerate(args)]  # fmt: skip
    _made(fn, typed, b.constants, b.options, grid)


def _made(fn: Any, args: list[Any], constants: Any, options: Any, grid: tuple[int, int]) -> None:
    if find_spec("quant_kernels_triton.compiler") is not None:
        from quant_kernels_triton.compiler import code_of

        if code_of(fn, args, constants, options, 90) is not None:
            return
    fn.warmup(*args, grid=grid, **constants, **options)


def _pretend_triton() -> None:
    import triton

    from quant_kernels_triton import arguments, gluon_counters, launch

    triton.runtime.driver.set_active(_Driver())
    launch.launch = _compile
    gluon_counters.counters = lambda device, count: torch.empty(
        count, dtype=torch.int32, device="meta"
    )
    arguments.dependent = lambda device: True
    from quant_kernels_triton import ops, rounding_run  # not before: they take these by name

    ops.bound_embedding = lambda text, tensors, ids: ops._embedding(ids, tensors, text)
    ops.bound_grouped = lambda text, way, k, tensors, x, index: ops._grouped_linear(
        x, index, tensors, text, way
    )
    rounding_run._table = lambda text, device: torch.empty(512, dtype=torch.int32, device="meta")


def _pretend_cuda(limits: Limits) -> None:
    from quant_kernels_cuda import driver, ops
    from quant_kernels_cuda.compiler import compile_cached
    from quant_kernels_cuda.variant import variant_from_text

    driver.unavailable = lambda: ""
    ops.device_limits = lambda index: limits
    ops._function = lambda kernel, defines, device: len(compile_cached(kernel, defines, limits[3]))

    def linear(text: str, k: int, act: torch.dtype, tensors: Any, x: Tensor) -> Tensor:
        m = x.numel() // k
        ops.prepare(text, 0, tuple({min(m, ops.MAX_ROWS), m % ops.MAX_ROWS} - {0}))
        return x.new_empty(*x.shape[:-1], variant_from_text(text).n)

    def grouped(text: str, k: int, act: Any, tensors: Any, x: Tensor, experts: Tensor) -> Tensor:
        ops.prepare(text, 0, (x.shape[0],))
        return x.new_empty(x.shape[0], variant_from_text(text).n)

    ops.run_linear, ops.run_grouped = linear, grouped


def pretend(limits: Limits) -> None:
    """Make this process compile instead of launch; before anything of the kernels is imported."""
    from quant_core.kernels import calls

    calls.unobserved = lambda x: True  # the ops' Python functions are called directly
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    _pretend_cuda(limits)
    _pretend_triton()


def _empty(kernel: Kernel, op: OpSpec) -> list[Tensor]:
    """The buffers without memory."""
    from quant_core.kernels import tiles

    if getattr(kernel, "layout", "") == "tiles16" and not hasattr(kernel, "inner"):
        shapes = tiles.buffer_shapes(op).values()
        lead = (op.size("experts"),) if op.size("experts", 0) else ()
        return [torch.empty((*lead, *s), dtype=dtype, device="meta") for s, dtype in shapes]
    held = kernel.allocate(op, "cpu")
    return [torch.empty_like(t, device="meta") for t in held.values()]


def build(kernel: Kernel, op: OpSpec, rows: Sequence[int]) -> str:
    """Compile what ``kernel`` runs for each of ``rows`` rows; what could not be followed."""
    values, run, act = _empty(kernel, op), kernel.bind(op), getattr(torch, op.act_dtype)
    problem = ""
    for m in rows:
        try:
            if op.op == "embedding":
                run(values, torch.empty(m, dtype=torch.int64, device="meta"))
                continue
            x = torch.empty(m, op.size("k"), dtype=act, device="meta")
            index = [torch.empty(m, dtype=torch.int64, device="meta")]
            run(values, x, *(index if op.op == "grouped_linear" else ()))
        except Exception as err:
            problem = problem or f"{kernel.name}, {m} rows: {type(err).__name__}: {str(err)[:200]}"
    return problem


# ---------------------------------------------------------------------------- as tasks of a pool

PARTS = ("float", "rounded", "experts", "embedding")
_KINDS = {"embedding": "embedding", "experts": "grouped_linear"}  # others are linear
FAMILIES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda_decode", "cuda_decode@rounded"),
    "gluon": ("gluon_wna16", "gluon_wna16@rounded"),
    "plain": ("triton_wna16", "triton_wna16@rounded", "triton_dense", "triton_dense@rounded"),
    "eight": ("gluon_a8", "gluon_a8_stored", "gluon_scaled", "triton_scaled"),
}
"""Kernels that one task compiles."""

_limits: list[Limits] = []


def _ask(to: Any) -> None:
    from quant_kernels_cuda.driver import device_limits

    to.send((device_limits(0), torch.cuda.get_device_name(0)))


def prepare() -> str:
    """Ask the device for its limits, in a process of its own; import what all processes need.

    Returns:
        The names of the device and of what runs on it.
    """
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_ask, args=(there,))
    process.start()
    there.close()
    import triton
    from triton.runtime.cache import triton_key

    triton_key()  # reads Triton's library of 400 MB
    limits, name = here.recv()
    process.join()
    _limits.append(limits)
    return f"{name}, torch {torch.__version__}, Triton {triton.__version__}"


def start() -> None:
    """In a process that compiles: nothing is launched from now on."""
    torch.set_num_threads(1)
    pretend(_limits[0] if _limits else H100)


def task(job: tuple[Cell, str], send: Send) -> None:
    """Compile what one family of kernels runs in a cell."""
    cell, family = job
    names = [n for n in FAMILIES[family] if not cell.kernels or n in cell.kernels]
    begin, before, problems = time.monotonic(), len(_seen), []
    few, kind = cell.part in _KINDS, _KINDS.get(cell.part, "linear")
    inputs = INPUTS[cell.inputs] if cell.inputs else None
    reordered = () if not names else (False,) if few else (False, True)
    for size, gather in itertools.product(cell.sizes, reordered):
        op = make_op(
            replace(WEIGHTS[cell.weight], gather=gather), *size, act=cell.act, kind=kind,
            device=("cuda", "9.0"), inputs=inputs, experts=EXPERTS if kind[0] == "g" else 0,
        )  # fmt: skip
        for kernel, as_run, answer in candidates(op, names):
            asked = TOKENS[1:] if cell.part == "experts" else cell.rows
            rows = [m for m in asked if math.isfinite(answer.cost_at(m))]
            rows += [] if few else [rule_rows(cell.rows, answer.cost_at)]
            if problem := build(kernel, as_run, rows):
                problems.append(problem)
    row = {"family": family, "builds": len(_seen) - before, "seconds": time.monotonic() - begin}
    send(row | ({"problem": problems[0]} if problems else {}))
