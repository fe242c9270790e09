"""The kernels between a model's matrices, on one GPU: right, repeatable, and how long they take.

    python benchmarks/gpu_step.py --json out.json

Errors are relative Frobenius norms against float64 (the formula for attention, torch's own
rounding places for the rest); repeated calls must be equal bit for bit. Times are medians of CUDA
graphs of 40 calls over rotated inputs; torch's are those of its own operators in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from source_tree import use

use()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.kernels.between import NORMS  # noqa: E402
from quant_kernels_triton.attention_run import decode_step, run_step  # noqa: E402
from quant_kernels_triton.between_run import run_gated, run_norm, run_rotary  # noqa: E402

ATTENTION = (  # B, H, Hkv, L, D
    (1, 32, 8, 512, 128), (1, 9, 3, 140, 64), (2, 6, 2, 33, 80), (1, 24, 8, 1000, 96),
    (1, 8, 4, 700, 256), (64, 32, 8, 300, 128), (3, 20, 1, 77, 128), (1, 32, 8, 32768, 128),
)  # fmt: skip
TIMED = ((1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (64, 512), (64, 2048))  # B, L


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    each = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(each, 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def cases() -> dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], float]]:
    """Name -> (a function giving what came out and what should, largest error)."""
    out: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], float]] = {}
    gpu = {"device": "cuda"}

    def attention(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Any:
        def run() -> tuple[Tensor, Tensor]:
            b, h, hk, length, d = shape
            q = torch.randn(b, h, 1, d, dtype=dtype, **gpu)
            k, v = (torch.randn(b, hk, length, d, dtype=dtype, **gpu) for _ in "kv")
            masks = {
                "": None,
                "bool": torch.rand(b, 1, 1, length, **gpu) > 0.4,
                "half full": (torch.arange(length, **gpu) < length // 2)[None, None, None],
                "heads": torch.randn(1, h, 1, length, **gpu),
            }
            y = run_step([], q, k, v, masks[kind], d**-0.5)
            assert y is not None, "declined"
            again = run_step([], q, k, v, masks[kind], d**-0.5)
            assert torch.equal(y, again), "another result the second time"
            return y, exact(q, k, v, masks[kind], d**-0.5)

        return run

    def decode(shape: tuple[int, ...], at: int, dtype: torch.dtype) -> Any:
        def run() -> tuple[Tensor, Tensor]:
            b, h, hk, length, d = shape
            qkv = torch.randn(b, (h + 2 * hk) * d, dtype=dtype, **gpu)
            angle = torch.cat([torch.randn(1, d // 2, **gpu)] * 2, -1)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            keys, values = (torch.randn(b, hk, length, d, dtype=dtype, **gpu) for _ in "kv")
            old = keys.clone(), values.clone()
            keys[:, :, at:], values[:, :, at:] = torch.nan, torch.inf
            y = decode_step(qkv, cos, sin, torch.tensor([at], **gpu), keys, values, None, d**-0.5)
            q, k, v = qkv.view(b, -1, 1, d).double().split([h, hk, hk], 1)
            q, k = (rotated(t, cos.double(), sin.double()) for t in (q, k))
            seen = [torch.cat([t[:, :, :at].double(), new], 2) for t, new in zip(old, (k, v))]
            wrote = torch.stack([keys[:, :, at], values[:, :, at]]).double()
            assert error(wrote, torch.stack([k[:, :, 0], v[:, :, 0]])) < 4e-3, "cache"
            assert not keys[:, :, at + 1 :].isfinite().any(), "wrote beyond"
            return y, exact(q, *seen, None, d**-0.5).reshape(b, -1)

        return run

    def norm(shape: tuple[int, ...], form: frozenset[str], dtype: torch.dtype, add: bool) -> Any:
        def run() -> tuple[Tensor, Tensor]:
            x, r = (torch.randn(shape, dtype=dtype, **gpu) for _ in "xr")
            w = torch.randn(shape[-1], dtype=dtype, **gpu)
            got = run_norm("+".join(sorted(form)), [w], x, 1e-5, r if add else None)
            assert got is not None, "declined"
            if add:
                assert torch.equal(got[0], x + r), "sum"
                x, got = x + r, got[1]
            h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
            one = 1 if "unit_offset" in form else 0
            want = h * (w.float() + one) if "round_last" in form else h.to(dtype) * (w + one)
            return got, want.to(dtype)

        return run

    def rotary(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k = (torch.randn(2, 7, h, 128, dtype=dtype, **gpu).transpose(1, 2) for h in (32, 8))
        angle = torch.cat([torch.randn(2, 7, 64, **gpu)] * 2, -1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        got = run_rotary([], q, k, cos, sin)
        assert got is not None, "declined"
        want = [rotated(t, cos[:, None], sin[:, None]) for t in (q, k)]
        return torch.cat(got, 1), torch.cat(want, 1)

    def gated(act: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        g, u = torch.randn(33, 2 * 14336, dtype=dtype, **gpu).mul_(3).chunk(2, -1)
        got = run_gated(act, [], g, u)
        assert got is not None, "declined"
        f = F.silu if act == "silu" else lambda x: F.gelu(x, approximate="tanh")
        return got, f(g) * u

    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        name = str(dtype)[6:]
        for shape in ATTENTION:
            for kind in ("", "bool", "half full", "heads"):
                out[f"attention {shape} {kind} {name}"] = attention(shape, dtype, kind), 0.6 * unit
        for shape, at in (
            ((1, 32, 8, 512, 128), 128), ((1, 32, 8, 512, 128), 511), ((8, 32, 8, 512, 128), 0),
            ((64, 32, 8, 512, 128), 300), ((3, 6, 2, 100, 80), 99), ((1, 8, 8, 8192, 128), 700),
        ):  # fmt: skip
            out[f"decode {shape} at {at} {name}"] = decode(shape, at, dtype), 1.2 * unit
        for form in NORMS:
            for shape in ((1, 4096), (5, 576), (4096, 4096), (300, 128)):
                for add in (False, True):
                    label = f"norm {shape} {'+'.join(sorted(form))} {'add ' * add}{name}"
                    out[label] = norm(shape, form, dtype, add), 0.3 * unit
        out[f"rotary {name}"] = (lambda t=dtype: rotary(t)), 0.0
        for act in ("silu", "gelu_tanh"):
            out[f"gated {act} {name}"] = (lambda a=act, t=dtype: gated(a, t)), 0.3 * unit
    return out


def graph_us(calls: list[Callable[[], Any]]) -> float:
    """Median microseconds of a call, ``calls`` one behind the other in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(9):
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def _time_attention(b: int, length: int) -> dict[str, float]:
    bf = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(b, 32, 1, 128, **bf)
    size = b * 8 * length * 128 * 4
    sets = [
        [torch.randn(b, 8, length, 128, **bf) for _ in "kv"]
        for _ in range(max(1, min(40, (200 << 20) // size)))
    ]
    many = [sets[i % len(sets)] for i in range(40)]
    ours = graph_us([lambda kv=kv: run_step([], q, *kv, None, 0.09) for kv in many])
    torchs = graph_us(
        [lambda kv=kv: F.scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in many]
    )
    return {"ours": ours, "torch": torchs, "GB/s": size / ours / 1e3}


def _time_decode() -> dict[str, float]:
    bf = {"dtype": torch.bfloat16, "device": "cuda"}
    qkv, cos = torch.randn(1, 6144, **bf), torch.randn(1, 128, **bf)
    at = torch.tensor([128], device="cuda")
    sets = [[torch.randn(1, 8, 512, 128, **bf) for _ in "kv"] for _ in range(40)]
    calls = [lambda kv=kv: decode_step(qkv, cos, cos, at, *kv, None, 0.09) for kv in sets]
    return {"ours": graph_us(calls)}


def _time_rows(m: int) -> dict[str, dict[str, float]]:
    bf = {"dtype": torch.bfloat16, "device": "cuda"}
    x, r, w = torch.randn(m, 4096, **bf), torch.randn(m, 4096, **bf), torch.randn(4096, **bf)
    g, u = torch.randn(m, 28672, **bf).chunk(2, -1)
    count = 40 if m < 4096 else 5
    return {
        f"add, norm M={m}": {
            "ours": graph_us([lambda: run_norm("", [w], x, 1e-5, r)] * count),
            "torch": graph_us([lambda: F.rms_norm(x + r, (4096,), w, 1e-5)] * count),
        },
        f"gated M={m}": {
            "ours": graph_us([lambda: run_gated("silu", [], g, u)] * count),
            "torch": graph_us([lambda: F.silu(g) * u] * count),
        },
    }


def timings() -> dict[str, dict[str, float]]:
    """Name -> microseconds of ours and of torch's own operators; GB/s of attention."""
    out = {f"attention B={b} L={length}": _time_attention(b, length) for b, length in TIMED}
    out["rotation, cache, attention B=1 at 128 of 512"] = _time_decode()
    for m in (1, 8, 64, 4096):
        out |= _time_rows(m)
    return out


def main() -> int:
    """Check, then time; 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case, from case i")
    parser.add_argument("--no-times", dest="times", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "errors": {}, "wrong": {}}
    part, parts = map(int, args.part.split("/"))
    for name, (run, bound) in list(cases().items())[part::parts]:
        try:
            err = error(*run())
        except Exception as problem:
            results["wrong"][name] = f"{type(problem).__name__}: {problem}"[:500]
            continue
        results["errors"][name] = err
        if not err <= bound:
            results["wrong"][name] = f"error {err:.3g}, allowed {bound:.3g}"
    for name, what in results["wrong"].items():
        print(f"WRONG {name}: {what}", flush=True)
    worst: dict[str, float] = {}
    for name, err in results["errors"].items():
        kind = f"{name.split()[0]} {name.split()[-1]}"
        worst[kind] = max(worst.get(kind, 0.0), err)
    print(f"{len(results['errors'])} cases, worst errors: "
          + ", ".join(f"{k} {v:.2g}" for k, v in worst.items()), flush=True)  # fmt: skip
    if args.times:
        results["times_us"] = timings()
        for name, row in results["times_us"].items():
            print(f"{name:<46}" + "  ".join(f"{k} {v:.1f}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return int(bool(results["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
