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

What more rows cannot bring back is dropped for the rest of its scheme and shape: 50 times behind,
or from 64 rows on 25 times, or 3 times and growing with the rows. The plan's pick and bf16 never
are. Nothing is timed where the deadline has passed; what was left out is listed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from source_tree import use

use()
os.environ.setdefault("QUANT_MEASURED", "off")  # the plan picks by what is shipped

import torch  # noqa: E402
from gpu_goals import table  # noqa: E402
from gpu_layers import EXPERTS, SCHEMES, Case, make_case  # noqa: E402
from gpu_peers import BASE, BOUNDS, PEERS, over, peers  # noqa: E402
from gpu_report import markdown  # noqa: E402

from quant_core.kernels.choose import accepting, choose  # noqa: E402
from quant_core.kernels.measured import op_key, save  # noqa: E402
from quant_core.kernels.timing import captured, copies_for, host_us, interleaved  # noqa: E402
from quant_core.registry import registry  # noqa: E402

DEFAULT_SHAPES = "4096x4096,4096x28672,14336x4096,5120x13824,3584x18944"
DEFAULT_ROWS = "1,2,4,8,16,32,64,128,256,1024,4096"
BETWEEN = {"int4": (96, 192, 512)}  # rows between the blocks of kernels, measured of this too
LAST = ("int4-g32", "mxfp8", "w4a8-int8")  # at two shapes only, if time is left
HOST_ROWS = (1, 64)  # where the host's part of an eager call is timed,
HOST_MOST_US = 300.0  # of those that do not wait for the GPU
NOT_HERE = ("torch_ref", "humming")  # the oracle; and a peer that gpu_peers makes


