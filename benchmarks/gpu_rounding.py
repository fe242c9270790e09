"""Rounding and Hadamard transforms of activations on a GPU: are they right, what do they cost.

    python benchmarks/gpu_rounding.py --json out.json [--workers 12]

Every spec of the interpreter's tests, in the three dtypes, against the reference on the CPU and on
the device, bit for bit. Then microseconds in a CUDA graph (rotated over copies of x beyond the L2)
and of the host in an eager call, beside the reference's torch ops. Hadamard transforms against
float64 products with the matrix, and timed beside torch's product with it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
from quant_core.kernels.hadamard import TorchHadamard, factors  # noqa: E402
from quant_core.kernels.quantizer import TorchRound  # noqa: E402
from quant_core.spec import OpSpec  # noqa: E402
from quant_kernels_triton.hadamard_kernel import Hadamard  # noqa: E402
from quant_kernels_triton.rounding_kernel import Round  # noqa: E402
from triton_hadamard import hadamard_matrix  # noqa: E402
from triton_rounded import SPECS, inputs, same_bits, stored  # noqa: E402

ACTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TIMED = ("fp8 token", "int8 token", "mx fp4_e2m1 even", "mx fp8_e4m3 rceil", "nvfp4 stored",
         "nvfp4", "fp8 groups", "fp8 stored")  # fmt: skip
_L2 = 96 << 20


def op_of(name: str, k: int, act: str, *, early: bool = False) -> OpSpec:
    """The operation of a spec on the device; ``early``: before a product that starts early."""
    scale, zero = stored(SPECS[name], k)
    features = {"starts_early"} if early else set()
    features |= {"input_scale"} if scale is not None else set()
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
        runs = {e: Round().bind(op_of(name, k, act, early=bool(e))) for e in ("", ", early")}
        held = _on_device(scale, zero)
        for part, rows in (("all", x), ("finite", x[:8]), ("one", x[:1]), ("many", x.repeat(3, 1))):
            want = fake_quantize(rows, SPECS[name], scale, zero)
            here = fake_quantize(rows.cuda(), SPECS[name], *held)
            for turn, (early, run) in itertools.product(("first", "kept"), runs.items()):
                got = run([], rows.cuda(), *held)
                row[f"{part}, {turn}{early}"] = int((~same_bits(got.cpu(), want)).sum())
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


ORDERS = ((1, 128, 4096), (1, 512, 4096), (1, 4096, 4096), (1, 16384, 16384), (28, 512, 14336),
          (12, 32, 12288), (20, 256, 5120))  # fmt: skip


def _signs(core: int, size: int) -> Tensor:
    """C x S with random signs of rows and columns, int8, made on the device."""
    i = torch.arange(size, device="cuda")
    parity = i[:, None] & i[None, :]
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    s, c = (1 - 2 * (parity & 1)).to(torch.int8), hadamard_matrix(core, 1).cuda()
    n, g = core * size, torch.Generator("cuda").manual_seed(3)
    rows, cols = (torch.randint(0, 2, (n,), device="cuda", generator=g) * 2 - 1 for _ in range(2))
    h = (c[:, None, :, None] * s[None, :, None, :]).view(n, n)
    return h * rows[:, None].to(torch.int8) * cols.to(torch.int8)


@functools.lru_cache(1)
def _held(core: int, size: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The matrix, its factors and the root of its order, on the device."""
    signs = _signs(core, size)
    f = factors(signs)
    assert f is not None
    root = torch.tensor([(core * size) ** 0.5], device="cuda")
    return signs, [t.cuda() for t in (f.rows, f.core, f.cols)], root


def _hadamard_op(core: int, size: int, k: int, act: str) -> OpSpec:
    sizes = (("k", k), ("n", core * size), ("m", core))
    return OpSpec(op="hadamard", operands=(), sizes=sizes, act_dtype=act, device=("cuda", "9.0"))


