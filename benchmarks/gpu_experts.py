"""Routed experts as a model calls them, on one GPU: gate, up, gating, down, the sum of a token's.

    python benchmarks/gpu_experts.py --schemes int4,fp8,mxfp4 --tokens 1,16,256,4096 --json out.json

    ours        what the plan picks, as ``nn.QuantExperts`` calls it: one call where one kernel runs
                all three stacks, else stack by stack
    humming     humming-kernels' indexed products: gate and up as one matrix, blocks of rows by
                torch's operations (``quant_kernels_humming.ops.blocks_of``), gating by torch
    bf16        torch._grouped_mm on rows sorted by torch, gate and up as one matrix
    torch fp8   torch._scaled_grouped_mm with fast accumulation; x quantized by our kernel

All in one graph a contestant, interleaved, four routings in turn, weights from memory. The error is
that of the first tokens against float64 products of the weights and unrounded activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from source_tree import use

use()
os.environ.setdefault("QUANT_MEASURED", "off")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_layers import Case, make_stack  # noqa: E402
from gpu_peers import nearest  # noqa: E402
from torch import Tensor  # noqa: E402

from quant_core.kernels.choose import choose  # noqa: E402
from quant_core.kernels.routed import ExpertsRun  # noqa: E402
from quant_core.kernels.timing import captured, interleaved  # noqa: E402
from quant_core.registry import registry  # noqa: E402

SHAPES = {"128x2048x768": (128, 8, 2048, 768), "8x4096x14336": (8, 2, 4096, 14336)}
"""Name -> (experts, experts a token, hidden features, inner features)."""
_ROUTINGS = 4
_CHECKED = 8  # tokens that are compared with float64

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, H], index [T, k], weights [T, k] -> [T, H]"""