@dataclass
class Bench:
    """What is measured in this run, and what came out."""

    rows: list[int]
    deadline: float
    only: set[str]
    rounds: int = 7
    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)
    costs: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    device: tuple[str, str] = ("cuda", "")

    def rows_of(self, scheme: str, experts: int) -> list[int]:
        more = BETWEEN.get(scheme, ()) if len(self.rows) > 8 and not experts else ()
        return sorted({*self.rows, *more})

    def failed(self, where: str, err: Exception) -> None:
        self.told(where, f"{type(err).__name__}: {str(err)[:600]}")

    def told(self, where: str, text: str) -> None:
        self.problems.append({"where": where, "error": text})
        print(f"PROBLEM {where}: {text}", flush=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass
class Contestant:
    """A kernel of the registry, loaded."""

    said: Any
    run: Any
    sets: list[list[torch.Tensor]]
    nbytes: int


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``want`` (float64)."""
    return float((y.double() - want).norm() / want.norm())


def contestants(case: Case, bench: Bench, *, cold: bool) -> dict[str, Contestant]:
    """Kernels that accept the operation; ``cold``: with copies enough to come from memory."""
    found: dict[str, Contestant] = {}
    for kernel, op, said in accepting(case.op, registry()):
        if kernel.name in NOT_HERE or (bench.only and kernel.name not in bench.only):
            continue
        try:
            first = case.load(kernel, op)
            nbytes = sum(t.numel() * t.element_size() for t in first.values())
            more = copies_for(nbytes) - 1 if cold and not case.experts else 0
            sets = [first, *({n: t.clone() for n, t in first.items()} for _ in range(more))]
            values = [list(s.values()) for s in sets]
            found[kernel.name] = Contestant(said, kernel.bind(op), values, nbytes)
        except Exception as err:
            bench.failed(f"{kernel.name} {case.shape} {case.scheme}: load", err)
    return found


def _winner(choice: Any, rows: int) -> str:
    for bucket in choice.buckets:
        if rows <= bucket.rows:
            return str(bucket.kernel)
    return str(choice.kernel.name)


def _hopeless(times: dict[str, float], m: int, before: dict[str, tuple[int, float]]) -> set[str]:
    """Contestants that more rows cannot bring back: far behind, or behind and growing with M."""
    best, out = min(times.values()), set()
    for name, us in times.items():
        rows, last = before.get(name, (m, us))
        grows = us / last > 0.5 * m / rows
        if us > 50 * best or (m >= 64 and (us > 25 * best or (us > 3 * best and grows))):
            out.add(name)
    return out


def measure(bench: Bench, shape: str, scheme: str) -> None:
    """All contestants of one shape and scheme for every number of rows."""
    case = make_case(scheme, shape)
    found = contestants(case, bench, cold=True)
    rivals = {} if bench.only else peers(case, bench.failed)
    choice = choose(case.op, registry())
    bench.device = case.op.device
    costs = bench.costs.setdefault(op_key(case.op), {})
    before: dict[str, tuple[int, float]] = {}
    dropped: set[str] = set()
    for m in bench.rows_of(scheme, case.experts):
        if bench.left() < 5:
            return bench.told(f"{shape} {scheme} from {m} rows", "out of time")
        inputs, rows = case.inputs(m), m * case.top
        want, calls = case.wanted(inputs[0]), {}
        for name, c in found.items():
            if c.said.cost_at(rows) < math.inf and name not in dropped:
                calls[name] = over(c.sets, c.run)
        for name, made in rivals.items():
            if name not in dropped:
                calls[name] = made
        graphs, facts, hosts = {}, {}, {}
        for name, made in calls.items():
            try:
                thunks = made(inputs)
                eager = thunks[0]()
                graph, outputs = captured(thunks)
                for out in outputs:
                    out.fill_(float("nan"))
                graph.replay()
                torch.cuda.synchronize()
                compared = name not in ("torch int4", *BOUNDS)
                facts[name] = {
                    "graph": bool(torch.equal(outputs[0], eager)),
                    "error": relative_error(eager[:64], want) if compared else None,
                    "host_us": None,
                }
                graphs[name] = (graph, len(thunks))
                if m in HOST_ROWS:
                    hosts[name] = thunks[0]
            except Exception as err:
                bench.failed(f"{name} {shape} {scheme} M={m}", err)
                torch.cuda.synchronize()
        times = interleaved(graphs, rounds=bench.rounds)
        if not times:
            continue
        for name in hosts:
            if times[name] < HOST_MOST_US:
                facts[name]["host_us"] = host_us(hosts[name], 60)
        chosen = _winner(choice, rows)
        dropped |= _hopeless(times, m, before) - {chosen, BASE}
        before = {name: (m, us) for name, us in times.items()}
        for name, us in times.items():
            bench.records.append(
                {"shape": shape, "scheme": scheme, "rows": m, "who": name, "us": us,
                 "chosen": name == chosen, "peer": name in PEERS, "bound": name in BOUNDS,
                 "exact": name not in found or found[name].said.exact,
                 "bytes": found[name].nbytes if name in found else None, **facts[name]}
            )  # fmt: skip
            if name in found:
                costs.setdefault(name, []).append([rows, us])
        line = ", ".join(f"{w}{'*' if w == chosen else ''} {t:.1f}" for w, t in times.items())
        print(f"{bench.left():.0f} s left, {shape} {scheme} M={m}: {line}", flush=True)
        del graphs


def compile_all(shape: str, scheme: str, rows: list[int], only: set[str]) -> str:
    """One call of every contestant for every number of rows; in a process of its own."""
    start = time.monotonic()
    bench = Bench(rows=rows, deadline=math.inf, only=only)
    case = make_case(scheme, shape)
    ready = contestants(case, bench, cold=False)
    for m in bench.rows_of(scheme, case.experts):
        inputs = case.inputs(m)[0]
        for name, c in ready.items():
            if c.said.cost_at(m * case.top) < math.inf:
                try:
                    c.run(c.sets[0], *inputs)
                    torch.cuda.synchronize()
                except Exception as err:
                    bench.failed(f"{name} {shape} {scheme} M={m}: compile", err)
    return f"{shape} {scheme} {time.monotonic() - start:.0f} s"


def warm(processes: int, cells: list[tuple[str, str]], bench: Bench) -> float:
    """Compile for all cells in ``processes`` processes; the seconds it took."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = {pool.submit(compile_all, *cell, bench.rows, bench.only): cell for cell in cells}
        for job in as_completed(jobs):
            try:
                print("compiled", job.result(), flush=True)
            except Exception as err:
                bench.failed(f"{jobs[job]}: compile", err)
    return time.monotonic() - start


def _cells(shapes: str, schemes: str, stacks: str) -> list[tuple[str, str]]:
    """(shape, scheme) in the order of measuring."""
    asked = schemes.split(",") if schemes else [s for s in SCHEMES if s not in LAST]
    cells = [(shape, scheme) for shape in shapes.split(",") if shape for scheme in asked]
    cells += [(e, s) for e in EXPERTS for s in stacks.split(",") if s]
    last = () if schemes else LAST
    return cells + [(shape, s) for shape in shapes.split(",")[:2] if shape for s in last]


def main() -> int:
    """Measure; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--schemes", default="", help="default: all, some at two shapes only")
    parser.add_argument("--experts", default="", help="schemes to measure of stacks of experts")
    parser.add_argument("--rows", default=DEFAULT_ROWS)
    parser.add_argument("--kernels", default="", help="only these, without peers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", type=int, default=0, help="processes that compile first")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--save", action="store_true", help="keep the times for later choices")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    bench = Bench(
        rows=[int(m) for m in args.rows.split(",")],
        deadline=time.monotonic() + args.seconds,
        only={n for n in args.kernels.split(",") if n},
        rounds=args.rounds,
    )
    cells = _cells(args.shapes, args.schemes, args.experts)
    seconds = {"compile": warm(args.warm, cells, bench) if args.warm else 0.0}
    start = time.monotonic()
    for shape, scheme in cells:
        if bench.left() < 10:
            bench.told(f"{shape} {scheme}", "out of time")
            continue
        try:
            measure(bench, shape, scheme)
        except Exception as err:
            bench.failed(f"{shape} {scheme}", err)
        gc.collect()
        torch.cuda.empty_cache()
    seconds["measure"] = time.monotonic() - start
    if args.save:
        save(bench.device, bench.costs)
    data = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda, **_installed("triton", "humming-kernels")},
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "records": bench.records,
        "problems": bench.problems,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(data))
    if args.markdown:
        args.markdown.write_text(markdown(data))
    print(table(bench.records))
    print({name: round(s) for name, s in seconds.items()})
    return int(bool(bench.problems))


def _installed(*names: str) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
