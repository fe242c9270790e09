"""Every kernel for a GPU against float64 products of the oracle's weights, and by its other rules.

    python benchmarks/gpu_accuracy.py --json out.json [--kernels NAME,...] [--parts float,rounded]

float      every weight of ``gpu_accuracy_cases`` x bf16, fp16 x columns in order or reordered x
           1 to 1000 rows x two sizes that are no multiples of any block; all kernels that accept
rounded    weights with quantized activations, against activations emulated in float32
experts    stacks, with tokens of no expert
embedding  bit for bit
weightless roundings (bit for bit), Hadamard transforms, attention, norms, rotations, gates

An error is the relative Frobenius norm, and y itself is rounded, which is 1.66e-3 in bf16. Kernels
that round weights to the type of x have 2.2e-3 to 2.45e-3 against the exact weights (two
independent roundings), so each error is taken twice: against exact weights, and against weights
rounded likewise. One of both must lie within the bound, and the first within ``LOOSE``; for few
outputs the bound allows for the noise of the norm. Besides, for every kernel and number of rows: a
later calls and the replay of a CUDA graph give the same bits; and for every kernel and layer: NaN
and infinity reach their row alone, weights at their zero point give the bias exactly, no rows give
none, x may lie anywhere, ``restore`` gives the canonical tensors bit for bit.

Kernels that are declared to add in any order (``UNORDERED``) need not repeat, and have ``LOOSE``.

Most of the time goes into compiling, so that is done ahead by processes that do nothing else
(``gpu_accuracy_builds``), in front of a few that use the GPU (``gpu_accuracy_pool``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_accuracy_common import ACTS, EVEN, HERE, LARGE, MIDDLE, NARROW, SMALL, Cell
from gpu_accuracy_pool import Broken, Late, Pool, Task

# isort: split
import gpu_accuracy_builds as builds
from gpu_accuracy_cases import PAIRS, WEIGHTS, WIDE
from gpu_accuracy_tables import latest, show, told

EIGHT_BIT = ("gluon_a8", "gluon_a8_stored", "gluon_scaled", "triton_scaled", "torch_scaled_mm",
             "torch_scaled_mm_block", "torch_int_mm")  # fmt: skip
PARTS = ("float", "rounded", "experts", "embedding", "weightless")


SOME = ("int4 g128 bf16", "uint4 g32 code", "mxfp4", "nvfp4", "int8 channel f32", "fp8 channel",
        "fp8 block", "uint3 g64 code", "int4 two levels")  # fmt: skip
STACKS = (("int4 g128 bf16", "fp8 token"), ("int4 g128 bf16", "int8 token"),
          ("fp8 channel", "fp8 token"), ("int8 channel f32", "int8 token"),
          ("fp8 block", "fp8 g128"), ("mxfp4", "mxfp8"), ("nvfp4", "nvfp4"))  # fmt: skip


def _with_weights() -> list[Cell]:
    both, even = (SMALL, LARGE), (EVEN, MIDDLE)
    order = [*WIDE, *(w for w in WEIGHTS if w not in WIDE)]
    out = []
    for act in ACTS:
        out += [Cell("float", w, act=act, sizes=both) for w in order]
        out += [Cell("float", w, act=act, sizes=(NARROW,)) for w in WIDE]
        out += [Cell("rounded", w, a, act, both) for w, a in PAIRS]
        out += [Cell("rounded", w, a, act, even, kernels=EIGHT_BIT) for w, a in PAIRS]
        out += [Cell("experts", w, act=act) for w in SOME]
        out += [Cell("experts", w, a, act, (EVEN,)) for w, a in STACKS]
        out += [Cell("embedding", w, act=act) for w in WEIGHTS]
    return out


def _others() -> list[Cell]:
    import gpu_rounding

    out = [Cell("weightless", "steps", index=i) for i in range(8)]
    out += [Cell("weightless", "triton_hadamard", index=i)
            for i in range(len(gpu_rounding.ORDERS))]  # fmt: skip
    out += [Cell("weightless", "triton_round", name, act, ((0, k),)) for name in gpu_rounding.SPECS
            for act, k in (("bfloat16", 4096), ("float32", 200), ("float16", 200))]  # fmt: skip
    humming: dict[str, Any] = {"sizes": (MIDDLE,), "rows": (1, 17, 256), "kernels": ("humming",)}
    out += [Cell("float", w, act=act, **humming) for act in ACTS for w in WEIGHTS]
    out += [Cell("rounded", w, a, **humming) for w, a in PAIRS]
    return out


def cells(parts: list[str], kernels: tuple[str, ...]) -> list[Cell]:
    """All that is to be done."""
    every = [c for c in (*_with_weights(), *_others()) if c.part in parts]
    return [replace(c, kernels=kernels) for c in every] if kernels else every


def _tasks(every: list[Cell]) -> list[Task]:
    """What is to be compiled for the cells: for each by family of kernels, so that it is shared."""
    out: list[Task] = []
    for at, cell in enumerate(every):
        for family, names in builds.FAMILIES.items():
            asked = not cell.kernels or set(cell.kernels) & set(names)
            if cell.part in builds.PARTS and asked:
                out.append(Task((cell, family), (at,)))
    return out


def _found(of: Any, message: Any) -> dict[str, Any]:
    """A row of what a process sent."""
    if isinstance(of, Task):
        row = message if isinstance(message, dict) else {"problem": message.why}
        return {"compiled": f"{of.job[0].weight} {of.job[1]}"} | row
    if isinstance(message, Late):
        return {"part": of.part, "late": str(of)}
    if isinstance(message, Broken):
        return {"part": of.part, "kernel": "?", "weight": of.weight, "bad": [message.why],
                "cell": str(of)}  # fmt: skip
    return message  # type: ignore[no-any-return]


def _start_tester() -> None:
    import torch

    torch.set_num_threads(1)
    if HERE.device == "cuda":
        torch.zeros(1, device="cuda")


def _pool(a: argparse.Namespace) -> Pool:
    import gpu_accuracy_checks

    return Pool(
        compile=builds.task, test=gpu_accuracy_checks.work, start_compiler=builds.start,
        start_tester=_start_tester, compilers=a.compilers, testers=a.testers, silent_s=a.silent,
    )  # fmt: skip


def _chosen(a: argparse.Namespace) -> list[Cell]:
    every = cells(a.parts.split(","), tuple(filter(None, a.kernels.split(","))))
    every = [c for c in every if any(o in f"{c.weight} {c.inputs}" for o in a.only.split(","))]
    every = [c for c in every if c.act in (*a.acts.split(","), "float32")]
    if a.rows:
        every = [replace(c, rows=tuple(map(int, a.rows.split(",")))) for c in every]
    before = {r.get("done") for path in a.but for r in json.loads(path.read_text())}
    return [c for c in every if str(c) not in before]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cores = os.cpu_count() or 1
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--kernels", default="", help="names, joined by commas; all that accept")
    parser.add_argument("--only", default="", help="kinds whose names hold one of these")
    parser.add_argument("--acts", default=",".join(ACTS))
    parser.add_argument("--rows", default="", help="numbers of rows in place of all")
    parser.add_argument("--compilers", type=int, default=max(cores - 3, 1))
    parser.add_argument("--testers", type=int, default=4, help="processes that use the GPU")
    parser.add_argument("--seconds", type=float, default=1e6, help="after which nothing is begun")
    parser.add_argument("--silent", type=float, default=60, help="seconds after which one hangs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--but", type=Path, nargs="*", default=[], help="results to go on from")
    parser.add_argument("--show", type=Path, nargs="*", default=[],
                        help="results to print, the last count")  # fmt: skip
    parser.add_argument("--kinds", action="store_true", help="show a table of kinds as well")
    parser.add_argument("--inline", action="store_true", help="in this process, for sanitizers")
    return parser.parse_args()


def _inline(every: list[Cell]) -> Iterable[tuple[Cell, Any]]:
    from gpu_accuracy_checks import work

    for cell in every:
        rows: list[Any] = []
        work(cell, rows.append)
        yield from ((cell, row) for row in rows)


def main() -> int:
    """Deal the cells to processes; 1 if something was wrong or not begun."""
    a = _arguments()
    HERE.device = a.device
    if a.show:
        show(latest(r for path in a.show for r in json.loads(path.read_text())), a.kinds)
        return 0
    end, began = time.monotonic() + a.seconds, time.time()
    every = _chosen(a)
    rows: list[dict[str, Any]] = []
    tasks = [] if a.device != "cuda" or not a.compilers else _tasks(every)
    if tasks:
        print(builds.prepare(), flush=True)
    found = _inline(every) if a.inline else _pool(a).run(every, tasks, end)
    try:
        for of, message in found:
            rows.append(_found(of, message))
            if rows[-1].get("bad"):
                told(rows[-1])
    finally:
        if a.json:
            a.json.write_text(json.dumps(rows))
    late = sum("late" in r for r in rows)
    show(latest(rows))
    for r in rows:
        if r.get("problem"):
            print("NOT COMPILED AHEAD", r)
    print(f"{len(every)} cells, {late} not begun in time, {time.time() - began:.0f} s")
    return int(late > 0 or any(r.get("bad") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
