"""What the parts of ``gpu_accuracy.py`` share: sizes, bounds, comparisons, loaded layers."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from source_tree import REPO, use

use()
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "plugins/kernels_triton/tests/support")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.kernels.choose import accepting  # noqa: E402
from quant_core.registry import registry  # noqa: E402
from quant_core.spec import OpSpec  # noqa: E402

__all__ = [
    "ACTS", "BOUND", "BOUND_8", "EVEN", "EXPERTS", "GRAPHS", "HERE", "LARGE", "LOOSE", "MIDDLE",
    "NARROW", "ROWS", "SMALL", "TOKENS", "UNORDERED", "Cell", "Send", "candidates", "device",
    "error", "errors", "replayed", "rule_rows", "same",
]  # fmt: skip

ROWS = (1, 2, 7, 16, 17, 33, 64, 100, 256, 1000)
SMALL, LARGE = (200, 544), (2104, 1312)  # N, K: no multiples of any block
NARROW = (72, 96)  # one group of columns, and not all of it
TOKENS, EXPERTS = (0, 1, 7, 60, 300, 1500), 5  # rows that stacks are given, and their size
EVEN, MIDDLE = (256, 640), (2176, 1280)  # what torch's own products want
ACTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BOUND = {"bfloat16": 2.2e-3, "float16": 4.5e-4}  # A16
BOUND_8 = 5e-3
# against exact weights, where a kernel rounds them: half a unit of each, beside the rounding of y
LOOSE = {"bfloat16": 4.3e-3, "float16": 5.4e-4}
NOT_HERE = ("torch_ref",)  # the oracle itself
# declared: these add parts of a sum in the type of x, in any order
UNORDERED = ("humming", "humming@rounded")
# a graph's memory comes from torch's cache, which sanitizers want switched off
GRAPHS = not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")

Send = Callable[[Any], None]


@dataclass
class _Here:
    device: str = "cuda"


HERE = _Here()
"""The device of this process."""


@dataclass(frozen=True)
class Cell:
    """What a process does at a time: all kernels, or those named, on one kind of layer."""

    part: str
    weight: str = ""
    inputs: str = ""
    act: str = "bfloat16"
    sizes: tuple[tuple[int, int], ...] = (SMALL,)
    rows: tuple[int, ...] = ROWS
    kernels: tuple[str, ...] = ()
    index: int = 0


def device() -> tuple[str, str]:
    """The device of an operation."""
    if HERE.device != "cuda":
        return HERE.device, ""
    return "cuda", "{}.{}".format(*torch.cuda.get_device_capability())


def candidates(op: OpSpec, only: Sequence[str]) -> list[tuple[Any, OpSpec, Any]]:
    """Kernels that accept, the operation as they run it, their answers."""
    every = accepting(op, registry())
    return [c for c in every if c[0].name not in NOT_HERE and (not only or c[0].name in only)]


def rule_rows(rows: Sequence[int], cost_at: Callable[[int], float]) -> int:
    """How many rows the rules about rows are tried with: 3 at least."""
    return next((m for m in rows if m >= 3 and math.isfinite(cost_at(m))), 3)


def errors(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Relative Frobenius norms of (y, what it should be); infinity where y has NaN."""
    if not pairs:
        return []
    each = [(y.double() - want).norm() / want.norm() for y, want in pairs]
    return [e if math.isfinite(e) else math.inf for e in torch.stack(each).tolist()]


def error(y: Tensor, want: Tensor) -> float:
    """``errors`` of one."""
    return errors([(y, want)])[0]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    flat = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and bool(torch.equal(*flat))


class _Graphs:
    """The stream and the memory that all graphs of a process share."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.keeps_the_pool = self.capture(lambda: [torch.zeros(1, device="cuda")])

    def capture(
        self, calls: Callable[[], list[Tensor]]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                ys = calls()
            finally:
                graph.capture_end()
        return graph, ys


_graphs = functools.cache(_Graphs)


def replayed(calls: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What the replay of a CUDA graph of some calls writes into poisoned outputs.

    ``torch.cuda.graph`` would give torch's cached memory back to the driver, and ask for it again,
    for every graph.
    """
    graph, ys = _graphs().capture(calls)
    for y in ys:
        y.fill_(float("nan"))
    graph.replay()
    out = [y.clone() for y in ys]
    torch.cuda.synchronize()
    return out
