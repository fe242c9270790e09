"""The decode kernel on a CUDA device: right first, then how fast.

    python benchmarks/gpu_kernels_cuda.py [--parts correct,rules,sweep,types,host] [--out FILE]

correct   every kind of layer x dtype x rows x shape against float64 products of the oracle's
          weights; relative Frobenius error at most 2.2e-3
rules     graph replay and repetition bit for bit, Inf and NaN, zero groups, no rows, experts,
          restore from the device
sweep     all cuts of the work (schedule.py) for int4
types     microseconds per element type and shape beside torch's own bf16 and int4 products
host      time of an eager call on the host
check     a small subset, for compute-sanitizer

Timing: one CUDA graph with a call per copy of the weights, copies enough to miss the L2 cache,
median of replays. Outputs are filled with NaN first. Sources need no installation.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "core/src"), str(REPO / "plugins/kernels_cuda/src"),
                str(REPO / "plugins/kernels_cuda/tests/support")]  # fmt: skip

import torch
import torch.nn.functional as F

import cuda_cases as cases
from quant_core.dequantize import dense_weight
from quant_core.kernels import tiles
from quant_core.parts import matrices
from quant_kernels_cuda import driver, ops
from quant_kernels_cuda.compiler import compile_cached
from quant_kernels_cuda.cut import Schedule
from quant_kernels_cuda.kernel import Decode
from quant_kernels_cuda.schedule import candidates
from quant_kernels_cuda.schedule import schedule as plain_schedule
from quant_kernels_cuda.variant import Variant, describe

BOUND = 2.2e-3
ACTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
L2_ROUND = 150e6  # bytes of weights read before one is read again
REC: list[dict] = []
BAD: list[str] = []


def note(kind: str, **values: object) -> None:
    REC.append({"kind": kind, **values})


def bad(text: str) -> None:
    BAD.append(text)
    print("BAD", text, flush=True)


def variant_of(name: str, n: int, k: int, act: str) -> Variant:
    """The variant of a layer with ``k`` stored columns."""
    spec = cases.SPECS[name]
    op = cases.make_op(cases.make_layer(spec, 16, 128), k, act)
    sizes = (("n", n), ("k", cases.inputs_of(spec, k)), ("k_stored", k))
    v = describe(replace(op, sizes=sizes))
    assert isinstance(v, Variant), (name, v)
    return v


# driver.device_limits of an H100; only decides what is compiled beforehand
H100 = (132, 232448, (66, 39, 30, 22, 17, 15, 15), "90")


def _compile(code: tuple) -> str:
    try:
        compile_cached(*code, H100[3])
    except Exception as err:
        return str(err)
    return ""


def compile_all(wanted: set) -> None:
    """Fill the cache in many processes, before this one has touched the device."""
    start = time.time()
    with multiprocessing.get_context("fork").Pool(16) as pool:
        failed = [text for text in pool.map(_compile, wanted, chunksize=1) if text]
    for text in failed[:3]:
        bad(text)
    print(f"compiled {len(wanted)} variants in {time.time() - start:.1f} s", flush=True)
    note("compile", variants=len(wanted), seconds=time.time() - start)


def wanted_code(parts: list[str], names: list[str]) -> set:
    """What the parts will run, as far as it is known."""
    out = set()

    def add(name: str, act: str, n: int, k: int, m: int, sms: int = 0) -> None:
        v = variant_of(name, n, k, act)  # ``sms``: every cut for so many multiprocessors
        cuts = [s for _, s in candidates(v, min(m, 16), sms, *H100[1:3])] if sms else []
        for s in cuts or [plain_schedule(v, m, *H100[:3])]:
            out.add((s.kernel, ops._defines(v, s)))

    if "correct" in parts:
        for name, act, (n, k), m in itertools.product(names, ACTS, SHAPES, ROWS):
            add(name, act, n, k, m)
    if "check" in parts:
        for name, act, (n, k), m in itertools.product(CHECKED, ACTS, CHECK_SHAPES, (1, 9)):
            add(name, act, n, k, m)
            add("int4_g128", "bfloat16", 168, 6144, m, sms=3)
    if "types" in parts:
        for name, (n, k), m in itertools.product(TYPES, SPEED, TYPE_ROWS):
            add(name, "bfloat16", n, k, m)
    if "sweep" in parts:
        for (n, k), m in itertools.product(SWEEP, SWEEP_ROWS):
            add("int4_g128", "bfloat16", n, k, m, sms=H100[0])
    return out


def loaded(name: str, n: int, k: int, act: str, seed: int = 0):
    spec = cases.SPECS[name]
    lt = cases.make_layer(spec, n, k, seed)
    op = cases.make_op(lt, cases.inputs_of(spec, k), act)
    buffers = tiles.allocate(op, "cuda")
    tiles.load_(buffers, op, lt, {"row": 0})
    return lt, op, buffers, Decode().bind(op)


def error(y: torch.Tensor, ref: torch.Tensor) -> float:
    return float((y.double() - ref).norm() / ref.norm())


def reference(lt, x: torch.Tensor, k_in: int) -> torch.Tensor:
    w = dense_weight(lt.weight, k_in).to(x.device).double()
    ref = x.double() @ w.T
    return ref if lt.bias is None else ref + lt.bias.to(x.device).double()


SHAPES = [(80, 416), (208, 4096), (72, 14336)]
ROWS = (1, 2, 7, 16, 33)
CHECKED = ["int4_g128", "int4_g128_gather", "int3_g64_zeros", "fp4_e4m3_g16", "fp8_block"]
CHECK_SHAPES = [(80, 416), (168, 2048)]


def correct(names: list[str], shapes=SHAPES, rows=ROWS) -> None:
    worst: dict[str, float] = {}
    for name in names:
        for act, dtype in ACTS.items():
            for n, k in shapes:
                try:
                    lt, op, buffers, run = loaded(name, n, k, act)
                    k_in = op.size("k")
                    for m in rows:
                        g = torch.Generator("cuda").manual_seed(m)
                        x = torch.randn(m, k_in, device="cuda", generator=g).to(dtype)
                        y = run(list(buffers.values()), x)
                        e = error(y, reference(lt, x, k_in))
                        worst[name] = max(worst.get(name, 0.0), e if e == e else 9.0)
                        note("error", name=name, act=act, n=n, k=k, m=m, error=e)
                        if not e <= BOUND:
                            bad(f"{name} {act} n={n} k={k} m={m}: error {e:.2e}")
                except Exception as err:
                    bad(f"{name} {act} n={n} k={k}: {type(err).__name__} {str(err)[:300]}")
                    if "CUDA error" in str(err) or "Accelerator" in type(err).__name__:
                        return
    print({name: f"{e:.2e}" for name, e in worst.items()}, flush=True)


def rules() -> None:
    for name in ("int4_g128", "int4_g32_zeros", "fp4_e4m3_g16", "int8_channel", "fp8_block"):
        for n, k in ((208, 4096), (4096, 4096), (72, 14336)):
            _lt, _op, buffers, run = loaded(name, n, k, "bfloat16")
            values = list(buffers.values())
            for m in (1, 5, 16):
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                y = run(values, x)
                if any(not torch.equal(run(values, x), y) for _ in range(20)):
                    bad(f"{name} {n}x{k} m={m} does not repeat")
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    z = run(values, x)
                    z2 = run(values, x)
                z.fill_(float("nan"))
                graph.replay()
                if not (torch.equal(z, y) and torch.equal(z2, y)):
                    bad(f"{name} {n}x{k} m={m}: graph differs from eager")
    for name in ("int4_g128", "int4_two_level", "fp4_e8m0_g32", "uint8_g128_zeros"):
        lt, op, buffers, run = loaded(name, 80, 416, "bfloat16")
        values = list(buffers.values())
        for value in (float("nan"), float("inf")):
            x = torch.randn(3, 416, device="cuda", dtype=torch.bfloat16)
            clean = run(values, x)
            x[1, 400] = value
            y = run(values, x)
            if y[1].isfinite().any():
                bad(f"{name}: {value} does not reach the output")
            if not (torch.equal(y[0], clean[0]) and torch.equal(y[2], clean[2])):
                bad(f"{name}: {value} reaches other rows")
        if run(values, x[:0]).shape != (0, 80):
            bad(f"{name}: no rows")
        back = tiles.restore(buffers, op).weight.tensors()
        if not all(torch.equal(back[t].cpu(), v) for t, v in lt.weight.tensors().items()):
            bad(f"{name}: restore")
        fp32 = run(values, x[:1].float())
        if fp32.dtype != torch.float32:
            bad(f"{name}: float32 input")
    lt, op, buffers, run = loaded("int4_g128", 80, 416, "bfloat16")
    buffers["codes"].fill_(-30584)  # 0x8888: every weight is its zero point
    buffers["bias"].zero_()
    y = run(list(buffers.values()), torch.randn(7, 416, device="cuda", dtype=torch.bfloat16))
    if y.abs().max() != 0:
        bad("weights at their zero point do not give zeros")
    compiled = torch.compile(lambda v, x: run(v, x) * 2, fullgraph=True)
    lt, op, buffers, run = loaded("int4_g128", 80, 416, "bfloat16")
    x = torch.randn(2, 416, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(compiled(list(buffers.values()), x), run(list(buffers.values()), x) * 2):
        bad("torch.compile differs")
    for name in ("int4_g128", "fp4_e8m0_g32", "int4_g32_zeros", "fp8_block"):
        experts(name)
    for name in ("int4_g128", "int4_two_level", "fp4_e4m3_g16", "fp8_block", "int8_channel"):
        every_cut(name, 1000, 6144, (1, 7, 16))


def experts(name: str) -> None:
    spec, n, k = cases.SPECS[name], 144, 1056
    each = [cases.make_layer(spec, n, k, seed) for seed in range(4)]
    op = cases.make_op(each[0], k, kind="grouped_linear", experts=4)
    buffers = tiles.allocate(op, "cuda")
    for e, lt in enumerate(each):
        tiles.load_(buffers, op, lt, {"row": 0, "expert": e})
    run = Decode().bind(op)
    index = torch.tensor([3, 0, 0, -1, 2, 4, 1, 3, 3], device="cuda")
    x = torch.randn(len(index), k, device="cuda", dtype=torch.bfloat16)
    y = run(list(buffers.values()), x, index)
    ref = torch.stack([
        reference(each[e], x[i : i + 1], k)[0] if 0 <= e < 4
        else torch.zeros(n, device="cuda", dtype=torch.double)
        for i, e in enumerate(index.tolist())
    ])  # fmt: skip
    e = error(y, ref)
    print(f"   experts {name} error {e:.2e}")
    if not e <= BOUND:
        bad(f"experts {name}: error {e:.2e}")
    back = tiles.restore(buffers, op)
    for i, one in matrices(back, 4):
        if not torch.equal(one.weight.codes.cpu(), each[i].weight.codes):
            bad(f"experts {name}: restore")


def graph_us(calls: list, rounds: int = 9) -> float:
    """Median microseconds per call of a graph that holds all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, 40 // len(calls))):
            for call in calls:
                call()
    count = max(1, 40 // len(calls)) * len(calls)
    graph.replay()
    times = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / count)
    return statistics.median(times)


