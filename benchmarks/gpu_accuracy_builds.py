"""Compiles, without touching a GPU, what the calls of ``gpu_accuracy.py`` will run.

Compiling is most of the work of a run over hundreds of kinds of weights, and needs a processor
only; a few processes that use the GPU then find everything in the caches on disk. Calls are planned
(``quant_core.kernels.calls.Planned``), with tensors that have no memory, and what they would begin
to compile is compiled here and now.

What does not say what it will compile (products of torch's own) is compiled where it first runs.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_accuracy_cases import INPUTS, WEIGHTS, make_op
from gpu_accuracy_common import EXPERTS, TOKENS, Cell, Send, candidates, rule_rows

from quant_core.kernels.base import Kernel
from quant_core.kernels.calls import planned
from quant_core.spec import OpSpec

__all__ = ["FAMILIES", "H100", "PARTS", "build", "prepare", "pretend", "start", "task"]

Limits = tuple[int, int, tuple[int, ...], str]
H100: Limits = (132, 232448, (66, 44, 32, 24, 21, 17, 16), "90")
"""``quant_kernels_cuda.driver.device_limits`` of an H100; a run takes its own device's."""


_made: list[float] = []
"""Seconds of each compilation of this process."""


def _timed(make: Callable[..., Any], *args: Any) -> None:
    begin = time.monotonic()
    make(*args)
    _made.append(time.monotonic() - begin)


def _triton(source: Any) -> None:
    from quant_kernels_triton.machine_code import lowered, stored

    if source.file not in _seen and stored(source.file) is None:
        _timed(lowered, source, source.file)
    _seen.add(source.file)


def _nvrtc(*job: Any) -> None:
    from quant_kernels_cuda.compiler import compile_cached

    if job not in _seen:
        _timed(compile_cached, *job)
    _seen.add(job)


_seen: set[Any] = set()


def pretend(limits: Limits) -> None:
    """Plan for a device like the H100, in this process, from now on."""
    from quant_kernels_cuda import driver
    from quant_kernels_cuda import ops as cuda
    from quant_kernels_triton import launch
    from quant_kernels_triton import ops as triton

    planned.capability = 90
    torch.cuda.current_device = lambda: 0
    driver.unavailable = lambda: ""
    cuda.device_limits = lambda index: limits
    cuda.ahead, launch.ahead = _nvrtc, _triton
    triton.bound_embedding = lambda text, tensors, ids: triton._embedding(ids, tensors, text)


def build(kernel: Kernel, op: OpSpec, rows: Sequence[int]) -> str:
    """Compile what ``kernel`` runs for each of ``rows`` rows; what could not be followed."""
    values, run = list(kernel.allocate(op, "meta").values()), kernel.bind(op)
    act, problem = getattr(torch, op.act_dtype), ""
    for m in rows:
        index = torch.empty(m, dtype=torch.int64, device="meta")
        x = torch.empty(m, op.size("k"), dtype=act, device="meta")
        args = (index,) if op.op == "embedding" else (x, index) if op.op[0] == "g" else (x,)
        planned.jobs = []
        try:
            run(values, *args)
            for job in planned.jobs:
                job()
        except Exception as err:
            problem = problem or f"{kernel.name}, {m} rows: {type(err).__name__}: {str(err)[:200]}"
        finally:
            planned.jobs = None
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
    begin, before, problems = time.monotonic(), len(_made), []
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
    row = {"family": family, "builds": len(_made) - before, "seconds": time.monotonic() - begin}
    send(row | ({"problem": problems[0]} if problems else {}))
