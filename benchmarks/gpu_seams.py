"""Two places on one GPU where kernels are reached by another way than the plan's modules.

    python benchmarks/gpu_seams.py [--json FILE] [--part experts,codes]

experts   the expert layers of the vLLM and SGLang adapters: stacks read from a checkpoint, cut into
          ranks and bound as the adapters do, and their ``apply`` called with GPU tensors, eagerly
          and in a CUDA graph. The engines are not installed: stand-ins with their class names take
          their places in the imports, and are never called
codes     GGUF's blocks of grids on kernels that read codes (``NAME@codes``): products, stacks,
          restored bytes. Values are those of the gguf package

References are float64 products of the checkpoint's own values.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import math
import multiprocessing
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from source_tree import REPO, use

use()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from quant_core.build import Builder  # noqa: E402
from quant_core.checkpoint.open import open_checkpoint  # noqa: E402
from quant_core.engines.packed import Packed, attach, bind_stack, gating_of, neutral  # noqa: E402
from quant_core.engines.sharing import Piece  # noqa: E402
from quant_core.kernels.choose import accepting  # noqa: E402
from quant_core.load import load_tensor  # noqa: E402
from quant_core.nn import ClampedSwiglu  # noqa: E402
from quant_core.plan import Plan, plan  # noqa: E402
from quant_core.registry import registry  # noqa: E402
from quant_core.spec import OpSpec, Span  # noqa: E402
from quant_core.tensors import LayerTensors, QuantizedTensor  # noqa: E402

TOKENS = (1, 7, 64, 300)
BOUND = 9e-3  # bfloat16: both sides, their product and y are rounded, weights too in some kernels
SEEN = 4.3e-3  # one product
CHECKPOINTS = {  # the gating of each
    "gguf-moe-q4_k_m": gating_of(nn.functional.silu),
    "hf-gptoss-mxfp4": ClampedSwiglu(limit=7.0, alpha=1.702),
}


def far(y: Tensor, want: Tensor) -> float:
    """Relative Frobenius norm; infinity where y has NaN."""
    e = float((y.double() - want).norm() / want.norm())
    return e if math.isfinite(e) else math.inf


# ---------------------------------------------------------------------------- the expert layers


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of engines that are not there: every name is a class that keeps what it is given."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        ours = name.partition(".")[0] in ("vllm", "sglang")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Anything:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "is_cuda":
            return lambda: True
        made = type(name, (_Anything,), {})
        setattr(self, name, made)
        return made


def _vllm(packed: dict[str, Packed], gating: Any, places: Tensor) -> Callable[..., Tensor]:
    from quant_core.engines.vllm_experts import ExpertsMethod

    method = ExpertsMethod.__new__(ExpertsMethod)
    method.gating = gating
    layer = SimpleNamespace(packed=packed, _expert_map=places, apply_router_weight_on_input=False)
    return lambda x, weights, ids: method.apply(layer, x, weights, ids, None, None)


def _sglang(packed: dict[str, Packed], gating: Any, places: Tensor) -> Callable[..., Tensor]:
    from quant_core.engines.sglang_experts import ExpertsMethod

    method = ExpertsMethod.__new__(ExpertsMethod)
    method.gating = gating
    method.moe_runner_config = SimpleNamespace(
        apply_router_weight_on_input=False, routed_scaling_factor=None
    )
    layer = SimpleNamespace(packed=packed)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        given = SimpleNamespace(hidden_states=x, topk_output=(weights, places[ids.long()]))
        return method.apply(layer, given).hidden_states

    return run


def _rank(
    p: Plan, module: str, held: list[int], inner: Span, device: str
) -> tuple[dict[str, Packed], nn.Module]:
    """Stacks of one rank, as the adapters bind them."""
    layer, b = nn.Module(), Builder(plan=p, dtype=torch.bfloat16, device=device)
    packed = {}
    for role in ("gate", "up", "down"):
        name = _member(p, module, role)
        n, k = p.members[name].scheme.shape
        out, inp = (Span.whole(n), inner) if role == "down" else (inner, Span.whole(k))
        piece = Piece(member=p.members[name], out=out, inp=inp)
        with neutral():
            part = bind_stack(b, name, piece, held)
        packed[role] = attach(name, layer, [part], f"packed_{role}")
    return packed, layer


def _member(p: Plan, module: str, role: str) -> str:
    return next(n for n in p.members if n.startswith(module) and role in n[len(module) :])


def _values(p: Plan, module: str, role: str) -> tuple[Tensor, Tensor | None]:
    """float64 weights and biases of a stack."""
    held = load_tensor(p, _member(p, module, role))
    biases = [lt.bias for lt in held.matrices]
    bias = None if biases[0] is None else torch.stack(biases).double()
    return held.dequantize().double(), bias


def _wanted(p: Plan, module: str, gating: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The definition, in float64 on the cpu."""
    w = {role: _values(p, module, role) for role in ("gate", "up", "down")}
    x, out = x.double().cpu(), torch.zeros(x.shape, dtype=torch.float64)

    def through(role: str, h: Tensor, e: Tensor) -> Tensor:
        values, bias = w[role]
        y = torch.einsum("tk,tnk->tn", h, values[e])
        return y if bias is None else y + bias[e]

    for j in range(ids.shape[1]):
        e = ids[:, j].cpu().long()
        h = gating(through("gate", x, e), through("up", x, e))
        out += weights[:, j, None].double().cpu() * through("down", h, e)
    return out


