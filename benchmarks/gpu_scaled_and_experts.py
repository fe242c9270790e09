"""8-bit activations and stacks of experts on a GPU: are they right, how fast are they.

    python benchmarks/gpu_scaled_and_experts.py --out DIR

Method as in gpu_kernels_triton.py. Beside the kernels of kernels_triton run those of kernels_torch
(torch's own products with activations quantized by separate ops) and torch's 16-bit matmuls.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "plugins/kernels_torch/src"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_kernels_triton as base  # noqa: E402
import torch  # noqa: E402
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
from quant_kernels_triton.scaled_kernel import Scaled  # noqa: E402
from quant_kernels_triton.scaled_plan import scaled_from_text  # noqa: E402
from quant_kernels_triton.scaled_run import run_scaled  # noqa: E402
from quant_kernels_triton.wna16 import GluonTiles, PlainTriton  # noqa: E402
from triton_made import SPECS, make_layer, make_op  # noqa: E402

FP8, INT8 = Element(name="fp8_e4m3", bits=8, kind="float"), Element.int(8)
KINDS = {
    "fp8 token": (FP8, CHANNEL, CHANNEL, Fp8),
    "fp8 token, matrix": (FP8, TENSOR, CHANNEL, Fp8),
    "int8 token": (INT8, CHANNEL, CHANNEL, Int8),
    "fp8 block": (FP8, block(128, 128), group(128), BlockFp8),
}


def operation(kind: str, n: int, k: int, act: str, bias: bool) -> tuple[object, QuantSpec]:
    element, grain, token, _ = KINDS[kind]
    weight = QuantSpec(element=element, scales=(Scale(element="f32", grain=grain),))
    acts = QuantSpec(element=element, scales=(Scale(element="f32", grain=token, static=False),))
    op = make_op(weight, n, k, act=act, bias=bias, device=DEVICE)
    return replace(op, operands=(("weight", weight), ("input", acts))), acts


def check_scaled() -> list[dict]:
    out = []
    for kind in KINDS:
        for act in ("bfloat16", "float16"):
            for n, k in ((200, 544), (512, 1024)):
                op, acts = operation(kind, n, k, act, True)
                kernel = Scaled()
                if isinstance(answer := kernel.accepts(op), Rejected):
                    out.append({"kind": kind, "rejected": str(answer)})
                    continue
                lt = make_layer(op.weight, n, k, bias=True)
                buffers = kernel.allocate(op, "cuda")
                kernel.load_(buffers, op, lt, {"row": 0})
                run, w = kernel.bind(op), lt.dequantize().double().cuda()
                worst, bad = 0.0, []
                for m in (1, 2, 7, 16, 17, 33, 64, 65, 100, 256, 1000):
                    try:
                        x = torch.randn(m, k, device="cuda").to(getattr(torch, act))
                        held = list(buffers.values())
                        want = (
                            fake_quantize(x.float(), acts).double() @ w.t()
                            + lt.bias.double().cuda()
                        )
                        y = run(held, x)
                        e, same = error(y, want), torch.equal(y, run(held, x))
                        worst = max(worst, e)
                        if not (e <= 5e-3 and same):
                            bad.append((m, f"{e:.2e}", same))
                    except Exception as err:
                        bad.append((m, repr(err)[:300]))
                out.append({"kind": kind, "act": act, "nk": (n, k), "worst": worst, "bad": bad})
    return out


def check_experts() -> list[dict]:
    out = []
    n, k, e = 200, 544, 5
    for name in (
        "uint4 g128 f16",
        "uint4 g32 bf16 code",
        "mxfp4",
        "int8 channel",
        "fp8 block",
        "nvfp4",
    ):
        op = make_op(SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=e, bias=True)
        op = replace(op, device=DEVICE)
        parts = [make_layer(SPECS[name], n, k, seed=i, bias=True) for i in range(e)]
        buffers = tiles.allocate(op, "cuda")
        for i, part in enumerate(parts):
            tiles.load_(buffers, op, part, {"row": 0, "expert": i})
        w = torch.stack([p.dequantize() for p in parts]).double().cuda()
        b = torch.stack([p.bias for p in parts]).double().cuda()
        for kernel in (GluonTiles(), PlainTriton()):
            if isinstance(answer := kernel.accepts(op), Rejected):
                out.append({"spec": name, "kernel": kernel.name, "rejected": str(answer)})
                continue
            run, held, worst, bad = kernel.bind(op), list(buffers.values()), 0.0, []
            for t in (0, 1, 7, 60, 300, 1500):
                try:
                    x = torch.randn(t, k, device="cuda").bfloat16()
                    index = torch.randint(-1, e + 1, (t,), device="cuda")
                    here = (index >= 0) & (index < e)
                    at = index.clamp(0, e - 1)
                    want = (
                        torch.einsum("tk,tnk->tn", x.double(), w[at]) + b[at] if t < 400 else None
                    )
                    if want is None:
                        want = torch.cat(
                            [x[i : i + 1].double() @ w[at[i]].t() + b[at[i]] for i in range(t)]
                        )
                    want = torch.where(here[:, None], want, 0)
                    y = run(held, x, index)
                    err = error(y, want) if t and here.any() else 0.0
                    worst = max(worst, err)
                    if not (err <= 2.8e-3 and not y[~here].any()):
                        bad.append((t, f"{err:.2e}"))
                except Exception as err:
                    bad.append((t, repr(err)[:300]))
            out.append({"spec": name, "kernel": kernel.name, "worst": worst, "bad": bad})
    return out


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


def speed_experts(e: int, k: int, n: int, top: int, tokens: tuple[int, ...]) -> list[dict]:
    rows = []
    for name in ("uint4 g128 bf16", "mxfp4"):
        one = make_op(SPECS[name], n, k, act="bfloat16", device=DEVICE)
        op = make_op(
            SPECS[name], n, k, op="grouped_linear", act="bfloat16", experts=e, device=DEVICE
        )
        _, copies, w = base.layer(name, n, k, 1)
        del one
        held = [t.unsqueeze(0).expand(e, *t.shape).contiguous() for t in copies[0]]
        dense = w.unsqueeze(0).expand(e, n, k).contiguous().transpose(1, 2)
        gluon, plain = GluonTiles().bind(op), PlainTriton().bind(op)
        for t in tokens:
            x = torch.randn(t * top, k, device="cuda").bfloat16()
            picks = [
                torch.rand(t, e, device="cuda").topk(top, dim=1).indices.reshape(-1)
                for _ in range(4)
            ]
            row = {"spec": name, "e": e, "k": k, "n": n, "tokens": t, "top": top}

            def bf16(i: Tensor, x: Tensor = x, dense: Tensor = dense) -> Tensor:
                ids, order = i.sort()
                ends = torch.searchsorted(ids, torch.arange(e, device="cuda"), right=True)
                return torch._grouped_mm(x[order], dense, offs=ends.int())

            calls = {
                "gluon": lambda i, x=x, run=gluon, v=held: run(v, x, i),
                "plain": lambda i, x=x, run=plain, v=held: run(v, x, i),
            }
            calls["bf16 grouped_mm"] = bf16
            for label, call in calls.items():
                if label == "plain" and t > 512:
                    continue
                try:
                    row[label] = round(graph_us([lambda i=i, c=call: c(i) for i in picks], 3), 1)
                except Exception as err:
                    row[label] = repr(err)[:160]
            rows.append(row)
            print("EXPERTS", row, flush=True)
    return rows


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("out"))
    ap.add_argument("--only", default="", help="steps whose names contain this")
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    steps = {
        "check_scaled": check_scaled,
        "check_experts": check_experts,
        "scaled": lambda: speed_scaled(4096, 28672) + speed_scaled(4096, 4096),
        "experts 8": lambda: speed_experts(8, 4096, 14336, 2, (1, 16, 64, 512, 4096)),
        "experts 128": lambda: speed_experts(128, 2048, 1536, 8, (1, 16, 64, 512, 4096)),
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
        if name.startswith("check"):
            for r in made[name]:
                print("CHECK", {**r, "worst": f"{r.get('worst', 0):.2e}"})
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
        (a.out / "scaled_and_experts.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
