"""What an eager call costs the host, and whether joined layers and graphs give the same numbers.

    python benchmarks/gpu_host.py --json out.json [--schemes int4,w4a8] [--shape 14336x4096]

Microseconds of one call without waiting for the device; least mean of 60 rounds of 60 calls. Each
kernel through its bound function, the module around it, and ``F.linear`` in bf16 in turn with them:
what other programs cost the host, all of them pay. ``median_us`` is the median of the rounds,
``replayed`` whether Triton's part of a call is done by the launches of an earlier one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from source_tree import use

use()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from quant_core.dequantize import dense_weight  # noqa: E402
from quant_core.live import linear_of  # noqa: E402
from quant_core.shared import joined, share_inputs  # noqa: E402

N = K = 4096  # of q, k and v
KERNELS = (
    ("int4", "cuda_decode", (1, 16)),
    ("int4", "gluon_wna16", (1, 32, 300)),
    ("int4", "tiles16", (1, 32, 64)),
    ("compressed_tensors:fp8", "triton_scaled", (1,)),
    ("compressed_tensors:fp8", "gluon_scaled", (1, 64)),
    ("compressed_tensors:fp8", "gluon_a8", (1, 64)),
    ("compressed_tensors:fp8", "cuda_decode@rounded", (1,)),
    ("compressed_tensors:fp8", "gluon_wna16@rounded", (1, 64)),
    ("compressed_tensors:fp8", "", (1, 64)),
    ("int8", "gluon_scaled", (1, 64)),
    ("int8", "gluon_a8", (1, 64)),
    ("w4a8", "gluon_a8", (1, 64)),
    ("w4a8-int8", "gluon_a8", (1, 64)),
    ("nvfp4", "", (1, 64)),
    ("mxfp4", "", (1, 64)),
)
NAMED = {"w4a8": ("int4", {"activations": "fp8"}), "w4a8-int8": ("int4", {"activations": "int8"})}


def host_us(call: Callable[[], Any], calls: int = 60) -> float:
    """Least mean of several rounds; the device is idle when a round begins."""
    rounds = []
    for _ in range(60):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return min(rounds)


def beside_us(calls: dict[str, Callable[[], Any]], count: int = 60) -> dict[str, list[float]]:
    """Mean of every round of every call, rounds in turn; the device is idle when one begins."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(60):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            rounds[name].append((time.perf_counter() - start) / count * 1e6)
    torch.cuda.synchronize()
    return rounds


def _replays() -> int:
    """Calls that this process can replay."""
    held = sys.modules.get("quant_kernels_triton.replay")
    return len(held._replays) if held else 0


def _graph_equals(call: Callable[[], Tensor]) -> bool:
    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(got, want) and torch.equal(call(), want)


def _error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def kernel_rows(scheme: str, kernels: str, rows: tuple[int, ...], weight: Tensor) -> list[Any]:
    """Figures of one kernel, checked against a float64 product of the restored weights."""
    out = []
    online, options = NAMED.get(scheme, (scheme, {}))
    layer = linear_of(online, weight, kernels=kernels or None, options=options)
    restored = layer.restore().weight
    dense = dense_weight(restored, weight.shape[1]).double().to(weight.device)
    for m in rows:
        x = torch.randn(m, weight.shape[1], dtype=torch.bfloat16, device="cuda")
        values = layer._values()
        row = {"scheme": scheme, "kernel": layer.kernel.name, "asked": kernels, "rows": m}
        known = _replays()
        y = layer(x)
        row["error"] = _error(y, x.double() @ dense.T)
        row["graph_and_repeat_equal"] = _graph_equals(lambda x=x: layer(x))
        fresh = x.clone()
        row["other_address_equal"] = torch.equal(layer(fresh), y)
        calls = {"bound": lambda x=x, v=values: layer._run(v, x), "module": lambda x=x: layer(x),
                 "bf16": lambda x=x: F.linear(x, weight)}  # fmt: skip
        rounds = beside_us(calls)
        row |= {f"{name}_us": min(us) for name, us in rounds.items()}
        row["median_us"] = statistics.median(rounds["bound"])
        row["bf16_median_us"] = statistics.median(rounds["bf16"])
        row["replayed"] = _replays() > known
        out.append(row)
        print(json.dumps(row), flush=True)
    return out


class _Attention(nn.Module):
    def __init__(self, scheme: str) -> None:
        super().__init__()
        for name, n in (("q", 4096), ("k", 1024), ("v", 1024)):
            weight = torch.randn(n, K, dtype=torch.bfloat16, device="cuda") * 0.02
            setattr(self, name, linear_of(scheme, weight, name=name))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def joined_rows(scheme: str) -> list[Any]:
    """q, k, v one by one, learnt to be one call, and as one layer."""
    out, model = [], _Attention(scheme)
    for m in (1, 8):
        x = torch.randn(m, K, dtype=torch.bfloat16, device="cuda")
        for part in (model.q, model.k, model.v):
            part._shared = part._siblings = None
        alone = model(x)
        row: dict[str, Any] = {"scheme": scheme, "kernel": "q, k, v", "rows": m}
        row["alone_us"] = host_us(lambda x=x: model(x))
        share_inputs(model)
        for _ in range(3):
            shared = model(x)
        row["groups"] = model.q._shared is not None
        row["shared_us"] = host_us(lambda x=x: model(x))
        row["bitwise_equal"] = torch.equal(shared, alone)
        row["difference"] = _error(shared, alone.double())
        row["graph_and_repeat_equal"] = _graph_equals(lambda x=x: model(x))
        one = joined([model.q, model.k, model.v])
        row["one_layer_equal"] = one is not None and torch.equal(one(x), shared)
        out.append(row)
        print(json.dumps(row), flush=True)
    return out


@torch.no_grad()
def main() -> None:
    """Everything, each part on its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--schemes", default="", help="only these")
    parser.add_argument("--shape", default="4096x4096", help="K x N of the layer")
    parser.add_argument("--profile", action="store_true", help="where a Gluon call spends it")
    args = parser.parse_args()
    torch.manual_seed(0)
    k, n = map(int, args.shape.split("x"))
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
    x = torch.randn(1, k, dtype=torch.bfloat16, device="cuda")
    rows: list[Any] = [{"kernel": "F.linear", "bound_us": host_us(lambda: F.linear(x, weight))}]
    parts: list[Callable[[], list[Any]]] = [
        *(lambda s=s, k=k, m=m: kernel_rows(s, k, m, weight) for s, k, m in KERNELS
          if not args.schemes or s in args.schemes.split(",")),
        *(lambda s=s: joined_rows(s) for s in ("int4", "compressed_tensors:fp8")
          if not args.schemes),
    ]  # fmt: skip
    for part in parts:
        try:
            rows += part()
        except Exception as err:  # a benchmark goes on and reports it
            rows.append({"problem": f"{type(err).__name__}: {err}"[:600]})
            print(rows[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    if args.profile:
        import cProfile
        import pstats

        layer = linear_of("int4", weight, kernels="gluon_wna16")
        layer(x)
        torch.cuda.synchronize()
        with cProfile.Profile() as profile:
            for _ in range(300):
                layer(x)
        pstats.Stats(profile).sort_stats("tottime").print_stats(16)


if __name__ == "__main__":
    main()