def _replayed(run: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The replay of a graph of one call, its output poisoned first."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(*args)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return y


def check_experts(engine: str, name: str, device: str = "cuda") -> dict[str, Any]:
    """One rank with all experts, then two that hold half of them each: they add up to the whole."""
    sys.meta_path.append(_StandIns())
    p, gating = plan(open_checkpoint(REPO / "tests/fixtures" / name)), CHECKPOINTS[name]
    module = "model.layers.0.mlp.experts"
    count = len(p.members[_member(p, module, "gate")].layer.experts)
    inner, hidden = p.members[_member(p, module, "gate")].scheme.shape
    ways = {"one rank": [(list(range(count)), Span.whole(inner))]}
    halves = list(range(count // 2)), list(range(count // 2, count))
    ways["experts of two ranks"] = [(half, Span.whole(inner)) for half in halves]
    row: dict[str, Any] = {"part": "experts", "engine": engine, "checkpoint": name, "wrong": []}
    for way, ranks in ways.items():
        runs, kept = [], []
        for held, span in ranks:
            packed, layer = _rank(p, module, held, span, device)
            places = torch.full((count,), -1, dtype=torch.int32, device=device)
            places[held] = torch.arange(len(held), dtype=torch.int32, device=device)
            runs.append({"vllm": _vllm, "sglang": _sglang}[engine](packed, gating, places))
            kept.append((packed, layer))
        row.setdefault("kernels", kept[0][0]["gate"].parts[0].kernel)
        for tokens in TOKENS:
            torch.manual_seed(tokens)
            x = torch.randn(tokens, hidden, device=device).bfloat16()
            ids = torch.rand(tokens, count, device=device).topk(2).indices.int()
            weights = torch.rand(tokens, 2, device=device)
            want = _wanted(p, module, gating, x, ids, weights).to(device)
            y = sum(run(x, weights, ids).double() for run in runs)
            e = far(y, want)
            row["worst"] = max(row.get("worst", 0.0), e)
            if not e <= BOUND:
                row["wrong"].append(f"{way}, {tokens} tokens: error {e:.2e}")
            for run in runs if device == "cuda" else ():
                if not torch.equal(_replayed(run, x, weights, ids), run(x, weights, ids)):
                    row["wrong"].append(f"{way}, {tokens} tokens: a graph gives another result")
            if not far(y.roll(1, 1), want) > 0.1:
                row["wrong"].append("the comparison does not see other columns")
    return row


# ------------------------------------------------------------------------------ blocks as codes


def _blocks(name: str, rows: int, per_row: int, seed: int) -> Tensor:
    """Random bytes of a block type, with a finite scale."""
    from quant_plugin_gguf.types import BY_NAME

    g = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows * per_row, BY_NAME[name].bytes), generator=g).byte()
    if name == "iq1_m":  # a float16 in four nibbles
        data[:, 55] = data[:, 55] & 0xBF | 0x20
    else:
        at = 64 if name == "tq2_0" else 0
        d = torch.randn(len(data), generator=g).half()
        data[:, at : at + 2] = d.view(torch.uint8).view(-1, 2)
    return data.view(rows, -1)


def _stored(name: str, blocks: Tensor) -> Tensor:
    """float64 weights, by the gguf package."""
    from gguf import GGMLQuantizationType, quants

    from quant_plugin_gguf.types import BY_NAME

    held = quants.dequantize(blocks.numpy(), GGMLQuantizationType(BY_NAME[name].id))
    return torch.from_numpy(held).double()


def check_codes(name: str, device: str = "cuda") -> dict[str, Any]:
    """Every kernel that takes a block type as codes, and stacks of three."""
    from quant_plugin_gguf.layouts import spec_of

    n, k, experts = 200, 1024, 3
    row: dict[str, Any] = {"part": "codes", "type": name, "kernels": [], "wrong": [], "worst": 0.0}
    stacks = [_blocks(name, n, k // 256, seed=e) for e in range(experts)]
    exact = [_stored(name, b).to(device) for b in stacks]
    for kind in ("linear", "grouped_linear", "embedding"):
        count = experts if kind == "grouped_linear" else 0
        sizes = (("n", n), ("k", k), ("k_stored", k), *((("experts", count),) if count else ()))
        op = OpSpec(op=kind, operands=(("weight", spec_of(name)),), sizes=sizes,
                    act_dtype="bfloat16", device=(device, "9.0"))  # fmt: skip
        for kernel, as_run, said in accepting(op, registry()):
            if not kernel.name.endswith("@codes"):
                continue
            row["kernels"].append(f"{kernel.name} {kind}")
            buffers = kernel.allocate(as_run, device)
            for e in range(max(1, count)):
                qt = QuantizedTensor(spec=spec_of(name), shape=(n, k), codes=stacks[e])
                at = {"row": 0, "expert": e} if count else {"row": 0}
                kernel.load_(buffers, as_run, LayerTensors(operands={"weight": qt}), at)
            back = kernel.restore(buffers, as_run).weight.codes.cpu()
            if not torch.equal(back, torch.stack(stacks) if count else stacks[0]):
                row["wrong"].append(f"{kernel.name} {kind}: other bytes come back")
            run, held = kernel.bind(as_run), list(buffers.values())
            for m in (1, 7, 16, 40, 100, 300):
                if math.isinf(said.cost_at(m)):
                    continue
                x = torch.randn(m, k, device=device).bfloat16()
                if kind == "embedding":
                    ids = torch.arange(m, device=device) % n
                    y, want = run(held, ids), exact[0][ids]
                elif count:
                    index = torch.arange(m, device=device) % count
                    w = torch.stack(exact)[index]
                    y, want = run(held, x, index), torch.einsum("tk,tnk->tn", x.double(), w)
                else:
                    y, want = run(held, x), x.double() @ exact[0].T
                e = far(y, want) / (1 + 2 / math.sqrt(y.numel()))
                row["worst"] = max(row["worst"], e)
                if not e <= SEEN:
                    row["wrong"].append(f"{kernel.name} {kind}, {m} rows: error {e:.2e}")
    if not row["kernels"]:
        row["wrong"].append("no kernel takes it")
    return row | {"kernels": sorted(set(row["kernels"]))}


def types_of_codes() -> list[str]:
    """Block types whose plugin names codes for them."""
    from quant_core.kernels.expanded import block_codes
    from quant_plugin_gguf.types import BY_NAME

    opaque = (t.dtype for t in BY_NAME.values() if t.kind == "opaque")
    return sorted(t for t in opaque if block_codes(f"gguf_{t}") is not None)


def _job(job: tuple[str, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        return {"experts": check_experts, "codes": check_codes}[job[0]](*job[1:])
    except Exception as err:  # all are run
        return {"part": job[0], "job": job, "wrong": [f"{type(err).__name__}: {str(err)[:600]}"]}


def main() -> int:
    """1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", default="experts,codes")
    parser.add_argument("--seconds", type=float, default=300.0, help="of all")
    parser.add_argument("--device", default="cuda")
    a = parser.parse_args()
    jobs: list[tuple[str, ...]] = []
    if "experts" in a.part:
        jobs += [("experts", e, c, a.device) for e in ("vllm", "sglang") for c in CHECKPOINTS]
    if "codes" in a.part:
        jobs += [("codes", t, a.device) for t in types_of_codes()]
    rows = []
    workers = min(len(jobs), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for job, result in [(job, pool.apply_async(_job, (job,))) for job in jobs]:
            try:
                rows.append(result.get(timeout=a.seconds))
            except multiprocessing.TimeoutError:
                rows.append({"job": job, "wrong": ["not done in time"]})
            print(json.dumps(rows[-1]), flush=True)
        pool.terminate()
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(r["wrong"]) for r in rows)
    print(f"{len(rows)} checks, {wrong} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