@dataclass
class Layer:
    """The three stacks."""

    gate: Case
    up: Case
    down: Case

    @property
    def stacks(self) -> tuple[Case, Case, Case]:
        return self.gate, self.up, self.down

    @property
    def inner(self) -> int:
        return self.gate.size[1]

    def wanted(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The first tokens in float64."""
        gate, up, down = (case.dense.double() for case in self.stacks)
        out = x.new_zeros(min(x.shape[0], _CHECKED), self.down.size[1], dtype=torch.float64)
        for t in range(out.shape[0]):
            for e, w in zip(index[t].tolist(), weights[t].double(), strict=True):
                at, row = e % gate.shape[0], x[t].double()
                h = F.silu(gate[at] @ row) * (up[at] @ row)
                out[t] += w * (down[at] @ h)
        return out


def _gating(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def ours(layer: Layer) -> Run:
    """As ``nn.QuantExperts`` runs it."""
    picked = [choose(case.op, registry()) for case in layer.stacks]
    kernels, ops = [c.kernel for c in picked], [c.op for c in picked]
    held = [
        list(case.load(k, op).values())
        for case, k, op in zip(layer.stacks, kernels, ops, strict=True)
    ]
    runs = [k.bind(op) for k, op in zip(kernels, ops, strict=True)]
    whole = ExpertsRun(kernels, ops)

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = whole(held, _gating, x, index, weights)
        if y is not None:
            return y
        flat, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], dim=0)
        sides = [r(values, rows, flat) for r, values in zip(runs[:2], held[:2], strict=True)]
        y = runs[2](held[2], _gating(*sides), flat) * weights.reshape(-1, 1)
        return y.view(*index.shape, -1).sum(1).to(x.dtype)

    return run


def humming(layer: Layer) -> Run | None:
    """Two indexed products."""
    try:
        from humming.layer import HummingLayer, HummingLayerMethod

        from quant_kernels_humming.layout import configs, tensors_of
        from quant_kernels_humming.ops import blocks_of
    except ImportError:
        return None
    kind, experts = {"gemm_type": "indexed"}, layer.gate.experts

    def made(cases: tuple[Case, ...]) -> tuple[Any, Any] | None:
        config = configs(nearest(cases[0].op))
        if not isinstance(config, tuple):
            return None
        weight, acts = config
        product = HummingLayer(
            shape_n=sum(c.size[1] for c in cases), shape_k=cases[0].size[0],
            weight_config=dict(weight), input_config=None if acts is None else dict(acts),
            num_experts=experts, torch_dtype=torch.bfloat16,
        ).to("cuda")  # fmt: skip
        given = [[tensors_of(lt.weight, None) for lt in c.parts] for c in cases]
        distinct = [
            {n: torch.cat([g[i][n] for g in given]) for n in given[0][0]}
            for i in range(len(given[0]))
        ]
        product.load_from_tensors(
            {n: torch.stack([distinct[e % len(distinct)][n] for e in range(experts)])
             for n in distinct[0]}
        )  # fmt: skip
        product.transform()
        return product, HummingLayerMethod.get_default_tuning_configs(product, **kind)

    first, second = made((layer.gate, layer.up)), made((layer.down,))
    if first is None or second is None:
        return None

    def product(side: tuple[Any, Any], x: Tensor, flat: Tensor, top: int) -> Tensor:
        config = next(c for low, high, c in side[1] if low < flat.shape[0] <= high)
        rows, owners, count = blocks_of(flat, experts, config["block_shape"][0])
        y: Tensor = side[0](
            x, sorted_ids=rows, expert_ids=owners, num_tokens_padded=count, top_k=top,
            compute_config=kind, tuning_config=json.dumps(config),
        )  # fmt: skip
        return y

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        flat = index.reshape(-1)
        gate, up = product(first, x, flat, index.shape[1]).split(layer.inner, dim=1)
        y = product(second, _gating(gate, up), flat, 1) * weights.reshape(-1, 1)
        return y.view(*index.shape, -1).sum(1).to(x.dtype)

    return run


def _sorted(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    ids, order = index.reshape(-1).sort()
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True)
    return order, ends.int()


def _dense(layer: Layer) -> tuple[Tensor, Tensor]:
    at = torch.arange(layer.gate.experts) % len(layer.gate.parts)
    both = torch.cat([layer.gate.dense, layer.up.dense], 1)
    return both[at], layer.down.dense[at]


def _put_back(y: Tensor, order: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    y = torch.empty_like(y).index_copy_(0, order, y) * weights.reshape(-1, 1)
    return y.view(*index.shape, -1).sum(1)


def bf16(layer: Layer) -> Run:
    """Dense weights."""
    first, second = (w.bfloat16().transpose(1, 2) for w in _dense(layer))

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        order, ends = _sorted(index, first.shape[0])
        sides = torch._grouped_mm(x[order // index.shape[1]], first, offs=ends)
        y = torch._grouped_mm(_gating(*sides.split(layer.inner, dim=1)), second, offs=ends)
        return _put_back(y, order, index, weights).to(x.dtype)

    return run


def torch_fp8(layer: Layer) -> Run | None:
    """fp8 rows on both sides."""
    if layer.gate.scheme != "fp8":
        return None
    from quant_kernels_triton.codes_run import Rule, hopper_codes

    top = 448.0  # max finite e4m3fn
    weights8 = []
    for w in _dense(layer):
        scale = w.abs().amax(2) / top
        codes = (w / scale[..., None]).to(torch.float8_e4m3fn).transpose(1, 2)
        rule = Rule(key=("peer", w.shape[2]), k=w.shape[2], fp8=True, bounds=(top, 0.0, 0.0))
        weights8.append((codes, scale, rule))

    def product(x: Tensor, side: tuple[Tensor, Tensor, Any], ends: Tensor, rows: Any) -> Tensor:
        q, s = hopper_codes(side[2], x, rows=rows)
        return torch._scaled_grouped_mm(
            q.view(torch.float8_e4m3fn), side[0], s, side[1], offs=ends, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        order, ends = _sorted(index, layer.gate.experts)
        sides = product(x, weights8[0], ends, (order // index.shape[1]).int())
        h = _gating(*sides.split(layer.inner, dim=1))
        y = product(h, weights8[1], ends, torch.arange(h.shape[0], device="cuda").int())
        return _put_back(y, order, index, weights).to(x.dtype)

    return run


MAKERS: dict[str, Callable[[Layer], Run | None]] = {
    "ours": ours,
    "humming": humming,
    "bf16": bf16,
    "torch fp8": torch_fp8,
}


def make_layer(scheme: str, shape: str) -> Layer:
    experts, top, hidden, inner = SHAPES[shape]
    gate, up = (make_stack(scheme, experts, top, hidden, inner, seed=s) for s in (0, 1))
    return Layer(gate, up, make_stack(scheme, experts, top, inner, hidden, seed=2))


def measure(scheme: str, shape: str, tokens: list[int], until: float) -> list[dict[str, Any]]:
    layer, out = make_layer(scheme, shape), []
    runs: dict[str, Run] = {}
    for name, make in MAKERS.items():
        try:
            made = make(layer)
        except Exception as err:
            print(f"PROBLEM {name} {shape} {scheme}: {err!r}"[:400], flush=True)
            continue
        if made is not None:
            runs[name] = made
    for t in tokens:
        if time.monotonic() > until:
            print(f"PROBLEM {shape} {scheme} from {t} tokens: out of time", flush=True)
            break
        x = torch.randn(t, SHAPES[shape][2], device="cuda").bfloat16()
        rolls = torch.rand(_ROUTINGS, t, layer.gate.experts, device="cuda")
        picks = list(rolls.topk(layer.gate.top, dim=2).indices)
        weights = torch.rand(t, layer.gate.top, device="cuda").softmax(1)
        want, graphs, held, row = layer.wanted(x, picks[0], weights), {}, [], {}
        for name, run in runs.items():
            try:
                calls = [partial(run, x, i, weights) for i in picks]
                y = calls[0]()[:_CHECKED].double()
                graph, outputs = captured(calls)
                graphs[name] = (graph, len(calls))
                held.append((calls, outputs))
                row[f"{name} error"] = float((y - want).norm() / want.norm())
            except Exception as err:
                print(f"PROBLEM {name} {shape} {scheme} {t}: {err!r}"[:400], flush=True)
                torch.cuda.synchronize()
        times = interleaved(graphs, rounds=5, ms=1.0)
        out.append({"scheme": scheme, "shape": shape, "tokens": t, "us": times, **row})
        told = ", ".join(f"{n} {us:.1f}" for n, us in times.items())
        errors = ", ".join(f"{v:.1e}" for v in row.values())
        print(f"{shape} {scheme} {t} tokens: {told} (errors {errors})", flush=True)
        del graphs, held
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schemes", default="int4,fp8,mxfp4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096")
    parser.add_argument("--without", default="", help="contestants to leave out")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in args.without.split(","):
        MAKERS.pop(name, None)
    until = time.monotonic() + args.seconds
    data: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    data["layers"] = []
    for shape in args.shapes.split(","):
        for scheme in args.schemes.split(","):
            tokens = [int(t) for t in args.tokens.split(",")]
            data["layers"] += measure(scheme, shape, tokens, until)
            torch.cuda.empty_cache()
            if args.json:
                args.json.write_text(json.dumps(data))


if __name__ == "__main__":
    sys.exit(main())