def check_hadamard(case: tuple[int, int, int]) -> dict[str, Any]:
    """Errors of one order against a float64 product with the matrix."""
    core, size, k = case
    row: dict[str, Any] = {"order": f"{core} x {size}", "k": k}
    try:
        dense, parts, root = _held(core, size)
        n = core * size
        for act, dtype in ACTS.items():
            run = Hadamard().bind(_hadamard_op(core, size, k, act))
            for m in (1, 17):
                x = torch.randn(m, k, dtype=dtype, device="cuda")
                want = (x.double().view(-1, n) @ dense.double()).view(m, k)
                for text, divisor in ((f"{act} {m}", None), (f"{act} {m} root", root)):
                    y = run([], x, *parts, divisor).double()
                    y = y if divisor is None else y * n**0.5
                    row[text] = ((y - want).norm() / want.norm()).item()
    except Exception as err:  # a benchmark goes on and reports it
        row["problem"] = f"{type(err).__name__}: {err}"[:400]
    return row


def time_hadamard(case: tuple[int, int, int], m: int) -> dict[str, Any]:
    """Device and host time beside torch's operations and the product with the whole matrix."""
    core, size, k = case
    dense, parts, root = _held(core, size)
    copies = max(4, min(64, _L2 // (m * k * 4)))
    xs = [torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    op, whole = _hadamard_op(core, size, k, "bfloat16"), dense.bfloat16()
    run, plain = Hadamard().bind(op), TorchHadamard().bind(op)
    return {
        "order": f"{core} x {size}",
        "k": k,
        "rows": m,
        "floor_us": m * k * 4 / 3.0e6,
        "us": graph_us(lambda i: run([], xs[i], *parts, root), copies),
        "torch_us": graph_us(lambda i: plain([], xs[i], *parts, root), copies),
        "bf16_matmul_us": graph_us(lambda i: xs[i].view(-1, core * size) @ whole, copies),
        "host_us": host_us(lambda: run([], xs[0], *parts, root)),
    }


def _shown(row: dict[str, Any]) -> str:
    return json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()})


def transforms(workers: int) -> list[dict[str, Any]]:
    """Every order: its errors, then its times."""
    with multiprocessing.get_context("spawn").Pool(min(workers, len(ORDERS))) as pool:
        out = []
        for row in pool.imap_unordered(check_hadamard, ORDERS, chunksize=1):
            print(_shown(row), flush=True)
            out.append(row)
    for case in ORDERS:
        for m in (1, 256, 4096):
            try:
                out.append(time_hadamard(case, m))
            except Exception as err:  # a benchmark goes on and reports it
                out.append({"order": case, "problem": f"{type(err).__name__}: {err}"[:400]})
            print(_shown(out[-1]), flush=True)
    return out


def rounding(only: str | None, workers: int) -> dict[str, Any]:
    """Every spec against the reference, then the times of some."""
    names = [n for n in SPECS if not only or only in n]
    cases = [(n, act, k) for n in names for act, k in (("bfloat16", 4096), ("float32", 200))]
    cases += [(n, "float16", 200) for n in names]
    begin = time.time()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        checked = pool.map(check, cases, chunksize=4)
    bad = [r for r in checked if any(v for k, v in r.items() if k not in ("spec", "act", "k"))]
    print(f"{len(checked)} cases, {len(bad)} with differences, {time.time() - begin:.0f} s")
    for row in bad[:40]:
        print(json.dumps(row))
    timed: list[dict[str, Any]] = []
    for name in (n for n in TIMED if n in names):
        for m, k in ((1, 4096), (16, 14336), (256, 4096), (4096, 14336)):
            try:
                timed.append(measure(name, m, k))
            except Exception as err:  # a benchmark goes on and reports it
                timed.append({"spec": name, "problem": f"{type(err).__name__}: {err}"[:400]})
            print(_shown(timed[-1]), flush=True)
    return {"checked": checked, "timed": timed}


def main() -> None:
    """Both parts, or one; checks in processes of their own, then the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--part", choices=("rounding", "hadamard"))
    parser.add_argument("--only", help="specs whose name holds this")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.part != "rounding":
        found["hadamard"] = transforms(args.workers)
    if args.part != "hadamard":
        found |= rounding(args.only, args.workers)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
