"""4-bit weights by 8-bit activations on a GPU, and stacks of experts: right, and how fast.

    python benchmarks/gpu_mixed.py --out DIR [--only check|speed|experts]

Method as in gpu_kernels_triton.py: float64 products of emulated activations, CUDA graphs over
weight copies that exceed the L2 cache, medians, quantization of x included.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugins/kernels_torch/src"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_kernels_triton as base  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_eight_bits import SHAPES, check_codes, check_ring  # noqa: E402
from gpu_kernels_triton import DEVICE, error, graph_us  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.dequantize import dense_weight  # noqa: E402
from quant_core.kernels import tiles  # noqa: E402
from quant_core.kernels.activations import fake_quantize  # noqa: E402
from quant_core.kernels.base import Rejected  # noqa: E402
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, Zero, group  # noqa: E402
from quant_kernels_triton.gluon_experts_run import run_stack  # noqa: E402
from quant_kernels_triton.gluon_plan import plan  # noqa: E402
from quant_kernels_triton.gluon_stack import Stack  # noqa: E402
from quant_kernels_triton.mixed_kernel import Mixed, MixedStored  # noqa: E402
from quant_kernels_triton.mixed_plan import (  # noqa: E402
    MixedPair,
    MixedRing,
    MixedWide,
    config,
    from_text,
)
from quant_kernels_triton.recipe import describe  # noqa: E402
from triton_made import SPECS, make_layer, make_op  # noqa: E402

BOUND = 5e-3
ELEMENTS = {"fp8": Element(name="fp8_e4m3", bits=8, kind="float"), "int8": Element.int(8)}
MIDDLE = Zero(kind="const", value=8)
OWN = {
    "uint4 g64 f32": QuantSpec(
        element=Element.uint(4), scales=(Scale(element="f32", grain=group(64)),), zero=MIDDLE
    ),
    "uint4 g32 bf16": QuantSpec(
        element=Element.uint(4), scales=(Scale(element="bf16", grain=group(32)),), zero=MIDDLE
    ),
    "uint4 g128 awq": QuantSpec(
        element=Element.uint(4),
        scales=(
            Scale(element="f32", grain=group(128)),
            Scale(element="f32", grain=TENSOR, inverse=True),
            Scale(element="f32", grain=TENSOR),
        ),
        zero=MIDDLE,
    ),
}
KNOWN = SPECS | OWN
CHECKS = [
    ("uint4 g128 bf16", "fp8"),
    ("uint4 g64 f32", "fp8"),
    ("uint4 g32 bf16", "fp8"),
    ("uint4 channel", "fp8"),
    ("uint4 g128 awq", "fp8"),
    ("uint4 g128 gather", "fp8"),
    ("uint4 inverse", "fp8"),
    ("mxfp4", "fp8"),
    ("uint4 g128 bf16", "int8"),
    ("uint4 g32 bf16", "int8"),
    ("uint4 channel", "int8"),
    ("fp8 channel", "fp8"),
    ("int8 channel", "int8"),
]
TIMED = [*CHECKS[11:13], CHECKS[10], CHECKS[8], *CHECKS[1:4]]
ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
SIZES: list = [None, *(Stack(b, 0, c, False) for b, c in ((64, 4), (128, 3), (256, 2)))]
WIDE: list = [None, MixedRing(64, 4, 4, 1), MixedRing(128, 4, 4, 1), MixedWide(128, 2, 5, 8)]


def activations(kind: str, static: bool) -> QuantSpec:
    grain = TENSOR if static else CHANNEL
    scale = Scale(element="f32", grain=grain, static=static)
    return QuantSpec(element=ELEMENTS[kind], scales=(scale,))


def operation(
    name: str, kind: str, n: int, k: int, *, act: str = "bfloat16", bias: bool = False,
    static: bool = False, experts: int = 0,
) -> OpSpec:  # fmt: skip
    what = "grouped_linear" if experts else "linear"
    op = make_op(KNOWN[name], n, k, op=what, act=act, bias=bias, experts=experts, device=DEVICE)
    features = op.features | ({"input_scale"} if static else set())
    operands = (("weight", KNOWN[name]), ("input", activations(kind, static)))
    return replace(op, operands=operands, features=frozenset(features))


# ----------------------------------------------------------------------------------- are they right


def check_linear(name: str, kind: str, act: str, static: bool) -> dict:
    n, k = 200, 544
    op = operation(name, kind, n, k, act=act, bias=True, static=static)
    kernel = MixedStored() if static else Mixed()
    if isinstance(answer := kernel.accepts(op), Rejected):
        return {"spec": name, "kind": kind, "rejected": str(answer)}
    lt = make_layer(KNOWN[name], n, k, bias=True)
    stored = torch.tensor([0.011]) if static else None
    lt = replace(lt, input_scale=stored)
    buffers = kernel.allocate(op, "cuda")
    kernel.load_(buffers, op, lt, {"row": 0})
    run, values = kernel.bind(op), list(buffers.values())
    w, acts = dense_weight(lt.weight, k).double().cuda(), op.operand("input")
    worst, bad = 0.0, []
    for m in (1, 2, 7, 16, 17, 33, 64, 65, 100, 129, 256, 300, 1000):
        try:
            x = torch.randn(m, k, device="cuda").to(getattr(torch, act))
            s = None if stored is None else stored.cuda()
            want = fake_quantize(x.float(), acts, s).double() @ w.t() + lt.bias.double().cuda()
            y = run(values, x)
            e, same = error(y, want), torch.equal(y, run(values, x))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                z = run(values, x)
            z.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            worst = max(worst, e)
            if not (e <= BOUND and same and torch.equal(y, z)):
                bad.append((m, f"{e:.2e}", same, torch.equal(y, z)))
        except Exception as err:  # a benchmark goes on and reports it
            bad.append((m, repr(err)[:300]))
    x = torch.randn(3, k, device="cuda").to(getattr(torch, act))
    x[1, 5] = math.nan
    if [bool(r.isnan().all()) for r in run(values, x)] != [False, True, False]:
        bad.append("NaN does not reach its token alone")
    return {"spec": name, "kind": kind, "act": act, "static": static, "worst": worst, "bad": bad}


def block_sizes(
    sub: int, only: str = "", stay: bool = False
) -> list[MixedRing | MixedWide | MixedPair]:
    """Every block size of a plan with ``sub`` pieces a group, or those of one class; ``stay``: with
    those of ``mixed_turns``, which takes codes of 4 bits."""
    every: list[MixedRing | MixedWide | MixedPair] = []
    every += [MixedRing(b, nw, 4, s) for b in (16, 64) for nw in (4, 8) for s in (1, 2)]
    every += [MixedRing(64, 4, 9, 1), MixedRing(128, 4, 3, 1)]
    every += [MixedRing(128, 4, 4, 1), MixedWide(128, 1, 4, 8)]
    every += [MixedPair(b, 4, s) for b in (64, 128) for s in (1, 2)]
    every += [MixedWide(128, 2, 4, 8)] if sub == 1 else []
    if stay and sub == 1:
        every += [MixedWide(bt, 1, 6, 16, stay=True) for bt in (64, 128)]
        every += [MixedWide(128, 2, 5, 16, stay=True, split=s) for s in (1, 2)]
    return [c for c in every if not only or type(c).__name__ == only]


def check_blocks(
    name: str, kind: str, part: int = 0, parts: int = 1, *, rows: int = 300,
    sizes: tuple[int, int] = (328, 1056), only: str = "",
) -> dict:  # fmt: skip
    """Every block size, or those of one class, on a layer whose sizes are no multiples of it.

    Args:
        part, parts: only every ``parts``-th, from number ``part`` on.
    """
    (n, k), bad, worst = sizes, [], 0.0
    op = operation(name, kind, n, k)
    lt = make_layer(KNOWN[name], n, k)
    buffers = Mixed().allocate(op, "cuda")
    Mixed().load_(buffers, op, lt, {"row": 0})
    p, w = from_text(Mixed().bind(op).args[0]), lt.dequantize().double().cuda()
    from quant_kernels_triton.mixed_run import run_mixed

    every = block_sizes(p.sub, only, not p.bytes)[part::parts]
    for c in every:
        try:
            x = torch.randn(rows, k, device="cuda").bfloat16()
            want = fake_quantize(x.float(), op.operand("input")).double() @ w.t()
            e = error(run_mixed(p, x, list(buffers.values()), c), want)
            worst = max(worst, e)
            if not e <= BOUND:
                bad.append((str(c), f"{e:.2e}"))
        except Exception as err:
            bad.append((str(c), repr(err)[:300]))
    return {"spec": name, "kind": kind, "blocks": len(every), "worst": worst, "bad": bad}


def check_experts(name: str, kind: str, rows: tuple[int, ...] = (0, 1, 7, 60, 300, 1500)) -> dict:
    n, k, e, bad, worst = 200, 544, 5, [], 0.0
    op = operation(name, kind, n, k, bias=True, experts=e)
    parts = [make_layer(KNOWN[name], n, k, seed=i, bias=True) for i in range(e)]
    buffers = tiles.allocate(op, "cuda")
    for i, part in enumerate(parts):
        tiles.load_(buffers, op, part, {"row": 0, "expert": i})
    w = torch.stack([p.dequantize() for p in parts]).double().cuda()
    b = torch.stack([p.bias for p in parts]).double().cuda()
    run, acts = Mixed().bind(op), op.operand("input")
    for t in rows:
        try:
            x = torch.randn(t, k, device="cuda").bfloat16()
            index = torch.randint(-1, e + 1, (t,), device="cuda")
            here, at = (index >= 0) & (index < e), index.clamp(0, e - 1)
            xq = fake_quantize(x.float(), acts).double() if t else x.double()
            every = torch.einsum("tk,enk->ten", xq, w) + b
            want = every.gather(1, at[:, None, None].expand(t, 1, n)).squeeze(1)
            y = run(list(buffers.values()), x, index)
            err = error(y[here], want[here]) if here.any() else 0.0
            worst = max(worst, err)
            if not (err <= BOUND and not y[~here].any()):
                bad.append((t, f"{err:.2e}"))
        except Exception as failed:
            bad.append((t, repr(failed)[:300]))
    return {"spec": name, "kind": kind, "experts": e, "worst": worst, "bad": bad}


def warm(name: str, kind: str, part: int) -> dict:
    """Compile what the timings need, on a small layer of the same kind."""
    from quant_kernels_triton.mixed_run import run_mixed, run_mixed_grouped

    if part < 0:
        _, r, p, held, _ = experts_layer(8, 2048, 512)
        x = torch.randn(512, 2048, device="cuda").bfloat16()
        index = torch.randint(0, 8, (512,), device="cuda")
        for c in SIZES[-part - 1 :: 3]:
            run_stack(r, x, index, held, c and c.fitted(plan(r)))
        for c in WIDE[-part - 1 :: 3]:
            run_mixed_grouped(p, x, index, held, c)
        return {"warm": part, "bad": []}
    SPECS.setdefault(name, KNOWN[name])
    _, held, _ = base.layer(name, 512, 2048, 1)
    p = from_text(Mixed().bind(operation(name, kind, 512, 2048)).args[0])
    tune = (name, kind) == CHECKS[0]
    every = list(dict.fromkeys(c for m in ROWS for c in candidates(p, m, tune)))
    for c in every[part::4]:
        run_mixed(p, torch.randn(64, 2048, device="cuda").bfloat16(), held[0], c)
    return {"warm": name, "bad": []}


Job = tuple[str, str, str, str, bool, int, int]
"""What, weights, activations, type of x, scale stored; part and number of parts."""


def check_job(job: Job) -> dict:
    what, name, kind, act, static, part, parts = job
    start = time.time()
    torch.manual_seed(0)
    try:
        if what == "warm":
            row = warm(name, kind, part)
        elif what == "codes":
            row = check_codes()
        elif what == "ring":
            row = check_ring(kind, SHAPES[part : part + 1])
        elif what == "linear":
            row = check_linear(name, kind, act, static)
        elif what == "blocks":
            row = check_blocks(name, kind, part, parts)
        else:
            row = check_experts(name, kind)
    except Exception as err:
        row = {"bad": repr(err)[:500]}
    return {"job": job, **row, "seconds": round(time.time() - start, 1)}


def check(
    out: Path, workers: int, timing: bool, seconds: float, what: tuple[str, ...] = ()
) -> list[dict]:
    """All checks, or those of ``what``, dealt to processes as these become free; what is not done
    in time says so."""
    jobs: list[Job] = [("linear", s, a, "bfloat16", False, 0, 1) for s, a in CHECKS]
    jobs += [("ring", "", kind, "", False, i, 3) for kind in ("fp8", "block", "int8")
             for i in range(len(SHAPES))]  # fmt: skip
    jobs += [("linear", s, a, "float16", False, 0, 1) for s, a in (CHECKS[0], CHECKS[10])]
    jobs += [("linear", s, a, "bfloat16", True, 0, 1) for s, a in (CHECKS[4], CHECKS[8])]
    jobs += [("experts", s, a, "", False, 0, 1) for s, a in (CHECKS[0], CHECKS[10])]
    jobs += [("blocks", s, a, "", False, i, 3) for s, a in (CHECKS[0], *TIMED) for i in range(3)]
    jobs += [("codes", "", "", "", False, 0, 1)]
    if timing:
        jobs += [("warm", s, a, "", False, i, 4) for s, a in (CHECKS[0], *TIMED) for i in range(4)]
        jobs += [("warm", "", "", "", False, -i, 3) for i in (1, 2, 3)]
    jobs = [job for job in jobs if not what or job[0] in what]
    end, rows = time.time() + seconds, []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = [(job, pool.apply_async(check_job, (job,))) for job in jobs]
        for job, result in waiting:
            try:
                rows.append(result.get(timeout=max(0.1, end - time.time())))
            except multiprocessing.TimeoutError:
                rows.append({"job": job, "bad": f"not done in {seconds:.0f} s"})
            r = rows[-1]
            print("CHECK", {**r, "worst": f"{r.get('worst', 0):.2e}"}, flush=True)
            (out / "check.json").write_text(json.dumps(rows))
        pool.terminate()
    wrong = sum(bool(r["bad"]) for r in rows if "rejected" not in r)
    print(f"{len(rows)} checks, {wrong} wrong or not done", flush=True)
    return rows


# -------------------------------------------------------------------------------- how fast are they


def candidates(p: object, m: int, tune: bool) -> list[MixedRing | MixedWide]:
    first = config(p, m)
    more: list[MixedRing | MixedWide] = []
    if tune and m <= 16:
        more = [MixedRing(16, w, st, s) for w, st in ((4, 4), (4, 6), (8, 4)) for s in (1, 2)]
    elif tune and m <= 64:
        more = [MixedRing(32 if m <= 32 else 64, 4, st, s) for st in (3, 4) for s in (1, 2, 4)]
    elif tune and m <= 128:
        more = [MixedRing(64, 4, 4, 1), MixedRing(64, 4, 4, 2), MixedRing(128, 4, 4, 1)]
        more += [MixedRing(128, 4, 3, 2), MixedWide(128, 1, 4, 8)]
    elif tune and m <= 256:
        more = [MixedRing(64, 4, 4, 1), MixedRing(128, 4, 4, 1), MixedRing(128, 4, 4, 2)]
        more += [MixedRing(64, 4, 4, 2), MixedWide(128, 2, 4, 8)]
    elif tune:
        more = [MixedWide(128, 2, 5, 8), MixedWide(128, 2, 4, 4)]
        more += [MixedRing(128, 4, 4, 1)] if m <= 1024 else []
    return [first, *(c for c in more if c != first)]


def speed_of(name: str, kind: str, k: int, n: int, rows: tuple[int, ...], tune: bool) -> list[dict]:
    from quant_kernels_triton.mixed_run import run_mixed

    copies = max(2, min(20, math.ceil(base.L2_BYTES / (n * k / 2))))
    SPECS.setdefault(name, KNOWN[name])
    _, held, w = base.layer(name, n, k, copies)
    op, out = operation(name, kind, n, k), []
    p = from_text(Mixed().bind(op).args[0])
    dense = [w.clone() for _ in range(max(2, math.ceil(base.L2_BYTES / w.nbytes)))]
    for m in rows:
        x = torch.randn(m, k, device="cuda").bfloat16()
        some = fake_quantize(x[:64].float(), op.operand("input")).double()
        want, found = some @ dense[0].double().t(), []
        values = held if m <= 256 else held[:3]
        for c in candidates(p, m, tune):
            try:
                e = error(run_mixed(p, x, values[0], c)[:64], want)
                calls = [lambda v=v, c=c, x=x: run_mixed(p, x, v, c) for v in values]
                found.append((str(c), round(graph_us(calls), 1), e))
            except Exception as err:
                print("FAIL", name, kind, m, c, repr(err)[:300], flush=True)
        bf16 = graph_us([lambda v=v, x=x: F.linear(x, v) for v in dense])
        row = {"spec": name, "kind": kind, "k": k, "n": n, "m": m, "bf16": round(bf16, 1)}
        out.append(row | {"found": found})
        line = "  ".join(f"{c} {us}" for c, us, _ in found)
        errors = f"{max((f[2] for f in found), default=math.inf):.1e}"
        print(
            f"SPEED {name} {kind} K{k} N{n} M{m} bf16 {bf16:.1f} err {errors} | {line}", flush=True
        )
    return out


def speed() -> list[dict]:
    out = speed_of(*CHECKS[0], 4096, 28672, ROWS, True)
    out += speed_of(*CHECKS[0], 4096, 4096, ROWS, True)
    for name, kind in TIMED:
        out += speed_of(name, kind, 4096, 28672, (1, 64, 256, 1024, 4096), False)
        out += speed_of(name, kind, 4096, 4096, (1, 64, 256, 1024), False)
    return out + speed_of(*CHECKS[0], 14336, 4096, (1, 16, 64, 128, 256, 1024), True)


def experts_layer(e: int, k: int, n: int) -> tuple:
    """Operation, recipe, mixed plan, buffers and dense weights of a stack of int4 experts."""
    name = "uint4 g128 bf16"
    op = make_op(SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=e, device=DEVICE)
    r = describe(op, ops=("grouped_linear",))
    p = from_text(Mixed().bind(operation(name, "fp8", n, k, experts=e)).args[0])
    _, copies, w = base.layer(name, n, k, 1)
    held = [t.unsqueeze(0).expand(e, *t.shape).contiguous() for t in copies[0]]
    return op, r, p, held, w


def experts_of(e: int, k: int, n: int, top: int, tokens: tuple[int, ...]) -> list[dict]:
    """int4 experts: Gluon's block sizes, fp8 activations, torch's 16-bit grouped product."""
    from quant_kernels_triton.mixed_run import run_mixed_grouped

    _, r, p, held, w = experts_layer(e, k, n)
    sizes = [c and c.fitted(plan(r)) for c in SIZES]
    dense, rows = w.unsqueeze(0).expand(e, n, k).contiguous().transpose(1, 2), []
    for t in tokens:
        x = torch.randn(t * top, k, device="cuda").bfloat16()
        picks = [torch.rand(t, e, device="cuda").topk(top).indices.reshape(-1) for _ in range(4)]
        row: dict = {"e": e, "k": k, "n": n, "tokens": t, "top": top}

        def bf16(i: Tensor, x: Tensor = x) -> Tensor:
            ids, order = i.sort()
            ends = torch.searchsorted(ids, torch.arange(e, device="cuda"), right=True)
            return F.grouped_mm(x[order], dense, offs=ends.int())

        calls = {f"w4a16 {c}": lambda i, c=c, x=x: run_stack(r, x, i, held, c) for c in sizes}
        calls |= {
            f"w4a8 {c}": lambda i, c=c, x=x: run_mixed_grouped(p, x, i, held, c) for c in WIDE
        }
        calls["bf16"] = bf16
        for label, call in calls.items():
            try:
                row[label] = round(graph_us([lambda i=i, c=call: c(i) for i in picks], 3), 1)
            except Exception as err:
                row[label] = repr(err)[:200]
        rows.append(row)
        print("EXPERTS", row, flush=True)
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("out"))
    ap.add_argument("--only", default="", help="steps whose names contain this")
    ap.add_argument("--seconds", type=float, default=90.0, help="of the check")
    ap.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    ap.add_argument("--what", default="", help="of the check: linear, ring, experts, blocks, codes")
    a = ap.parse_args()
    torch.manual_seed(0)
    a.out.mkdir(parents=True, exist_ok=True)
    made: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    steps = {
        "check": lambda: check(
            a.out, a.workers, a.only != "check", a.seconds, tuple(filter(None, a.what.split(",")))
        ),
        "speed": speed,
        "experts 8": lambda: experts_of(8, 4096, 14336, 2, (512, 4096, 64)),
        "experts 128": lambda: experts_of(128, 2048, 1536, 8, (512, 4096)),
    }
    for name, step in steps.items():
        if a.only and a.only not in name:
            continue
        start = time.time()
        try:
            made[name] = step()
        except Exception as err:
            made[name] = repr(err)[:500]
            print("FAIL", name, repr(err)[:500])
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        (a.out / "mixed.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
