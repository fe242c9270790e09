"""Every installed kernel, PyTorch's own and bf16 side by side on one GPU.

    python benchmarks/gpu.py --shapes 4096x4096,4096x28672 --schemes int4,fp8 --rows 1,16,256 \
        --json out.json --markdown out.md

SHAPES are KxN (in_features x out_features), SCHEMES names of what the installed plugins make of
float weights. Per shape, scheme and number of rows, all kernels that accept the operation run on
their own cold weights, interleaved in one process with bf16 ``F.linear`` and, for int4, PyTorch's
``_weight_int4pack_mm``. The error is that of up to 64 rows against a float64 product of the
canonical weights with the activations as the scheme rounds them. ``chosen`` marks what the plan
picks; ``graph`` says whether a graph's replay equals the eager call bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from source_tree import use

use()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_report import markdown  # noqa: E402

from quant_core.build import op_spec  # noqa: E402
from quant_core.kernels.activations import fake_quantize  # noqa: E402
from quant_core.kernels.choose import accepting, choose  # noqa: E402
from quant_core.kernels.measured import op_key, save  # noqa: E402
from quant_core.kernels.timing import (  # noqa: E402
    captured,
    copies_for,
    host_us,
    interleaved,
)
from quant_core.live import quantize_matrix  # noqa: E402
from quant_core.nn import with_packing  # noqa: E402
from quant_core.registry import registry  # noqa: E402
from quant_core.spec import CHANNEL, Element, QuantSpec, Scale  # noqa: E402

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("int4", {"group_size": 128}),
    "int4-g32": ("int4", {"group_size": 32}),
    "int8a16": ("int8", {"activations": False}),
    "fp8": ("compressed_tensors:fp8", {}),
    "fp8a16": ("compressed_tensors:fp8", {"activations": False}),
    "fp8_block": ("compressed_tensors:fp8_block", {}),
    "int8": ("int8", {}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("compressed_tensors:mxfp8", {}),
    "w4a8": ("int4", {"group_size": 128}),
}
_FP8_TOKEN = QuantSpec(
    element=Element(name="fp8_e4m3", bits=8, kind="float"),
    scales=(Scale(element="f32", grain=CHANNEL, static=False),),
)
ACTIVATIONS = {"w4a8": _FP8_TOKEN}
"""Activations that the online scheme has not."""

DEFAULT_SHAPES = "4096x4096,4096x28672,14336x4096,5120x13824,3584x18944"
DEFAULT_ROWS = "1,2,4,8,16,32,64,128,256,1024,4096"


@dataclass
class Bench:
    """What is measured in this run, and what came out."""

    rows: list[int]
    deadline: float
    only: set[str]
    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)

    def failed(self, where: str, err: Exception) -> None:
        text = f"{type(err).__name__}: {str(err)[:600]}"
        self.problems.append({"where": where, "error": text})
        print(f"PROBLEM {where}: {text}", flush=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()


def relative_error(y: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``want`` (float64)."""
    return float((y.double() - want).norm() / want.norm())


def _contestants(op: Any, lt: Any, bench: Bench) -> tuple[dict[str, Any], Any]:
    """name -> (answer, op as run, buffers of each copy, run), and the plan's choice."""
    found: dict[str, Any] = {}
    for kernel, mine, said in accepting(op, registry()):
        if kernel.name == "torch_ref" or (bench.only and kernel.name not in bench.only):
            continue
        try:
            first = kernel.allocate(mine, "cuda")
            kernel.load_(first, mine, with_packing(lt, mine.packing), {"row": 0})
            nbytes = sum(t.numel() * t.element_size() for t in first.values())
            sets = [first]
            for _ in range(copies_for(nbytes) - 1):
                sets.append({n: t.clone() for n, t in first.items()})
            run = kernel.bind(mine)
            found[kernel.name] = (said, [list(s.values()) for s in sets], run, nbytes)
        except Exception as err:
            bench.failed(f"{kernel.name} load", err)
    return found, choose(op, registry())


def _winner(choice: Any, rows: int) -> str:
    for bucket in choice.buckets:
        if rows <= bucket.rows:
            return str(bucket.kernel)
    return str(choice.kernel.name)


def _int4_peer(k: int, n: int) -> list[Any]:
    """PyTorch's own int4 op on random codes: (weights, scales and zeros) per copy."""
    sets = []
    for _ in range(copies_for(k * n / 2)):
        raw = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
        grid = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        sets.append((packed, grid))
    return sets


def _hopeless(times: dict[str, float], m: int, before: dict[str, tuple[int, float]]) -> set[str]:
    """Contestants that more rows cannot bring back: far behind, or behind and growing with M."""
    best, out = min(times.values()), set()
    for name, us in times.items():
        rows, last = before.get(name, (m, us))
        grows = us / last > 0.5 * m / rows
        if m >= 64 and (us > 25 * best or (us > 3 * best and grows)):
            out.add(name)
    return out


