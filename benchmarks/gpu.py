"""Every installed kernel and its peers side by side on one GPU, in one interleaved run.

    python benchmarks/gpu.py --shapes 4096x4096,4096x28672 --schemes int4,fp8 --rows 1,16,256 \
        --warm 14 --json out.json --markdown out.md

SHAPES are KxN (in_features x out_features) or names of stacks of experts, SCHEMES those of
``gpu_layers``. Per shape, scheme and number of rows (tokens, for experts) all kernels that accept
the operation run on cold weights, interleaved in one process with the peers of ``gpu_peers``. The
error is that of up to 64 rows against a float64 product of the canonical weights with the
activations as the scheme rounds them. ``chosen`` marks what the plan picks; ``graph`` says whether
a graph's replay equals the eager call bit for bit. ``--warm`` compiles everything first, in as
many processes. ``gpu_report.py`` makes tables and pictures of the JSON.

What more rows cannot bring back is dropped for the rest of its scheme and shape: 10 times behind,
or from 64 rows on 3 times and growing with the rows. The plan's pick and bf16 never are. Nothing is
timed where the deadline has passed; what was left out is listed. The process that measures is begun
anew where a kernel hangs or breaks it, and the layer repeated without that one.

``--gpus N`` deals the shapes out to N GPUs of one machine, a process each: what is compared with
one another, the schemes of a shape and their peers, stays on one GPU in one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from source_tree import use

use()

import torch  # noqa: E402
from gpu_goals import table  # noqa: E402
from gpu_layers import EXPERTS, SCHEMES  # noqa: E402
from gpu_measure import Bench, compile_cell, measure_cell, problem  # noqa: E402
from gpu_report import markdown  # noqa: E402
from gpu_watch import Broken, watched  # noqa: E402

from quant_core.kernels.measured import save  # noqa: E402

DEFAULT_SHAPES = "4096x28672,4096x4096,14336x4096,3584x18944,5120x13824"
DEFAULT_ROWS = "1,4,16,64,256,1024,4096"  # of int4 more
LAST = ("int4-g32", "mxfp8", "w4a8-int8")  # at two shapes only, if time is left
SILENT_S = 45.0  # longer than any one kernel takes to load and compile
WARM_S = 120.0  # for compiling all

Cell = tuple[str, str, frozenset[str]]


class Found:
    """What came out, written after every point of a run that may be cut short."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.problems: list[dict[str, str]] = []
        self.costs: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.device: tuple[str, str] = ("cuda", "")

    def take(self, message: dict[str, Any]) -> None:
        if "point" in message:
            self.records.append(message["point"])
        elif "problem" in message:
            self.problems.append(message["problem"])
            print("PROBLEM {where}: {error}".format(**message["problem"]), flush=True)
        elif "costs" in message:
            self.costs |= message["costs"]
            self.device = message["device"]

    def data(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "cuda": torch.version.cuda, **_installed("triton", "humming-kernels")},
            "date": time.strftime("%Y-%m-%d"),
            "seconds": self.seconds,
            "records": self.records,
            "problems": self.problems,
        }  # fmt: skip

    def write(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.data()))


def _installed(*names: str) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def warm(processes: int, cells: list[Cell], bench: Bench, found: Found) -> None:
    """Compile for all cells in ``processes`` processes."""
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = {(a, b): pool.apply_async(compile_cell, (a, b, bench)) for a, b, _ in cells}
        for (shape, scheme), job in jobs.items():
            try:
                for message in job.get(max(0.1, start + WARM_S - time.monotonic())):
                    found.take(message)
            except Exception as err:
                found.take(problem(f"{shape} {scheme}: compile", err))
        pool.terminate()
    found.seconds["compile"] = time.monotonic() - start


def run(cells: list[Cell], bench: Bench, found: Found) -> list[Cell]:
    """Measure; the cells to repeat, less whom each broke at."""
    trying, again, at = "", [], None
    for cell, message in watched(measure_cell, cells, bench, silent_s=SILENT_S):
        if cell != at:
            at = cell
            found.write()
        if isinstance(message, Broken):
            shape, scheme, skip = cell
            found.take(problem(f"{trying} {shape} {scheme}", message.why))
            again.append((shape, scheme, skip | {trying.partition(":")[0]}))
        elif "trying" in message:
            trying = message["trying"]
        else:
            found.take(message)
    return again


def _cells(shapes: str, schemes: str, stacks: str) -> list[Cell]:
    """(shape, scheme, whom to skip); what may be cut off comes last."""
    asked = schemes.split(",") if schemes else [s for s in SCHEMES if s not in LAST]
    names = [shape for shape in shapes.split(",") if shape]
    experts = [(e, s) for e in EXPERTS for s in stacks.split(",") if s]
    cells = [(shape, s) for s in asked[:1] for shape in names]
    cells += [(shape, s) for shape in names[:3] for s in asked[1:]] + experts
    cells += [(shape, s) for shape in names[3:] for s in asked[1:]]
    cells += [(shape, s) for shape in names[:2] for s in (() if schemes else LAST)]
    return [(shape, scheme, frozenset()) for shape, scheme in cells]


