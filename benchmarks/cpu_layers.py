"""Quantized linear layers on the CPU: our kernels, torch's own ops and bf16, interleaved.

    python benchmarks/cpu_layers.py                          the table of docs/performance.md
    python benchmarks/cpu_layers.py --shape 4096x14336 --tokens 1 --json out.json
    python benchmarks/cpu_layers.py --threads 1 --processor --only w4a16     on a busy machine
    python benchmarks/cpu_layers.py --reference --shape 4096x4096            torch_ref too

Every round runs each candidate once, so that a slow moment of the machine slows all of them alike;
reported are the median time, the median of the ratios to bf16 ``F.linear`` of the same round, and
the ratio of the best times, which says more where other work shares the cores.
Weights are cold: each candidate rotates over copies that together exceed ``--cold`` MiB.
Rows ``w8a8`` quantize x inside the call: one scale per token, or a stored one; ``torch _int_mm``
does the same with torch's ops. Rows ``cpu_round`` and ``torch_round`` round x first, to codes like
those of the weights; their ``error`` is that of rounding.
``read_gb_s`` is the speed of summing 256 MiB in the same run, the ceiling for few tokens; ``error``
the Frobenius error of up to 8 tokens against a float64 product with the same dequantized weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from plots import bar_chart
from torch import Tensor

from quant_core.kernels.choose import choose
from quant_core.registry import registry
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, Zero, block, group
from quant_core.tensors import LayerTensors, QuantizedTensor

MIB = 1 << 20
Run = Callable[[Tensor], Tensor]


def int4_layer(n: int, k: int, size: int, *, seed: int = 0) -> LayerTensors:
    """A random asymmetric 4-bit layer with float16 scales."""
    g = torch.Generator().manual_seed(seed)
    grid = (n, k // size)
    qt = QuantizedTensor(
        spec=QuantSpec(
            element=Element.uint(4),
            scales=(Scale(element="f16", grain=group(size)),),
            zero=Zero(kind="code"),
        ),
        shape=(n, k),
        codes=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g),
        scales=((torch.rand(grid, generator=g) * 0.004 + 0.004).half(),),
        zeros=torch.randint(6, 10, grid, dtype=torch.uint8, generator=g),
    )
    return LayerTensors(operands={"weight": qt})


def int8_layer(n: int, k: int, *, seed: int = 0) -> LayerTensors:
    """A random symmetric 8-bit layer with one float32 scale a row."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g).view(torch.uint8)
    qt = QuantizedTensor(
        spec=QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),)),
        shape=(n, k),
        codes=codes,
        scales=(torch.rand(n, 1, generator=g) * 2e-4 + 1e-4,),
    )
    return LayerTensors(operands={"weight": qt})


