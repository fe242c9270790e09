"""The Triton and Gluon kernels on a GPU: are they right, how fast are they, and the cost table.

    python benchmarks/gpu_kernels_triton.py --check --speed --out DIR

``--check`` compares every kernel with a float64 product over specs, rows, tails and dtypes, in
several processes (most of the time is compiling). ``--speed`` times calls in CUDA graphs whose
weights rotate through copies larger than the L2 cache, launch gap included, medians, all kernels
and torch's 16-bit matmul interleaved in one run. ``--table`` turns speeds into the cost table that
the package ships. The packages need not be installed: their sources are put on the path.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TESTS = ROOT / "plugins/kernels_triton/tests/support"
for _p in (ROOT / "core/src", ROOT / "plugins/kernels_triton/src", _TESTS):
    sys.path.insert(0, str(_p))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.dequantize import dense_weight, dequantize  # noqa: E402
from quant_core.kernels import tiles  # noqa: E402
from quant_core.kernels.base import Rejected  # noqa: E402
from quant_core.spec import OpSpec  # noqa: E402
from quant_kernels_triton.costs import class_of  # noqa: E402
from quant_kernels_triton.gluon_plan import (  # noqa: E402
    SMS,
    WAYS,
    Ring,
    Specialized,
    config,
    plan,
    stages,
)
from quant_kernels_triton.recipe import describe  # noqa: E402
from quant_kernels_triton.wna16 import Dense, GluonTiles, PlainTriton  # noqa: E402
from triton_made import SPECS, make_layer, make_op  # noqa: E402

ROWS = (1, 2, 7, 16, 17, 33, 64, 100, 256, 1000)
BOUND = {"bfloat16": 2.2e-3, "float16": 4.5e-4}
LOOSE = {"bfloat16": 4.3e-3, "float16": 5.4e-4}  # where weights are rounded to the type of x too
L2_BYTES = 150e6
_IN_GRAPH = 20  # calls
DEVICE = ("cuda", "9.0")


def error(y: Tensor, want: Tensor) -> float:
    """Relative Frobenius norm; infinity where y has NaN."""
    e = ((y.double() - want).norm() / want.norm()).item()
    return e if math.isfinite(e) else math.inf


# ----------------------------------------------------------------------------------- are they right


def _loaded(name: str, act: str) -> tuple[OpSpec, list[Tensor], Tensor, Tensor]:
    """Operation, buffers, float64 weights and bias of a layer with tails everywhere."""
    n, k = 200, 544
    lt = make_layer(SPECS[name], n, k, bias=True)
    op = make_op(SPECS[name], n, k, act=act, bias=True, device=DEVICE)
    buffers = tiles.allocate(op, "cuda")
    tiles.load_(buffers, op, lt, {"row": 0})
    w = dense_weight(lt.weight, k).double().cuda()
    return op, list(buffers.values()), w, lt.bias.double().cuda()


def check_kernels(name: str, act: str) -> list[dict[str, object]]:
    """All kernels on one spec: errors, graph replay, repeatability."""
    out: list[dict[str, object]] = []
    op, values, w, bias = _loaded(name, act)
    for kernel in (GluonTiles(), PlainTriton(), Dense()):
        answer = kernel.accepts(op)
        if isinstance(answer, Rejected):
            out.append({"kernel": kernel.name, "spec": name, "act": act, "rejected": str(answer)})
            continue
        found = _compare(kernel.bind(op), values, w, bias, act, ROWS)
        out.append({"kernel": kernel.name, "spec": name, "act": act} | found)
    return out


def check_ways(name: str, act: str, part: int, parts: int) -> list[dict[str, object]]:
    """Block sizes of ``gluon_ws``, in shares that run over the ends of tiles."""
    from quant_kernels_triton.gluon_run import run_config

    op, values, w, bias = _loaded(name, act)
    recipe, out = describe(op, ops=("linear",)), list[dict[str, object]]()
    p = plan(recipe)
    if isinstance(p, Rejected):
        return out
    some = [way for way, _ in WAYS if (p.spg == 1 and p.mode in (1, 2)) or not way.acc]
    for way in some[part::parts]:
        c = replace(way, programs=7)
        run = lambda v, x, c=c: run_config(recipe, x, v, c)  # noqa: E731
        found = _compare(run, values, w, bias, act, (33, 300))
        out.append({"kernel": "gluon_ws", "spec": name, "act": act, "way": str(c)} | found)
    return out


def _compare(
    run: Callable[..., Tensor], values: list[Tensor], w: Tensor, bias: Tensor, act: str,
    rows: tuple[int, ...],
) -> dict[str, object]:  # fmt: skip
    """The worst error, and the numbers of rows with a larger one or other bits in a replay.

    The bound is held against exact weights, or against those rounded to the type of x.
    """
    worst, bad, (n, k) = 0.0, [], w.shape
    rounded = w.to(getattr(torch, act)).double()
    for m in rows:
        try:
            x = torch.randn(m, k, device="cuda").to(getattr(torch, act))
            y = run(values, x)
            e = error(y, x.double() @ w.t() + bias)
            likewise = error(y, x.double() @ rounded.t() + bias)
            same = torch.equal(y, run(values, x))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                z = run(values, x)
            z.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            worst = max(worst, e)
            noise = 1 + 2 / math.sqrt(m * n)  # of a norm over few outputs
            fine = min(e, likewise) <= BOUND[act] * noise and e <= LOOSE[act] * noise
            if not (fine and same and torch.equal(y, z)):
                bad.append((m, f"{e:.2e} {likewise:.2e}", same, torch.equal(y, z)))
        except Exception as err:  # a benchmark goes on and reports it
            bad.append((m, repr(err)[:300]))
    return {"worst": worst, "bad": bad}


Job = tuple[str, str, int]
"""Spec, type of x, part of the block sizes of gluon_ws; -1: the kernels as they are picked."""


def _check(job: Job) -> list[dict[str, object]]:
    torch.manual_seed(0)
    try:
        name, act, part = job
        return check_kernels(name, act) if part < 0 else check_ways(name, act, part, _PARTS)
    except Exception as err:  # all are run
        return [{"job": job, "bad": repr(err)[:400]}]


_PARTS = 3


def check(out: Path, workers: int, specs: list[str], seconds: float) -> None:
    """All specs, dealt to processes as these become free, and a table of what is not right."""
    parts = (-1, *range(_PARTS))
    jobs: list[Job] = [(n, a, i) for a in BOUND for n in specs for i in parts]
    end, rows = time.time() + seconds, []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for job, result in [(job, pool.apply_async(_check, (job,))) for job in jobs]:
            try:
                rows += result.get(timeout=max(0.1, end - time.time()))
            except multiprocessing.TimeoutError:
                rows.append({"job": job, "late": True})
            (out / "check.json").write_text(json.dumps(rows))
        pool.terminate()
    late = [r["job"] for r in rows if "late" in r]
    for name in ("gluon_wna16", "gluon_ws", "triton_wna16", "triton_dense"):
        ran = [r for r in rows if r.get("kernel") == name and "worst" in r]
        worst = {a: max([r["worst"] for r in ran if r["act"] == a], default=0) for a in BOUND}
        print(f"CHECK {name}: {len(ran)} specs and block sizes, worst {worst}")
    for r in rows:
        if r.get("bad"):
            print("WRONG", r)
    print(f"{len(jobs)} jobs, not done in {seconds:.0f} s: {len(late)} {late[:4]}")
    refused = {(r["kernel"], r["spec"]): r["rejected"] for r in rows if "rejected" in r}
    for key, why in refused.items():
        print("REFUSED", *key, why)


# -------------------------------------------------------------------------------- how fast are they


def graph_us(calls: list[Callable[[], Tensor]], repeats: int = 5) -> float:
    """Median microseconds of a call, the calls replayed one after another in a CUDA graph."""
    calls = calls * -(-_IN_GRAPH // len(calls))  # so that starting the graph does not count
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        graph.replay()
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def layer(spec: str, n: int, k: int, copies: int) -> tuple[object, list[list[Tensor]], Tensor]:
    """Op, several copies of the buffers, and the dense weight of a random layer on the device."""
    small = make_layer(SPECS[spec], 64, k)
    op = make_op(SPECS[spec], n, k, act="bfloat16", device=DEVICE)
    buffers = tiles.allocate(op, "cuda")
    for name, t in buffers.items():  # 64 rows repeated: random enough for the tensor cores
        part = tiles.allocate(make_op(SPECS[spec], 64, k, act="bfloat16"), "cpu")
        tiles.load_(part, make_op(SPECS[spec], 64, k, act="bfloat16"), small, {"row": 0})
        held = part[name].cuda()
        if held.shape == t.shape:
            t.copy_(held)
        else:
            times = -(-t.shape[0] // held.shape[0])
            t.copy_(torch.cat([held] * times)[: t.shape[0]])
    w = dequantize(small.weight).cuda().bfloat16()
    w = torch.cat([w] * -(-n // 64))[:n].contiguous()
    return op, [[t.clone() for t in buffers.values()] for _ in range(copies)], w


def candidates(p: object, recipe: object, m: int) -> list[Ring | Specialized]:
    """Block sizes worth timing for m rows; the shipped choice first."""
    first = config(p, recipe, m)
    sums = p.spg == 1 and p.mode in (1, 2)
    if m <= 64:
        bm = 16 if m <= 16 else 32 if m <= 32 else 64
        acc = sums and bm <= 32
        more = [Ring(bm, w, 4, s, acc) for w in (4, 8) for s in (1, 2, 4)]
        more += [Ring(64, 8, 4, 1, True), Ring(32, 4, 4, 4, True)] if sums and bm == 64 else []
    else:
        more = [c for c, _ in WAYS if (sums or not c.acc) and -m % c.bm <= m // 3]
        more = [replace(c, stages=stages(p, c)) for c in more]
        more += [replace(c, programs=SMS) for c in more]
        more += [Ring(64, 4, 4, 2, False), Ring(64, 4, 4, 1, False)] if m <= 128 else []
    return [first, *(c for c in more if c != first)]


def speed_of(
    spec: str, k: int, n: int, rows: tuple[int, ...], tune: bool, other: bool
) -> list[dict]:
    """Microseconds of one layer: block sizes, the other kernels, torch's matmul."""
    size = n * k * SPECS[spec].element.bits / 8
    copies = max(2, min(20, math.ceil(L2_BYTES / size)))
    op, held, w = layer(spec, n, k, copies)
    recipe = describe(op, ops=("linear",))
    dense = [w.clone() for _ in range(max(2, math.ceil(L2_BYTES / w.nbytes)))]
    out = []
    for m in rows:
        row = {"spec": spec, "class": class_of(recipe), "bits": recipe.bits, "k": k, "n": n, "m": m}
        row |= _speed_at(m, op, recipe, held if m <= 128 else held[:3], dense, tune, other)
        out.append(row)
        found, gluon = row["found"], row["gluon"]
        best = min(found[:gluon], key=lambda f: f[1], default=("-", 0, 0))
        rest = " ".join(f"{f[0]} {f[1]:.1f}" for f in found[gluon:])
        print(
            f"SPEED {spec:20} K{k} N{n} M{m:<5} torch {row['torch']:.1f} chosen {row['chosen']} "
            f"best {best[0]} {best[1]:.1f} err {best[2]:.1e} {rest}",
            flush=True,
        )
    return out


