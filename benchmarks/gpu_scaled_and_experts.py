"""8-bit activations and stacks of experts on a GPU: are they right, how fast are they, and where
the time of experts goes.

    python benchmarks/gpu_scaled_and_experts.py --out DIR

Method as in gpu_kernels_triton.py. Beside the kernels of kernels_triton run those of kernels_torch
(torch's own products with activations quantized by separate ops) and torch's 16-bit matmuls.
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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugins/kernels_torch/src"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_kernels_triton import DEVICE, error, graph_us  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.kernels import tiles  # noqa: E402
from quant_core.kernels.activations import fake_quantize  # noqa: E402
from quant_core.kernels.base import Rejected  # noqa: E402
from quant_core.spec import (  # noqa: E402
    CHANNEL,
    TENSOR,
    Element,
    QuantSpec,
    Scale,
    block,
    group,
)
from quant_kernels_torch.kernels import BlockFp8, Fp8, Int8  # noqa: E402
from quant_kernels_triton.gluon_experts_run import multiply  # noqa: E402
from quant_kernels_triton.gluon_plan import plan  # noqa: E402
from quant_kernels_triton.gluon_stack import stack_config  # noqa: E402
from quant_kernels_triton.recipe import describe, recipe_from_text  # noqa: E402
from quant_kernels_triton.scaled_kernel import Scaled  # noqa: E402
from quant_kernels_triton.scaled_plan import scaled_from_text  # noqa: E402
from quant_kernels_triton.scaled_run import run_scaled  # noqa: E402
from quant_kernels_triton.schedule_run import gathered_rows, routed  # noqa: E402
from quant_kernels_triton.wna16 import GluonTiles, PlainTriton  # noqa: E402
from triton_made import SPECS, make_layer, make_op  # noqa: E402

FP8, INT8 = Element(name="fp8_e4m3", bits=8, kind="float"), Element.int(8)
KINDS = {
    "fp8 token": (FP8, CHANNEL, CHANNEL, Fp8),
    "fp8 token, matrix": (FP8, TENSOR, CHANNEL, Fp8),
    "int8 token": (INT8, CHANNEL, CHANNEL, Int8),
    "fp8 block": (FP8, block(128, 128), group(128), BlockFp8),
}


TOKENS = (1, 16, 64, 256, 1024, 4096)


def operation(kind: str, n: int, k: int, act: str, bias: bool) -> tuple[object, QuantSpec]:
    element, grain, token, _ = KINDS[kind]
    weight = QuantSpec(element=element, scales=(Scale(element="f32", grain=grain),))
    acts = QuantSpec(element=element, scales=(Scale(element="f32", grain=token, static=False),))
    op = make_op(weight, n, k, act=act, bias=bias, device=DEVICE)
    return replace(op, operands=(("weight", weight), ("input", acts))), acts


def check_scaled(kind: str, act: str, n: int, k: int) -> dict:
    """One kind of layer, for all numbers of rows."""
    op, acts = operation(kind, n, k, act, True)
    kernel = Scaled()
    if isinstance(answer := kernel.accepts(op), Rejected):
        return {"kind": kind, "rejected": str(answer)}
    lt = make_layer(op.weight, n, k, bias=True)
    buffers = kernel.allocate(op, "cuda")
    kernel.load_(buffers, op, lt, {"row": 0})
    run, w = kernel.bind(op), lt.dequantize().double().cuda()
    worst, bad = 0.0, []
    for m in (1, 2, 7, 16, 17, 33, 64, 65, 100, 256, 1000):
        try:
            x = torch.randn(m, k, device="cuda").to(getattr(torch, act))
            held = list(buffers.values())
            want = fake_quantize(x.float(), acts).double() @ w.t() + lt.bias.double().cuda()
            y = run(held, x)
            e, same = error(y, want), torch.equal(y, run(held, x))
            worst = max(worst, e)
            if not (e <= 5e-3 and same):
                bad.append((m, f"{e:.2e}", same))
        except Exception as err:
            bad.append((m, repr(err)[:300]))
    return {"kind": kind, "act": act, "nk": (n, k), "worst": worst, "bad": bad}


ROUTINGS = ((0, "any"), (1, "any"), (7, "any"), (64, "one"), (64, "any"), (1000, "some"),
            (1000, "any"), (33, "none"))  # fmt: skip


def _routing(t: int, e: int, how: str) -> Tensor:
    """Experts of ``t`` rows: any, and none; all rows to one; some without rows; none for any."""
    index = torch.randint(-1, e + 1, (t,), device="cuda")
    if how == "one":
        return torch.full_like(index, e - 2)
    return index % 2 if how == "some" else torch.full_like(index, -1) if how == "none" else index


def _replayed(run: Callable[..., Tensor], held: list[Tensor], k: int, e: int) -> bool:
    """Whether a graph replayed with other routings gives what eager calls give."""
    x, index = torch.randn(300, k, device="cuda").bfloat16(), _routing(300, e, "any")
    run(held, x, index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(held, x, index)
    same = True
    for how in ("any", "one", "some", "none"):
        index.copy_(_routing(300, e, how))
        y.fill_(float("nan"))
        graph.replay()
        same = same and torch.equal(y, run(held, x, index))
    return same


STACKS = ("uint4 g128 f16", "uint4 g32 bf16 code", "mxfp4", "int8 channel", "fp8 block", "nvfp4")


def check_experts(name: str, kernel: str) -> dict:
    """A stack of one kind in one kernel, for all routings."""
    n, k, e = 200, 544, 5
    op = make_op(SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=e, bias=True)
    op = replace(op, device=DEVICE)
    parts = [make_layer(SPECS[name], n, k, seed=i, bias=True) for i in range(e)]
    buffers = tiles.allocate(op, "cuda")
    for i, part in enumerate(parts):
        tiles.load_(buffers, op, part, {"row": 0, "expert": i})
    w = torch.stack([p.dequantize() for p in parts]).double().cuda()
    b = torch.stack([p.bias for p in parts]).double().cuda()
    runs = {c.name: c for c in (GluonTiles(), PlainTriton())}[kernel]
    if isinstance(answer := runs.accepts(op), Rejected):
        return {"spec": name, "kernel": kernel, "rejected": str(answer)}
    run, held, worst, bad = runs.bind(op), list(buffers.values()), 0.0, []
    for t, how in ROUTINGS:
        try:
            x = torch.randn(t, k, device="cuda").bfloat16()
            index = _routing(t, e, how)
            here = (index >= 0) & (index < e)
            want = torch.zeros(t, n, device="cuda", dtype=torch.float64)
            for i in range(e):
                want[index == i] = x[index == i].double() @ w[i].t() + b[i]
            y = run(held, x, index)
            err = error(y, want) if t and here.any() else 0.0
            worst = max(worst, err)
            if not (err <= 2.8e-3 and not y[~here].any()):
                bad.append((t, how, f"{err:.2e}"))
        except Exception as err:
            bad.append((t, how, repr(err)[:300]))
    if not _replayed(run, held, k, e):
        bad.append("a graph's replay differs")
    return {"spec": name, "kernel": kernel, "worst": worst, "bad": bad}


def _job(job: tuple[Any, ...]) -> dict:
    torch.manual_seed(0)
    try:
        return {"check_scaled": check_scaled, "check_experts": check_experts}[job[0]](*job[1:])
    except Exception as err:  # a benchmark goes on and reports it
        return {"job": job, "bad": repr(err)[:500]}


def checks(jobs: list[tuple[Any, ...]], workers: int, seconds: float = 120.0) -> list[dict]:
    """Checks dealt to processes as these become free: most of their time is compiling."""
    end, rows = time.time() + seconds, []
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), workers)) as pool:
        for job, result in [(job, pool.apply_async(_job, (job,))) for job in jobs]:
            try:
                rows.append(result.get(timeout=max(0.1, end - time.time())))
            except multiprocessing.TimeoutError:
                rows.append({"job": job, "bad": f"not done in {seconds:.0f} s"})
            print("CHECK", {**rows[-1], "worst": f"{rows[-1].get('worst', 0):.2e}"}, flush=True)
        pool.terminate()
    return rows


def speed_scaled(k: int, n: int) -> list[dict]:
    rows = []
    for kind, (_, _, _, theirs) in KINDS.items():
        op, _ = operation(kind, n, k, "bfloat16", False)
        kernels = {"triton": Scaled(), "torch": theirs()}
        lt = make_layer(op.weight, 128, k)
        held = kernels["triton"].allocate(op, "cuda")
        copies = []
        for _ in range(max(2, math.ceil(150e6 / (n * k)))):
            one = {name: torch.empty_like(t) for name, t in held.items()}
            for name, t in one.items():
                part = dict(lt.weight.tensors())[name].cuda()
                part = part.view(t.dtype) if part.dtype != t.dtype else part
                if part.shape[0] == 1 and t.shape[0] == 1:
                    t.copy_(part)
                else:
                    t.copy_(part.repeat(-(-t.shape[0] // part.shape[0]), 1)[: t.shape[0]])
            copies.append(list(one.values()))
        for m in (1, 16, 64, 128, 256, 1024, 4096):
            x = torch.randn(m, k, device="cuda").bfloat16()
            row = {"kind": kind, "k": k, "n": n, "m": m}
            p = scaled_from_text(kernels["triton"].bind(op).args[0])
            theirs_run = kernels["torch"].bind(op)
            calls = {
                "gemm8": lambda v, p=p, x=x: run_scaled(p, x, v, few=1 << 30),
                "fused+torch": lambda v, p=p, x=x: run_scaled(p, x, v, few=0),
                "torch": lambda v, r=theirs_run, x=x: r(v, x),
            }
            for name, call in calls.items():
                if name == "gemm8" and m > 256:
                    continue
                try:
                    row[name] = round(graph_us([lambda v=v, c=call: c(v) for v in copies]), 1)
                except Exception as err:
                    row[name] = repr(err)[:160]
            rows.append(row)
            print("SCALED", row, flush=True)
    return rows


def _stack(spec: str, e: int, k: int, n: int) -> tuple[Any, list[Tensor]]:
    """The operation and random buffers of a stack."""
    op = make_op(SPECS[spec], n, k, op="grouped_linear", act="bfloat16", experts=e, device=DEVICE)
    buffers = tiles.allocate(op, "cuda")
    for t in buffers.values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, device="cuda") * 0.01)
        else:
            t.view(torch.uint8).random_(0, 120)  # scales of one byte stay small
    return op, list(buffers.values())


def _picks(tokens: int, e: int, top: int, count: int = 6) -> list[Tensor]:
    rolls = torch.rand(count, tokens, e, device="cuda")
    return list(rolls.topk(top, dim=2).indices)


def _grouped_bf16(dense: Tensor, x: Tensor, index: Tensor) -> Tensor:
    ids, order = index.sort()
    experts = torch.arange(dense.shape[0], device="cuda")
    ends = torch.searchsorted(ids, experts, right=True)
    return torch._grouped_mm(x[order], dense, offs=ends.int())


def _timed(row: dict, calls: dict[str, list[Callable[[], Any]]]) -> dict:
    for label, made in calls.items():
        try:
            row[label] = round(graph_us(made, 3), 1)
        except Exception as err:
            row[label] = repr(err)[:160]
    return row


def _times(
    op: Any, held: list[Tensor], dense: Tensor, x: Tensor, picks: list[Tensor], row: dict
) -> dict:
    """Sorting, copying rows, the product alone, all of it; plain Triton and torch's bf16."""
    r = recipe_from_text(describe(op, ops=("grouped_linear",)).text())
    c, e = stack_config(plan(r), r, x.shape[0]), dense.shape[0]
    y = torch.empty(x.shape[0], r.n, device="cuda", dtype=x.dtype)
    found = [routed(i, e, c.bm) for i in picks]
    gluon, plain = GluonTiles().bind(op), PlainTriton().bind(op)
    calls: dict[str, list[Callable[[], Any]]] = {
        "all": [partial(gluon, held, x, i) for i in picks],
        "sorting": [partial(routed, i, e, c.bm) for i in picks],
        "copying": [partial(gathered_rows, x, q) for q in found],
        "product": [partial(multiply, r, x, held, y, q, c) for q in found],
        "bf16 grouped_mm": [partial(_grouped_bf16, dense, x, i) for i in picks],
    }
    if x.shape[0] <= 512:
        calls["plain"] = [partial(plain, held, x, i) for i in picks]
    return _timed(row | {"way": str(c)}, calls)


