"""Rounding activations on a GPU: equal to the reference on the CPU, and what it costs.

    python benchmarks/gpu_rounding.py --json out.json [--workers 12]

Every spec of the interpreter's tests, in the three dtypes, against the reference on the CPU and on
the device, bit for bit. Then microseconds in a CUDA graph (rotated over copies of x beyond the L2)
and of the host in an eager call, beside the reference's torch ops.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from source_tree import REPO, use

use()
sys.path.insert(0, str(REPO / "plugins/kernels_triton/tests/support"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.kernels.activations import fake_quantize  # noqa: E402
from quant_core.kernels.quantizer import TorchRound  # noqa: E402
from quant_core.spec import OpSpec  # noqa: E402
from quant_kernels_triton.rounding_kernel import Round  # noqa: E402
from triton_rounded import SPECS, inputs, same_bits, stored  # noqa: E402

ACTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TIMED = ("fp8 token", "int8 token", "mx fp4_e2m1 even", "mx fp8_e4m3 rceil", "nvfp4 stored",
         "nvfp4", "fp8 groups", "fp8 stored")  # fmt: skip
_L2 = 96 << 20


def op_of(name: str, k: int, act: str) -> OpSpec:
    """The operation of a spec on the device."""
    scale, zero = stored(SPECS[name], k)
    features = {"input_scale"} if scale is not None else set()
    features |= {"input_zero"} if zero is not None else set()
    return OpSpec(
        op="quantize",
        operands=(("input", SPECS[name]),),
        sizes=(("k", k),),
        act_dtype=act,
        device=("cuda", "9.0"),
        features=frozenset(features),
    )


def _on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


def check(case: tuple[str, str, int]) -> dict[str, Any]:
    """One spec, dtype and width: how many results differ from the reference's."""
    name, act, k = case
    row: dict[str, Any] = {"spec": name, "act": act, "k": k}
    try:
        x, (scale, zero) = inputs(k, ACTS[act]), stored(SPECS[name], k)
        run = Round().bind(op_of(name, k, act))
        held = _on_device(scale, zero)
        for part, rows in (("all", x), ("finite", x[:8]), ("one", x[:1])):
            want = fake_quantize(rows, SPECS[name], scale, zero)
            here = fake_quantize(rows.cuda(), SPECS[name], *held)
            for turn in ("first", "kept"):
                got = run([], rows.cuda(), *held)
                row[f"{part}, {turn}"] = int((~same_bits(got.cpu(), want)).sum())
            row[f"{part}, reference there"] = int((~same_bits(here.cpu(), want)).sum())
    except Exception as err:  # a benchmark goes on and reports it
        row["problem"] = f"{type(err).__name__}: {err}"[:400]
    return row


def graph_us(call: Callable[[int], Any], copies: int) -> float:
    """Median of graph replays, each with one call per copy."""
    for i in range(copies):
        call(i)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    times = []
    for _ in range(15):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / copies * 1e3)
    return sorted(times)[len(times) // 2]


def host_us(call: Callable[[], Any], calls: int = 100) -> float:
    """Least mean of several rounds; the device is idle when a round begins."""
    rounds = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - begin) / calls * 1e6)
    torch.cuda.synchronize()
    return min(rounds)


def measure(name: str, m: int, k: int) -> dict[str, Any]:
    """Device and host time of our kernel and of the reference's torch ops."""
    op = op_of(name, k, "bfloat16")
    held = _on_device(*stored(SPECS[name], k))
    copies = max(4, min(64, _L2 // (m * k * 4)))
    xs = [torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    row: dict[str, Any] = {"spec": name, "rows": m, "k": k, "floor_us": m * k * 4 / 3.0e6}
    for label, kernel in (("us", Round()), ("torch_us", TorchRound())):
        run = kernel.bind(op)
        row[label] = graph_us(lambda i, run=run: run([], xs[i], *held), copies)
        row[f"host_{label}"] = host_us(lambda run=run: run([], xs[0], *held))
    return row


def main() -> None:
    """Checks in processes of their own, then the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    cases = [(n, act, k) for n in SPECS for act, k in (("bfloat16", 4096), ("float32", 200))]
    cases += [(n, "float16", 200) for n in list(SPECS)[:36]]
    begin = time.time()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        checked = pool.map(check, cases, chunksize=4)
    bad = [r for r in checked if any(v for k, v in r.items() if k not in ("spec", "act", "k"))]
    print(f"{len(checked)} cases, {len(bad)} with differences, {time.time() - begin:.0f} s")
    for row in bad[:40]:
        print(json.dumps(row))
    timed: list[dict[str, Any]] = []
    for name in TIMED:
        for m, k in ((1, 4096), (16, 14336), (256, 4096), (4096, 14336)):
            try:
                timed.append(measure(name, m, k))
            except Exception as err:  # a benchmark goes on and reports it
                timed.append({"spec": name, "problem": f"{type(err).__name__}: {err}"[:400]})
            row = {k: round(v, 1) if isinstance(v, float) else v for k, v in timed[-1].items()}
            print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"checked": checked, "timed": timed}, indent=1))


if __name__ == "__main__":
    main()