def _speed_at(
    m: int, op: object, recipe: object, held: list, dense: list[Tensor], tune: bool, other: bool
) -> dict:
    from quant_kernels_triton.gluon_run import run_config

    x = torch.randn(m, dense[0].shape[1], device="cuda").bfloat16()
    want = x.double() @ dense[0].double().t()
    p = plan(recipe)
    every = [] if isinstance(p, Rejected) else candidates(p, recipe, m)
    plain, expanded = PlainTriton().bind(op), Dense().bind(op)
    calls = [
        (str(c), lambda v, c=c: run_config(recipe, x, v, c)) for c in every[: None if tune else 1]
    ]
    if tune and m > 64 and every and m % every[0].bm:  # are rows beyond x free to fetch?
        rest = -m % every[0].bm
        padded = lambda v: run_config(recipe, F.pad(x, (0, 0, 0, rest)), v, every[0])[:m]  # noqa: E731
        calls.append((f"padded {every[0]}", padded))
    gluon = len(calls)
    if other:
        calls.append(("triton_wna16", lambda v: plain(v, x)))
    if other and m >= 64:
        calls.append(("triton_dense", lambda v: expanded(v, x)))
    found = []
    for name, call in calls:
        try:
            e = error(call(held[0]), want)
            us = graph_us([lambda v=v, call=call: call(v) for v in held])
            found.append((name, round(us, 2), e))
        except Exception as err:
            print("FAIL", m, name, repr(err)[:300], flush=True)
            found.append((name, math.inf, math.inf))
    torch_us = round(graph_us([lambda v=v: F.linear(x, v) for v in dense]), 2)
    return {
        "torch": torch_us,
        "found": found,
        "gluon": gluon,
        "chosen": found[0][1] if gluon else None,
    }