def random_buffers(v: Variant, name: str) -> tuple[list[list[torch.Tensor]], int]:
    """Copies of random buffers (values only matter to stay finite), and bytes of one."""
    lt = cases.make_layer(cases.SPECS[name], 64, v.k, bias=False)
    op = cases.make_op(lt, v.k_in, v.act)
    small = tiles.allocate(op, "cuda")
    tiles.load_(small, op, lt, {"row": 0})
    repeat = -(-(v.n + -v.n % 64) // 64)
    rows = {"channel": v.n + -v.n % 64}

    def wide(t: torch.Tensor) -> torch.Tensor:
        if t.shape[0] == 1 and t.dim() == 1:
            return t
        if t.shape[0] == 64:
            return t.repeat(repeat)[: rows["channel"]]
        if t.dim() == 2:  # blocks
            return t[:1].repeat(-(-v.n // 128), 1)
        return t.repeat(repeat, *[1] * (t.dim() - 1))

    one = {key: wide(t).contiguous() for key, t in small.items()}
    size = sum(t.numel() * t.element_size() for t in one.values())
    copies = max(2, min(24, math.ceil(L2_ROUND / size)))
    return [[t.clone() for t in one.values()] for _ in range(copies)], size


def timed(v: Variant, copies: list, m: int, act: str) -> float:
    x = torch.randn(m, v.k_in, device="cuda", dtype=ACTS[act])
    text = v.text()
    calls = [lambda b=b: ops.run_linear(text, v.k_in, ACTS[act], b, x) for b in copies]
    return graph_us(calls)


def label(s: Schedule) -> str:
    """Cluster, tiles and groups per chunk, phases, log2 of a run, stages, batch, warps."""
    kind = f"x{s.cluster}" if s.kernel == "resident" else f"c{s.cluster}t{s.rt}p{s.phases}"
    return f"{kind}g{s.gpc}r{s.run}s{s.stages}b{s.batch}w{s.warps}"


SPEED = [(4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096), (11008, 5120)]
SWEEP = [*SPEED[:3], SPEED[4]]
SWEEP_ROWS = (1, 4, 8, 16)


def sweep(name: str = "int4_g128") -> None:
    shapes = SWEEP
    sms, shared, cluster, _ = driver.device_limits(0)
    all_cuts = {
        (n, k, m): [
            s for _, s in candidates(variant_of(name, n, k, "bfloat16"), m, sms, shared, cluster)
        ]
        for n, k in shapes
        for m in SWEEP_ROWS
    }
    for n, k in shapes:
        v = variant_of(name, n, k, "bfloat16")
        v = replace(v, bias="")
        copies, _ = random_buffers(v, name)
        for m in SWEEP_ROWS:
            found = []
            for s in all_cuts[n, k, m]:
                ops.schedule = lambda *_a, s=s: s
                ops._entries.clear()
                try:
                    us = timed(v, copies, m, "bfloat16")
                except Exception as err:
                    bad(f"sweep {n}x{k} m={m} {s}: {err}")
                    continue
                found.append((us, s))
                note("sweep", name=name, n=n, k=k, m=m, us=us, cut=label(s))
            found.sort(key=lambda f: f[0])
            best = [f"{us:.2f} {label(s)}" for us, s in found[:4]]
            mine = plain_schedule(v, m, sms, shared, cluster)
            chosen = next((us for us, s in found if s == mine), 0.0)
            print(f"SWEEP {n}x{k} m={m} of {len(found)}: chosen {chosen:.2f} {label(mine)}; "
                  + " | ".join(best), flush=True)  # fmt: skip
    ops.schedule = plain_schedule
    ops._entries.clear()


TYPES = ["int4_g128", "int4_g128_zeros", "int4_g32", "int4_two_level", "fp4_e8m0_g32",
         "fp4_e4m3_g16", "int8_channel", "fp8_channel", "fp8_block", "int3_g128",
         "int2_g64"]  # fmt: skip
TYPE_ROWS = (1, 2, 4, 8, 16)


def types(names: list[str], shapes=SPEED) -> None:
    for n, k in shapes:
        w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16)]
        w += [w[0].clone() for _ in range(max(1, min(19, math.ceil(L2_ROUND / (n * k * 2)))))]
        row = {}
        for m in TYPE_ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row[m] = graph_us([lambda b=b, x=x: F.linear(x, b) for b in w])
            note("time", name="torch_bf16", n=n, k=k, m=m, us=row[m])
        show("torch bf16", n, k, row, n * k * 2)
        del w
        torch_int4(n, k)
        for name in names:
            try:
                v = variant_of(name, n, k, "bfloat16")
                v = replace(v, bias="")
                copies, size = random_buffers(v, name)
                row = {m: timed(v, copies, m, "bfloat16") for m in TYPE_ROWS}
                for m, us in row.items():
                    note("time", name=name, n=n, k=k, m=m, us=us, bytes=size)
                show(name, n, k, row, size)
            except Exception as err:
                bad(f"types {name} {n}x{k}: {type(err).__name__} {str(err)[:200]}")


def torch_int4(n: int, k: int) -> None:
    try:
        q = torch.randint(0, 255, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        copies = [packed.clone() for _ in range(max(2, min(20, math.ceil(L2_ROUND / q.numel()))))]
        row = {}
        mm = torch.ops.aten._weight_int4pack_mm
        for m in TYPE_ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            row[m] = graph_us([lambda b=b, x=x: mm(x, b, 128, scales) for b in copies])
            note("time", name="torch_int4", n=n, k=k, m=m, us=row[m])
        show("torch int4", n, k, row, q.numel())
    except Exception as err:
        print("torch int4:", str(err)[:200])


def show(name: str, n: int, k: int, row: dict[int, float], size: int) -> None:
    cells = " ".join(f"{us:7.2f}" for us in row.values())
    share = size / row[1] / 1e3 / 3065
    print(f"TIME {n:6d}x{k:<6d} {name:18s} {cells}  {share:4.0%} of read", flush=True)


def host() -> None:
    _lt, _op, buffers, run = loaded("int4_g128", 4096, 4096, "bfloat16")
    values = list(buffers.values())
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = {}
    calls = {"cuda_decode": lambda: run(values, x), "torch bf16": lambda: F.linear(x, w)}
    for label, call in calls.items():
        best = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            best.append((time.perf_counter() - start) * 1e4)
            torch.cuda.synchronize()
        out[label] = statistics.median(best)
        note("host", name=label, us=out[label])
    print("HOST", {a: round(b, 1) for a, b in out.items()}, flush=True)


def check() -> None:
    """For compute-sanitizer: tails, gather, experts, and one cut of every kind."""
    correct(CHECKED, CHECK_SHAPES, (1, 9))
    experts("int4_g128")
    every_cut("int4_g128", 168, 6144, (1, 9))


def every_cut(name: str, n: int, k: int, rows: tuple[int, ...]) -> None:
    """Clusters or not, one or two tiles a warp, one or more phases, against the reference."""
    limits = driver.device_limits(0)[:3]
    lt, op, buffers, run = loaded(name, n, k, "bfloat16")
    v = describe(op)
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        ref = reference(lt, x, k)
        kinds = {}
        # few multiprocessors: several tiles and batches per block
        for _, s in candidates(v, m, 3, *limits[1:]):
            what = (s.kernel, s.cluster, s.gpc, s.rt, s.phases > 1, s.buffers, s.warps)
            kinds.setdefault(what, s)
        some = list(kinds.values())[:: max(1, len(kinds) // 24)]
        for s in some:
            ops.schedule = lambda *_a, s=s: s
            ops._entries.clear()
            e = error(run(list(buffers.values()), x), ref)
            if not e <= BOUND:
                bad(f"{name} {n}x{k} m={m} {label(s)}: error {e:.2e}")
        print(f"   {len(kinds)} kinds of cuts, m={m}: {[label(s) for s in some]}")
    ops.schedule = plain_schedule
    ops._entries.clear()


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--parts", default="correct,rules,host,types,sweep")
    ap.add_argument("--names", default="")
    ap.add_argument("--out", default="")
    args = ap.parse_args()
    parts = args.parts.split(",")
    names = args.names.split(",") if args.names else list(cases.SPECS)
    start = time.time()
    wanted = wanted_code(parts, names)
    if wanted:
        compile_all(wanted)
    # outputs of torch.empty are filled with NaN: what a kernel does not write shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    todo = {"correct": lambda: correct(names), "rules": rules, "sweep": sweep, "host": host,
            "types": lambda: types(TYPES), "check": check}  # fmt: skip
    for part in parts:
        if part in ("sweep", "host", "types"):
            torch.use_deterministic_algorithms(False)
        try:
            todo[part]()
        except Exception:
            bad(f"part {part}: {traceback.format_exc()[-1500:]}")
        print(f"-- {part} done at {time.time() - start:.0f} s", flush=True)
        if args.out:
            head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                    "bad": BAD}  # fmt: skip
            Path(args.out).write_text(json.dumps({**head, "records": REC}))
    print(f"{len(BAD)} failures, {time.time() - start:.0f} s")
    for text in BAD[:40]:
        print("  ", text[:300])
    sys.exit(1 if BAD else 0)


if __name__ == "__main__":
    main()