def speed_experts(e: int, k: int, n: int, top: int, tokens: tuple[int, ...]) -> list[dict]:
    rows = []
    for name in ("uint4 g128 bf16", "mxfp4"):
        op, held = _stack(name, e, k, n)
        dense = torch.randn(e, n, k, device="cuda").mul_(0.02).bfloat16().transpose(1, 2)
        for t in tokens:
            x = torch.randn(t * top, k, device="cuda").bfloat16()
            picks = [i.reshape(-1) for i in _picks(t, e, top)]
            row = {"spec": name, "e": e, "k": k, "n": n, "tokens": t, "top": top}
            rows.append(_times(op, held, dense, x, picks, row))
            print("EXPERTS", rows[-1], flush=True)
    return rows


def _silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _one_by_one(
    runs: list[Callable[..., Tensor]], held: list[list[Tensor]], x: Tensor, index: Tensor, w: Tensor
) -> Tensor:
    """As ``nn.QuantExperts`` does where no kernel runs all of it."""
    flat, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], dim=0)
    sides = [run(values, rows, flat) for run, values in zip(runs[:2], held[:2], strict=True)]
    y = runs[2](held[2], _silu_gated(*sides), flat) * w.reshape(-1, 1)
    return y.view(*index.shape, -1).sum(1).to(x.dtype)