def _work(cells: Sequence[Cell], shape: str) -> float:
    """About how long a shape takes: its schemes, each a constant and its largest products."""
    sizes = EXPERTS[shape][2:] if shape in EXPERTS else tuple(map(int, shape.split("x")))
    return sum(c[0] == shape for c in cells) * (1.0 + sizes[0] * sizes[1] / 6e7)


def deal(cells: Sequence[Cell], gpus: int) -> list[list[str]]:
    """The shapes for each of ``gpus`` GPUs, the longest dealt out first to who has least."""
    hands: list[tuple[float, list[str]]] = [(0.0, []) for _ in range(gpus)]
    shapes = dict.fromkeys(shape for shape, _, _ in cells)
    for shape in sorted(shapes, key=lambda s: -_work(cells, s)):
        least = min(range(gpus), key=lambda i: hands[i][0])
        hands[least] = (hands[least][0] + _work(cells, shape), [*hands[least][1], shape])
    return [hand for _, hand in hands if hand]


def spread(args: argparse.Namespace, cells: Sequence[Cell]) -> int:
    """Run this program once a GPU and put together what they found; 1 if anything failed."""
    hands = deal(cells, args.gpus)
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{i}.json" for i in range(len(hands))]
        runs = []
        for i, (hand, part) in enumerate(zip(hands, parts, strict=True)):
            print(f"GPU {i}: {', '.join(hand)}", flush=True)
            more = ["--gpus", "1", "--part", ",".join(hand), "--json", str(part)]
            more += ["--markdown", os.devnull]
            runs.append(
                subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:], *more],
                    env=os.environ | {"CUDA_VISIBLE_DEVICES": _visible(i)},
                )
            )
        codes = [run.wait() for run in runs]
        found = [json.loads(part.read_text()) for part in parts if part.exists()]
    data = merged(found, [shape for shape, _, _ in cells])
    if args.json:
        args.json.write_text(json.dumps(data))
    if args.markdown:
        args.markdown.write_text(markdown(data))
    print(table(data["records"]))
    print(data["seconds"])
    return int(any(codes) or len(found) < len(hands))


def _visible(i: int) -> str:
    """The i-th of the GPUs that this process may use."""
    mine = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    return mine[i] if mine else str(i)


def merged(found: Sequence[dict[str, Any]], shapes: Sequence[str]) -> dict[str, Any]:
    """One result of several parts, the records in the order of ``shapes``."""
    if not found:
        raise SystemExit("no part left a result")
    if len({part["device"] for part in found}) > 1:
        raise SystemExit(f"GPUs of several kinds: {sorted({part['device'] for part in found})}")
    at = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
    records = [r for part in found for r in part["records"]]
    schemes = list(dict.fromkeys(r["scheme"] for r in records))
    records.sort(key=lambda r: (schemes.index(r["scheme"]), at[r["shape"]]))
    names = dict.fromkeys(name for part in found for name in part["seconds"])
    return found[0] | {
        "gpus": len(found),
        "seconds": {n: max(part["seconds"].get(n, 0.0) for part in found) for n in names},
        "records": records,
        "problems": [p for part in found for p in part["problems"]],
    }


def main() -> int:
    """Measure; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--schemes", default="", help="default: all, some at two shapes only")
    parser.add_argument("--experts", default="", help="schemes to measure of stacks of experts")
    parser.add_argument("--rows", default=DEFAULT_ROWS)
    parser.add_argument("--kernels", default="", help="only these, without peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", type=int, default=0, help="processes that compile first")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--save", action="store_true", help="keep the times for later choices")
    parser.add_argument("--gpus", type=int, default=1, help="deal the shapes out to so many GPUs")
    parser.add_argument("--part", default="", help="only these of the shapes and stacks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    cells = _cells(args.shapes, args.schemes, args.experts)
    if args.part:
        cells = [cell for cell in cells if cell[0] in args.part.split(",")]
    if args.gpus > 1:
        if args.save:
            parser.error("--save keeps the times of one GPU's run: leave out --gpus")
        return spread(args, cells)
    bench = Bench(
        rows=tuple(int(m) for m in args.rows.split(",")),
        deadline=time.monotonic() + args.seconds,
        only=frozenset(n for n in args.kernels.split(",") if n),
        rounds=args.rounds,
        more=args.rows == DEFAULT_ROWS,
    )
    found = Found(args.json)
    if args.warm:
        warm(args.warm, cells, replace(bench, deadline=float("inf")), found)
    start = time.monotonic()
    again = run(cells, bench, found)
    if again:
        have = {(r["shape"], r["scheme"], r["rows"]) for r in found.records}
        first, found.records = found.records, []
        run(again, bench, found)
        found.records = first + [
            r for r in found.records if (r["shape"], r["scheme"], r["rows"]) not in have
        ]
    found.seconds["measure"] = time.monotonic() - start
    found.write()
    if args.save:
        save(found.device, found.costs)
    if args.markdown:
        args.markdown.write_text(markdown(found.data()))
    print(table(found.records))
    print({name: round(s) for name, s in found.seconds.items()})
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