def host_us(spec: str = "uint4 g128 f16", n: int = 4096, k: int = 4096, m: int = 32) -> float:
    """Microseconds of processor time of an eager call, the device kept busy meanwhile."""
    op, held, _ = layer(spec, n, k, 1)
    run, x = GluonTiles().bind(op), torch.randn(m, k, device="cuda").bfloat16()
    for _ in range(20):
        run(held[0], x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        run(held[0], x)
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / 200 * 1e6


SHAPES = ((4096, 4096), (4096, 28672), (14336, 4096), (5120, 13824), (2048, 11008))
OTHER_SPECS = ("uint4 g32 bf16 code", "mxfp4", "nvfp4", "int8 channel", "fp8 channel", "fp8 block")


def speed(out: Path, seconds: float) -> None:
    """All speeds, the most telling first, until the time is up."""
    end, rows = time.time() + seconds, []
    all_rows = (16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096)
    some = (16, 64, 128, 256, 1024)
    int4 = "uint4 g128 bf16"
    plan_: list[tuple] = [(int4, k, n, all_rows, True, True) for k, n in SHAPES[:2]]
    plan_ += [(s, 4096, 28672, some, False, s == "mxfp4") for s in OTHER_SPECS]
    plan_ += [(int4, k, n, all_rows, False, False) for k, n in SHAPES[2:]]
    plan_ += [(s, 4096, 4096, some, False, s in ("nvfp4", "fp8 channel")) for s in OTHER_SPECS]
    plan_ += [("uint3 g128", 4096, 4096, (1, 16, 64, 256), False, True)]
    for job in plan_:
        if time.time() > end:
            print("TIME UP before", job[:3])
            break
        try:
            rows += speed_of(*job)
        except Exception as err:
            print("FAIL", job[:3], repr(err)[:400], flush=True)
        (out / "speed.json").write_text(json.dumps(rows))
    print(f"HOST {host_us():.1f} us an eager call")


def table(out: Path) -> None:
    """The shipped cost table, from speed.json."""
    rows = json.loads((out / "speed.json").read_text())
    held: dict[tuple, list[list[float]]] = {}
    for r in rows:
        at = (r["class"], r["bits"], r["k"], r["n"])
        if r["chosen"] is not None:
            held.setdefault(("gluon_wna16", *at), []).append([r["m"], round(r["chosen"], 2)])
        for name, us, _ in r["found"]:
            if name.startswith("triton_"):
                held.setdefault((name, *at), []).append([r["m"], round(us, 2)])
    keys = ("kernel", "class", "bits", "k", "n")
    entries = [dict(zip(keys, at), us=sorted(us)) for at, us in sorted(held.items())]
    made = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "entries": entries}
    (out / "table.json").write_text(json.dumps(made, indent=1) + "\n")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--speed", action="store_true")
    ap.add_argument("--table", action="store_true")
    ap.add_argument("--seconds", type=float, default=90)
    ap.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    ap.add_argument("--specs", default="", help="of the check: those whose names hold one of these")
    ap.add_argument("--out", type=Path, default=Path("out"))
    a = ap.parse_args()
    torch.manual_seed(0)
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if a.check:
        specs = [n for n in SPECS if any(o in n for o in a.specs.split(","))]
        check(a.out, a.workers, specs, a.seconds)
        print(f"check took {time.time() - start:.0f} s", flush=True)
    if a.speed:
        speed(a.out, a.seconds)
    if a.table:
        table(a.out)


if __name__ == "__main__":
    main()