def speed_layers(tokens: tuple[int, ...]) -> list[dict]:
    """Gate, up, gating, down and the sum over a token's experts: three stacks, and one call."""
    e, top, hidden, inner = 128, 8, 2048, 768
    sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
    stacks = [_stack("uint4 g128 bf16", e, *size) for size in sizes]
    ops, held = [op for op, _ in stacks], [values for _, values in stacks]
    runs, whole, rows = [GluonTiles().bind(op) for op in ops], GluonTiles().bind_experts(ops), []
    for t in tokens:
        x, w = torch.randn(t, hidden, device="cuda").bfloat16(), torch.rand(t, top, device="cuda")
        stacked = [partial(_one_by_one, runs, held, x, i, w) for i in _picks(t, e, top, 4)]
        called = [partial(whole, held, _silu_gated, x, c.args[3], w) for c in stacked]
        one, other = stacked[0]().double(), called[0]().double()
        row = {"tokens": t, "difference": float((one - other).norm() / one.norm())}
        rows.append(_timed(row, {"stacks": stacked, "one call": called}))
        print("LAYER", rows[-1], flush=True)
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("out"))
    ap.add_argument("--only", default="", help="steps whose names contain this")
    ap.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="of checks")
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    steps = {
        "check_scaled": lambda: checks(
            [
                ("check_scaled", kind, act, n, k)
                for kind in KINDS
                for act in ("bfloat16", "float16")
                for n, k in ((200, 544), (512, 1024))
            ],
            a.workers,
        ),
        "check_experts": lambda: checks(
            [
                ("check_experts", name, kernel)
                for kernel in ("gluon_wna16", "triton_wna16")
                for name in STACKS
            ],
            a.workers,
        ),
        "scaled": lambda: speed_scaled(4096, 28672) + speed_scaled(4096, 4096),
        "experts 8": lambda: speed_experts(8, 4096, 14336, 2, TOKENS),
        "experts 128": lambda: speed_experts(128, 2048, 1536, 8, TOKENS),
        "layers": lambda: speed_layers(TOKENS),
    }
    for name, step in steps.items():
        if a.only not in name:
            continue
        start = time.time()
        try:
            made[name] = step()
        except Exception as err:
            made[name] = repr(err)[:500]
            print("FAIL", name, repr(err)[:500])
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        (a.out / "scaled_and_experts.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
