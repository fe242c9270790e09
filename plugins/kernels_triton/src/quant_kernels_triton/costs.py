"""What a call costs, per number of rows: a measured table per device class, a heuristic elsewhere.

The shipped table ``tables/<capability>.json`` is written by benchmarks/gpu_kernels_triton.py:

    {"device": ..., "entries": [{"kernel", "class", "k", "n", "us": [[rows, microseconds], ...]}]}

``class`` is the element with the group of its finest scale, "uint4/128". For a layer the entries of
the kernel are taken, of its own class where there are any, else of the class nearest in bits; the
two shapes nearest in size are interpolated along the logarithm of their weights. What exceeds a
launch scales with bytes. Where ``gluon_ws`` runs, ``gluon_wna16`` costs what ``gluon_plan``
expects of the block sizes that it picks: tiles and rounds make steps that no interpolation between
shapes shows.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from quant_core.kernels.base import ANY_ROWS, Rejected
from quant_kernels_triton.gluon_plan import Specialized, config, plan, specialized
from quant_kernels_triton.gluon_stack import stack_us
from quant_kernels_triton.recipe import GROUP, Recipe

__all__ = ["BUCKETS", "class_of", "costs"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, ANY_ROWS)
"""Largest numbers of rows of the buckets."""

_READ_GBS, _FLOPS_PER_US = 1500.0, 2.0e8  # of a mid-range GPU: the heuristic only ranks
_START = 8.0  # microseconds of a launch
_LAUNCH = 5.0  # of a measured call, microseconds that a smaller layer does not save
_SLOWER = {"triton_wna16": 1.6, "triton_dense": 1.0, "gluon_wna16": 1.0}


def class_of(recipe: Recipe) -> str:
    """Element and group of the finest scale: "uint4/128", "fp4_e2m1/16", "int8/channel"."""
    s = recipe.scales[0]
    group = str(s.cols) if s.kind == GROUP else "channel" if s.kind < GROUP else "block"
    return f"{recipe.element}/{group}"


@dataclass(frozen=True, slots=True)
class _Entry:
    kernel: str
    kind: str
    bits: int
    k: int
    n: int
    us: tuple[tuple[int, float], ...]


@functools.cache
def _entries(capability: str) -> tuple[_Entry, ...]:
    path = resources.files("quant_kernels_triton") / "tables" / f"{capability}.json"
    if not capability or not path.is_file():
        return ()
    held: dict[str, Any] = json.loads(path.read_text())
    return tuple(
        _Entry(e["kernel"], e["class"], e["bits"], e["k"], e["n"], tuple(map(tuple, e["us"])))
        for e in held["entries"]
    )


def _at(us: tuple[tuple[int, float], ...], rows: int) -> float:
    """Microseconds for ``rows``: linear between measured rows, in proportion beyond the last."""
    low = us[0]
    for point in us:
        if rows <= point[0]:
            if point[0] == low[0]:
                return point[1]
            share = (rows - low[0]) / (point[0] - low[0])
            return low[1] + share * (point[1] - low[1])
        low = point
    return low[1] * rows / low[0]


def _measured(kernel: str, recipe: Recipe, capability: str) -> tuple[tuple[int, float], ...] | None:
    of = [e for e in _entries(capability) if e.kernel == kernel]
    if not of:
        return None
    kind = class_of(recipe)
    same = [e for e in of if e.kind == kind]
    if not same:
        nearest = min(of, key=lambda e: (abs(e.bits - recipe.bits), e.kind))
        same = [e for e in of if e.kind == nearest.kind]
    size = math.log(recipe.n * recipe.k)
    near = sorted(same, key=lambda e: abs(math.log(e.n * e.k) - size))[:2]
    out = []
    for bound in BUCKETS:
        rows = min(bound, 2 * BUCKETS[-2])
        total = weight = 0.0
        for e in near:
            w = 1.0 / (abs(math.log(e.n * e.k) - size) + 0.05)
            share = recipe.n * recipe.k / (e.n * e.k)
            us = _LAUNCH + max(_at(e.us, rows) - _LAUNCH, 0.5) * share
            total += w * math.log(us)
            weight += w
        out.append((bound, round(math.exp(total / weight), 2)))
    return tuple(out)


def _estimate(kernel: str, recipe: Recipe) -> tuple[tuple[int, float], ...]:
    factor, out = _SLOWER.get(kernel, 1.0), []
    dense = recipe.n * recipe.k * 2 if kernel == "triton_dense" else 0
    for bound in BUCKETS:
        rows = min(bound, 8192)
        read = (recipe.weight_bytes + 2 * dense) / (_READ_GBS * 1e3)
        work = 2.0 * rows * recipe.n * recipe.k / _FLOPS_PER_US
        out.append((bound, round(_START * (2 if dense else 1) + factor * max(read, work), 2)))
    return tuple(out)


def _of_stack(kernel: str, recipe: Recipe, capability: str) -> tuple[tuple[int, float], ...]:
    """The costs of a stack whose rows go to its experts at random.

    ``gluon_stack`` has a model of its kernel. Of plain Triton the experts met are one matrix as
    high as all of them: they run in one launch and share the card. Some get twice the rows of
    others, and every one fills its last block; sorting takes about 15 microseconds once.
    """
    p = plan(recipe)
    if kernel == "gluon_wna16" and not isinstance(p, Rejected):
        most = 2 * BUCKETS[-2]
        return tuple((b, round(stack_us(p, recipe, min(b, most)), 2)) for b in BUCKETS)
    out = []
    for bound in BUCKETS:
        rows = min(bound, 2 * BUCKETS[-2])
        active, each = min(recipe.experts, rows), -(-rows // recipe.experts)
        whole = replace(recipe, n=recipe.n * active, experts=0)
        table = _measured(kernel, whole, capability) or _estimate(kernel, whole)
        out.append((bound, round(15.0 + _at(table, each + min(each, 64)), 2)))
    return tuple(out)


def _modelled(
    recipe: Recipe, table: tuple[tuple[int, float], ...]
) -> tuple[tuple[int, float], ...]:
    """``table`` with the model of ``gluon_ws`` where that kernel runs."""
    p = plan(recipe)
    if isinstance(p, Rejected):
        return table
    out = []
    for bound, us in table:
        rows = min(bound, 2 * BUCKETS[-2])
        runs = isinstance(config(p, recipe, rows), Specialized)
        out.append((bound, round(specialized(p, recipe, rows)[1], 2) if runs else us))
    return tuple(out)


def costs(
    kernel: str, recipe: Recipe, device: tuple[str, str]
) -> tuple[tuple[tuple[int, float], ...], bool]:
    """(largest rows, microseconds) per bucket, and whether a measured table says so."""
    measured = _measured(kernel, recipe, device[1])
    table = _estimate(kernel, recipe) if measured is None else measured
    if recipe.experts:
        table = _of_stack(kernel, recipe, device[1])
    elif measured is not None and kernel == "gluon_wna16":
        table = _modelled(recipe, table)
    return table, measured is not None