def random_layer(n: int, k: int, spec: QuantSpec, *, seed: int = 0) -> LayerTensors:
    """A random layer of small codes, float32 or e8m0 scales and, where needed, a table."""
    g = torch.Generator().manual_seed(seed)
    bits = spec.element.bits
    codes = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, generator=g)
    if bits == 8:
        codes &= 0xBF  # below 2: neither infinity nor NaN
    (rows, columns) = spec.scales[0].grain
    grid = (-(-n // rows), -(-k // columns) if columns else 1)
    scale = torch.rand(grid, generator=g) * 0.01 + 0.01
    if spec.scales[0].element == "e8m0":
        scale = torch.randint(118, 122, grid, dtype=torch.uint8, generator=g)
    table = torch.linspace(-1, 1, 16) ** 3 if spec.element.kind == "lut" else None
    zeros = torch.rand(grid, generator=g) * 15 if spec.zero is not None else None
    qt = QuantizedTensor(
        spec=spec, shape=(n, k), codes=codes, scales=(scale,), zeros=zeros,
        codebook=() if table is None else (table,),
    )  # fmt: skip
    return LayerTensors(operands={"weight": qt})


_E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")
FLOATS = {
    "fp8 channel": QuantSpec(element=_E4M3, scales=(Scale(element="f32", grain=CHANNEL),)),
    "fp8 128x128": QuantSpec(element=_E4M3, scales=(Scale(element="f32", grain=block(128, 128)),)),
    "mxfp8 g32": QuantSpec(element=_E4M3, scales=(Scale(element="e8m0", grain=group(32)),)),
    "mxfp6 g32": QuantSpec(
        element=Element(name="fp6_e2m3", bits=6, kind="float"),
        scales=(Scale(element="e8m0", grain=group(32)),),
    ),
    "mxfp4 g32": QuantSpec(
        element=Element(name="fp4_e2m1", bits=4, kind="float"),
        scales=(Scale(element="e8m0", grain=group(32)),),
    ),
    "nf4 g64": QuantSpec(
        element=Element(name="nf4", bits=4, kind="lut"),
        scales=(Scale(element="f32", grain=group(64)),),
    ),
    "float zeros g64": QuantSpec(
        element=Element.uint(4),
        scales=(Scale(element="f32", grain=group(64)),),
        zero=Zero(kind="code", element="f32"),
    ),
}
"""Layers of floats: 8-bit codes, a table, zero points."""


def _made(element: Element, scale: str, grain: tuple[int, int], rule: str = "") -> QuantSpec:
    fine = Scale(element=scale, grain=grain, static=False, rule=rule)
    return QuantSpec(element=element, scales=(fine,))


ROUNDED = {
    "fp8 channel": _made(_E4M3, "f32", CHANNEL),
    "fp8 128x128": _made(_E4M3, "f32", group(128)),
    "mxfp6 g32": _made(FLOATS["mxfp6 g32"].element, "e8m0", group(32), "even"),
    "mxfp4 g32": _made(FLOATS["mxfp4 g32"].element, "e8m0", group(32), "even"),
}
"""Activations of some of them, rounded in front of the products."""


def rotate(runs: Sequence[Run]) -> Run:
    """One copy of the weights after another."""
    turn = itertools.cycle(runs)
    return lambda x: next(turn)(x)


def copies(nbytes: int, cold_mib: int) -> int:
    return max(1, min(64, -(-cold_mib * MIB // nbytes)))


def int8_input(*, static: bool, zero: bool = False) -> QuantSpec:
    """int8 activations: one scale per token, or a stored one of the tensor."""
    grain = TENSOR if static else CHANNEL
    return QuantSpec(
        element=Element.int(8),
        scales=(Scale(element="f32", grain=grain, static=static),),
        zero=Zero(kind="code", element="int8") if zero else None,
    )


def ours(
    lt: LayerTensors, name: str, cold_mib: int, acts: QuantSpec | None = None
) -> tuple[Run, int]:
    """The named kernel on copies of a layer, and the bytes one copy takes."""
    n, k = lt.weight.shape
    side = {"input_scale": lt.input_scale, "input_zero": lt.input_zero}
    op = OpSpec(
        op="linear",
        operands=(("weight", lt.weight.spec), *([("input", acts)] if acts else [])),
        sizes=(("n", n), ("k", k), ("k_stored", k)),
        features=frozenset(f for f, t in side.items() if t is not None),
    )
    choice = choose(op, registry(), kernels=name)
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    bound = choice.kernel.bind(choice.op)
    nbytes = sum(t.numel() * t.element_size() for t in buffers.values())
    sets = [[t.clone() for t in buffers.values()] for _ in range(copies(nbytes, cold_mib))]
    return rotate([lambda x, s=s: bound(s, x) for s in sets]), nbytes


def torch_int4(lt: LayerTensors, size: int, cold_mib: int) -> tuple[Run, int]:
    """``torch.ops.aten._weight_int4pack_mm_for_cpu``: value (q - 8) * scale + zero, in bfloat16."""
    from quant_core.dequantize import unpack_codes

    qt = lt.weight
    assert qt.zeros is not None
    scale = qt.scales[0].float()
    both = torch.stack([scale, (8 - qt.zeros.float()) * scale], dim=-1).transpose(0, 1)
    params = both.contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(qt).int(), 1)
    nbytes = packed.numel() * packed.element_size() + params.numel() * 2
    sets = [(packed.clone(), params.clone()) for _ in range(copies(nbytes, cold_mib))]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return rotate([lambda x, s=s: op(x, s[0], size, s[1]) for s in sets]), nbytes


def torch_int8(lt: LayerTensors, cold_mib: int) -> tuple[Run, int]:
    """``torch.ops.aten._weight_int8pack_mm``."""
    codes, scale = lt.weight.codes.view(torch.int8), lt.weight.scales[0].view(-1).bfloat16()
    sets = [codes.clone() for _ in range(copies(codes.numel(), cold_mib))]
    op = torch.ops.aten._weight_int8pack_mm
    return rotate([lambda x, w=w: op(x, w, scale) for w in sets]), codes.numel()


def torch_int_mm(lt: LayerTensors, cold_mib: int) -> tuple[Run, int]:
    """``torch._int_mm`` with a scale per token made and applied by torch's ops."""
    codes, scale = lt.weight.codes.view(torch.int8), lt.weight.scales[0].view(1, -1)
    sets = [codes.clone().t() for _ in range(copies(codes.numel(), cold_mib))]

    def run(x: Tensor, w: Tensor) -> Tensor:
        s = x.abs().amax(-1, keepdim=True).float() / 127
        q = (x / s).round().clamp(-128, 127).to(torch.int8)
        return (torch._int_mm(q, w).float() * s * scale).to(x.dtype)

    return rotate([lambda x, w=w: run(x, w) for w in sets]), codes.numel()


def dense(lt: LayerTensors, cold_mib: int) -> tuple[Run, int]:
    """bf16 ``F.linear``: the anchor of every ratio."""
    w = lt.dequantize().bfloat16()
    nbytes = w.numel() * 2
    sets = [w.clone() for _ in range(copies(nbytes, cold_mib))]
    return rotate([lambda x, w=w: F.linear(x, w) for w in sets]), nbytes


def candidates(
    n: int, k: int, tokens: int, cold: int, reference: bool, only: Sequence[str] = ("",)
) -> dict[str, tuple[Run, int, LayerTensors]]:
    """Name -> (run, bytes of weights, layer) of what runs at this size and has one of ``only`` in
    its name, and of bf16."""
    out: dict[str, tuple[Run, int, LayerTensors]] = {}

    def add(name: str, lt: LayerTensors, make: Callable[..., tuple[Run, int]], *args: Any) -> None:
        if not out or any(o in name for o in only):
            out[name] = (*make(lt, *args), lt)

    i8 = int8_layer(n, k)
    layers = {size: int4_layer(n, k, size) for size in (32, 128) if k % size == 0}
    add("bf16 F.linear", next(iter(layers.values())), dense, cold)
    for size, lt in layers.items():
        add(f"w4a16 g{size}", lt, ours, "cpu_wna16", cold)
        add(f"w4a8 g{size}", lt, ours, "cpu_w4a8", cold)
        if tokens <= 64:  # 5 to 13 times slower than bf16 above: nothing to compare with
            add(f"torch int4pack g{size}", lt, torch_int4, size, cold)
    for name, spec in FLOATS.items():
        if not any(o in name or name in o for o in only):
            continue
        lt = random_layer(n, k, spec)
        add(name, lt, ours, "cpu_wna16", cold)
        if reference:
            add(f"{name} ref", lt, ours, "torch_ref", 0)
        if name in ROUNDED:
            for by in ("cpu_round", "torch_round"):
                named = f"cpu_wna16@rounded,quantize={by}"
                add(f"{name} {by}", lt, ours, named, cold, ROUNDED[name])
    add("w8a16 channel", i8, ours, "cpu_wna16", cold)
    stored = replace(i8, input_scale=torch.tensor([4.5 / 127]))
    shifted = replace(stored, input_zero=torch.tensor([3], dtype=torch.uint8))
    asym = int8_input(static=True, zero=True)
    add("w8a8 token", i8, ours, "cpu_w8a8", cold, int8_input(static=False))
    add("w8a8 static", stored, ours, "cpu_w8a8", cold, int8_input(static=True))
    add("w8a8 static asym", shifted, ours, "cpu_w8a8", cold, asym)
    add("torch _int_mm", i8, torch_int_mm, cold)
    if tokens <= 64:
        add("torch int8pack", i8, torch_int8, cold)
    return out


def read_speed(nbytes: int = 256 * MIB) -> float:
    """GB/s of reading memory that no cache holds."""
    data = torch.ones(nbytes // 8, dtype=torch.int64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return nbytes / best / 1e9


def measure(
    runs: dict[str, Run], x: Tensor, rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds per call of every round, by ``clock``."""
    loops = {}
    for name, run in runs.items():
        run(x)
        start = clock()
        run(x)
        loops[name] = max(1, int(seconds / (clock() - start)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            for _ in range(loops[name]):
                run(x)
            times[name].append((clock() - start) / loops[name])
    return times


def bench(n: int, k: int, tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = candidates(n, k, tokens, args.cold, args.reference, args.only or [""])
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    clock = time.process_time if args.processor else time.perf_counter
    runs = {name: run for name, (run, _, _) in found.items()}
    times = measure(runs, x, args.rounds, args.round, clock)
    anchor = times["bf16 F.linear"]
    rows = []
    for name, (run, nbytes, lt) in found.items():
        exact = F.linear(x[:8].double(), lt.dequantize().double())
        seconds = statistics.median(times[name])
        rows.append(
            {
                "shape": f"{n}x{k}",
                "tokens": tokens,
                "kernel": name,
                "us": seconds * 1e6,
                "ratio": statistics.median(a / t for a, t in zip(anchor, times[name])),
                "ratio_best": min(anchor) / min(times[name]),
                "weight_gb_s": nbytes / seconds / 1e9,
                "tflops": 2 * tokens * n * k / seconds / 1e12,
                "error": float((run(x)[:8].double() - exact).norm() / exact.norm()),
            }
        )
    return rows


def overhead_us(calls: int = 3000) -> float:
    """Microseconds of a call whose layer is too small to matter."""
    run, _ = ours(int4_layer(32, 32, 32), "cpu_wna16", 0)
    x, best = torch.randn(1, 32).bfloat16(), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            run(x)
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        models = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": metadata.version("quant-kernels-cpu"),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _bar_label(row: dict[str, Any]) -> str:
    ours = "ours " if row["kernel"].startswith("w") else ""
    return f"{ours}{row['kernel']}  {row['shape']}  M={row['tokens']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=["4096x14336", "4096x4096", "576x1536"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round", type=float, default=0.02, help="seconds per candidate and round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor", action="store_true", help="processor time; best with --threads 1"
    )
    parser.add_argument("--only", nargs="*", help="candidates whose name holds one of these")
    parser.add_argument("--reference", action="store_true", help="time torch_ref on floats too")
    parser.add_argument("--cold", type=int, default=256, help="MiB of weights to rotate over")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--plot", help="write a bar chart of the ratios to bf16 here, as SVG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = machine() | {"read_gb_s": read_speed(), "call_us": overhead_us()}
    print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in info.items()))
    print(
        f"{'shape':>12} {'M':>4}  {'kernel':<20} {'us':>9} {'x bf16':>7} {'GB/s':>6} {'error':>8}"
    )
    rows = []
    for shape, tokens in itertools.product(args.shape, args.tokens):
        n, k = (int(v) for v in shape.split("x"))
        for r in bench(n, k, tokens, args):
            rows.append(r)
            print(
                f"{r['shape']:>12} {r['tokens']:>4}  {r['kernel']:<20} {r['us']:>9.0f} "
                f"{r['ratio']:>7.2f} {r['ratio_best']:>6.2f} {r['weight_gb_s']:>6.1f} "
                f"{r['error']:>8.1e}",
                flush=True,
            )
    info["load_after"] = os.getloadavg()[0]
    if args.plot:
        title = f"Layers, {args.threads} thread(s): speed relative to bf16 F.linear"
        bars = [(_bar_label(r), round(r["ratio"], 2)) for r in rows]
        with open(args.plot, "w", encoding="utf-8") as f:
            f.write(bar_chart(title, bars))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"machine": info, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
