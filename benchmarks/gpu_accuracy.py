"""Every kernel for a GPU against float64 products of the oracle's weights, and by its other rules.

    python benchmarks/gpu_accuracy.py --json out.json [--kernels NAME,...] [--parts float,rounded]

float      every weight of ``gpu_accuracy_cases`` x bf16, fp16 x columns in order or reordered x
           1 to 1000 rows, layers whose sizes are no multiples of any block; all kernels that accept
rounded    weights with quantized activations, against activations emulated in float32
experts    stacks, with tokens of no expert; embeddings, bit for bit
weightless roundings (bit for bit), Hadamard transforms, attention, norms, rotations, gates
opcheck    ``torch.library.opcheck`` of every registered operator that these calls reach

An error is the relative Frobenius norm, and y itself is rounded, which is 1.66e-3 in bf16. Kernels
that round weights to the type of x have 2.2e-3 to 2.45e-3 against the exact weights (two
independent roundings), so each error is taken twice: against exact weights, and against weights
rounded likewise. One of both must lie within the bound, and the first within ``LOOSE``; for few
outputs the bound allows for the noise of the norm. Besides, for every kernel and number of rows: a
second call and the replay of a CUDA graph give the same bits; and for every kernel and layer: NaN
and infinity reach their row alone, weights at their zero point give the bias exactly, no rows give
none, ``restore`` gives the canonical tensors bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_accuracy_checks import (
    ACTS,
    EIGHT_BIT,
    EVEN,
    LARGE,
    NARROW,
    PAIRS,
    WEIGHTS,
    WIDE,
    WORK,
    Cell,
    work,
)
from gpu_watch import Broken, watched


def cells(parts: list[str], kernels: tuple[str, ...]) -> list[Cell]:
    """All that is to be done, the most telling first."""
    import gpu_rounding

    first, then = [], []
    some = ("int4 g128 bf16", "uint4 g32 code", "mxfp4", "nvfp4", "int8 channel f32", "fp8 channel",
            "fp8 block", "uint3 g64 code", "int4 two levels")  # fmt: skip
    first += [Cell("experts", w) for w in some]
    first += [Cell("experts", w, a, sizes=EVEN) for w, a in (
        ("int4 g128 bf16", "fp8 token"), ("int4 g128 bf16", "int8 token"),
        ("fp8 channel", "fp8 token"), ("int8 channel f32", "int8 token"),
        ("fp8 block", "fp8 g128"), ("mxfp4", "mxfp8"), ("nvfp4", "nvfp4"))]  # fmt: skip
    then += [Cell("experts", w, act="float16") for w in some[:4]]
    then += [Cell("embedding", w) for w in WEIGHTS if "three" not in w]
    first += [Cell("weightless", "steps", index=i) for i in range(8)]
    first += [Cell("weightless", "triton_hadamard", index=i)
              for i in range(len(gpu_rounding.ORDERS))]  # fmt: skip
    then += [Cell("weightless", "triton_round", name, act, (0, k)) for name in gpu_rounding.SPECS
             for act, k in (("bfloat16", 4096), ("float32", 200), ("float16", 200))]  # fmt: skip
    first += [Cell("opcheck"), *(Cell("opcheck", w) for w in some[:3])]
    first += [Cell("opcheck", w, index=3) for w in some[:1]]
    first += [Cell("opcheck", w, a, sizes=EVEN) for w, a in PAIRS if w in (
        "int4 g128 bf16", "fp8 channel", "int8 tensor", "fp8 block")]  # fmt: skip
    for act in ACTS:
        first += [Cell("float", w, act=act) for w in WIDE]
        first += [Cell("float", w, act=act, sizes=LARGE, rows=(3, 16, 64, 100, 192, 300))
                  for w in WIDE]  # fmt: skip
    first += [Cell("float", w, sizes=NARROW) for w in WIDE]
    rest = [w for w in WEIGHTS if w not in WIDE]
    then += [Cell("float", w, rows=()) for w in rest]
    then += [Cell("float", w, act="float16", rows=()) for w in rest[::3]]
    for at, (w, a) in enumerate(PAIRS):
        first.append(Cell("rounded", w, a))
        first.append(Cell("rounded", w, a, sizes=EVEN, kernels=EIGHT_BIT))
        if at % 4 == 0 or w.startswith("fp8"):
            then.append(Cell("rounded", w, a, "float16", EVEN, kernels=EIGHT_BIT))
    first += [Cell("rounded", w, a, sizes=(2176, 1280), rows=(16, 64, 100, 300), kernels=EIGHT_BIT)
              for w, a in PAIRS if a in ("fp8 token", "int8 token", "fp8 g128")]  # fmt: skip
    every = [c for c in (*first, *then) if c.part in parts]
    return [replace(c, kernels=kernels) for c in every] if kernels else every


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of the rows about one kernel and layer."""
    keys = ("part", "kernel", "weight", "inputs", "act", "gather")
    return list({(*(r.get(k) for k in keys), str(r.get("sizes"))): r for r in rows}.values())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Per kernel and type of x: cases, worst errors, how many are over the bound, what is wrong."""
    held: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        if "kernel" in r:
            held.setdefault((r["part"], r["kernel"], r.get("act", "")), []).append(r)
    lines = ["| part | kernel | x | kinds | cases | worst | with rounded weights | over | wrong |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (part, kernel, act), of in sorted(held.items()):
        cases, over = (sum(r.get(key, 0) for r in of) for key in ("cases", "over"))
        worst, likewise = (max(r.get(key, 0.0) for r in of) for key in ("worst", "likewise"))
        wrong = sum(bool(r["bad"]) for r in of)
        lines.append(f"| {part} | {kernel} | {act} | {len(of)} | {cases} | {worst:.2e} | "
                     f"{likewise:.2e} | {over} | {wrong} |")  # fmt: skip
    return lines


def main() -> int:
    """Deal the cells to workers; 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(WORK))
    parser.add_argument("--kernels", default="", help="names, joined by commas; all that accept")
    parser.add_argument(
        "--only", default="", help="weights and inputs whose names hold one of these"
    )
    parser.add_argument("--acts", default=",".join(ACTS))
    parser.add_argument("--rows", default="", help="numbers of rows in place of all")
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--share", default="0/1", help="i/n: every n-th cell, from cell i")
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--silent", type=float, default=90, help="seconds after which one hangs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--but", type=Path, nargs="*", default=[], help="results to go on from")
    parser.add_argument(
        "--show", type=Path, nargs="*", default=[], help="results to print, the last count"
    )
    parser.add_argument("--inline", action="store_true", help="in this process, for sanitizers")
    a = parser.parse_args()
    if a.show:
        held = latest(r for path in a.show for r in json.loads(path.read_text()))
        print("\n".join(table(held)))
        for r in held:
            if r.get("bad"):
                where = {k: v for k, v in r.items() if k not in ("bad", "cases", "over")}
                print("WRONG", where, r["bad"][:4])
        return 0
    end, began = time.monotonic() + a.seconds, time.time()
    part, parts = map(int, a.share.split("/"))
    every = cells(a.parts.split(","), tuple(filter(None, a.kernels.split(","))))[part::parts]
    every = [c for c in every if any(o in f"{c.weight} {c.inputs}" for o in a.only.split(","))]
    every = [c for c in every if c.act in (*a.acts.split(","), "float32")]
    before = {r.get("done") for path in a.but for r in json.loads(path.read_text())}
    every = [c for c in every if str(c) not in before]
    if a.rows:
        every = [replace(c, rows=tuple(map(int, a.rows.split(",")))) for c in every]
    rows: list[dict[str, Any]] = []
    lock = threading.Lock()

    def told(cell: Cell, row: Any) -> None:
        if isinstance(row, Broken):
            row = {"part": cell.part, "kernel": "?", "weight": cell.weight, "bad": [row.why],
                   "cell": str(cell)}  # fmt: skip
        with lock:
            rows.append(row)
            if row.get("bad"):
                where = {k: v for k, v in row.items() if k not in ("bad", "cases", "over")}
                print("WRONG", where, row["bad"][:4], flush=True)
            if a.json and len(rows) % 50 == 0:
                a.json.write_text(json.dumps(rows))

    def serve(mine: list[Cell]) -> None:
        for cell, row in watched(work, mine, end, a.device, silent_s=a.silent):
            told(cell, row)

    if a.inline:
        for cell in every:
            work(cell, lambda row, cell=cell: told(cell, row), end, a.device)
    else:
        threads = [threading.Thread(target=serve, args=(every[i :: a.workers],))
                   for i in range(min(a.workers, len(every)))]  # fmt: skip
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    if a.json:
        a.json.write_text(json.dumps(rows))
    late = sum("late" in r for r in rows)
    print("\n".join(table(rows)))
    print(f"{len(every)} cells, {late} not begun in time, {time.time() - began:.0f} s")
    return int(any(r.get("bad") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