def measure(bench: Bench, k: int, n: int, scheme: str) -> None:
    """All contestants of one shape and scheme for every number of rows."""
    torch.manual_seed(0)
    weight = torch.randn(n, k, device="cuda").mul_(0.02).bfloat16()
    online, options = SCHEMES[scheme]
    made, lt = quantize_matrix(online, weight, options=options)
    op = op_spec("linear", lt, made, device="cuda", dtype=torch.bfloat16)
    if scheme in ACTIVATIONS:
        op = replace(op, operands=(*op.operands, ("input", ACTIVATIONS[scheme])))
    found, choice = _contestants(op, lt, bench)
    dense = lt.dequantize().double()
    plain = [weight.clone() for _ in range(copies_for(weight.numel() * 2))]
    peer = _int4_peer(k, n) if scheme == "int4" else []
    acts = op.operand("input")
    costs: dict[str, list[list[float]]] = {}
    before: dict[str, tuple[int, float]] = {}
    hopeless: set[str] = set()
    for m in bench.rows:
        if bench.left() < 5:
            bench.problems.append({"where": f"{k}x{n} {scheme} M={m}", "error": "out of time"})
            return
        x = torch.randn(m, k, device="cuda").bfloat16()
        some = x[:64]
        rounded = some if acts is None else fake_quantize(some.float(), acts)
        want = rounded.double() @ dense.t()
        calls: dict[str, list[Any]] = {
            "bf16 F.linear": [lambda w=w, x=x: F.linear(x, w) for w in plain]
        }
        if peer:
            calls["torch int4"] = [
                lambda s=s, x=x: torch.ops.aten._weight_int4pack_mm(x, s[0], 128, s[1])
                for s in peer
            ]
        for name, (said, sets, run, _) in found.items():
            if said.cost_at(m) < math.inf:
                calls[name] = [lambda v=v, x=x, run=run: run(v, x) for v in sets]
        graphs, facts = {}, {}
        for name in hopeless & set(calls):
            del calls[name]
        for name, thunks in calls.items():
            try:
                eager = thunks[0]()
                graph, outputs = captured(thunks)
                for out in outputs:
                    out.fill_(float("nan"))
                graph.replay()
                torch.cuda.synchronize()
                facts[name] = {
                    "graph": bool(torch.equal(outputs[0], eager)),
                    "error": relative_error(eager[:64], want) if name in found else None,
                    "host_us": host_us(thunks[0]) if m in (1, 16) else None,
                }
                graphs[name] = (graph, len(thunks))
            except Exception as err:
                bench.failed(f"{name} {k}x{n} {scheme} M={m}", err)
                torch.cuda.synchronize()
        times = interleaved(graphs)
        chosen = _winner(choice, m)
        hopeless |= _hopeless(times, m, before) - {chosen, "bf16 F.linear"}
        before = {name: (m, us) for name, us in times.items()}
        for name, us in times.items():
            bench.records.append(
                {"k": k, "n": n, "scheme": scheme, "rows": m, "who": name, "us": us,
                 "chosen": name == chosen, "ratio": times["bf16 F.linear"] / us,
                 "bytes": found[name][3] if name in found else None, **facts[name]}
            )  # fmt: skip
            if name in found:
                costs.setdefault(name, []).append([m, us])
        line = ", ".join(f"{w}{'*' if w == chosen else ''} {t:.1f}" for w, t in times.items())
        print(f"{k}x{n} {scheme} M={m}: {line}", flush=True)
        del graphs
    save(op.device, {op_key(op): costs})


def main() -> int:
    """Measure; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default=DEFAULT_SHAPES)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rows", default=DEFAULT_ROWS)
    parser.add_argument("--kernels", default="", help="only these, and the peers")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    bench = Bench(
        rows=[int(m) for m in args.rows.split(",")],
        deadline=time.monotonic() + args.seconds,
        only={n for n in args.kernels.split(",") if n},
    )
    for shape in args.shapes.split(","):
        for scheme in args.schemes.split(","):
            k, n = (int(p) for p in shape.split("x"))
            if bench.left() < 10:
                bench.problems.append({"where": f"{shape} {scheme}", "error": "out of time"})
                continue
            try:
                measure(bench, k, n, scheme)
            except Exception as err:
                bench.failed(f"{shape} {scheme}", err)
            gc.collect()
            torch.cuda.empty_cache()
    data = {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda},
        "date": time.strftime("%Y-%m-%d"),
        "records": bench.records,
        "problems": bench.problems,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(data))
    text = markdown(data)
    if args.markdown:
        args.markdown.write_text(text)
    print(text)
    return int(bool(bench.problems))


if __name__ == "__main__":
    sys.exit(main())
