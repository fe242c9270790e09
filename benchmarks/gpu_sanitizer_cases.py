"""What ``gpu_sanitizer.py`` runs under the tools: every kernel family on small layers.

A case is a function that gives what is wrong with its results. Sizes are no multiples of any block,
so that every kernel meets its tails; memory is not from torch's cache, so that what lies behind a
tensor is nobody's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "Case"]

BOTH = ("memcheck", "racecheck")
BF16, ALL16 = 4.3e-3, 2.8e-3  # sums of few outputs; stacks, whose weights are rounded


@dataclass(frozen=True)
class Case:
    """Attributes:
    run: gives what is wrong, one text each.
    tools: what it is of use to.
    control: what a tool must say of it: "" nothing, "error" something; "limit": what racecheck says
        of it is racecheck's limit, which another case shows.
    alone: racecheck changes its results where other processes use the GPU.
    """

    run: Callable[[], list[str]]
    tools: tuple[str, ...] = BOTH
    control: str = ""
    alone: bool = False


def far(label: str, y: Tensor, want: Tensor, bound: float) -> list[str]:
    """``label`` and the error where y is farther from ``want`` than ``bound``, or is not finite."""
    e = float((y.double() - want.double()).norm() / want.double().norm())
    noise = 1 + 2 / math.sqrt(max(y.numel(), 1))
    return [] if e <= bound * noise else [f"{label}: error {e:.2e}"]


def tiles_layer(name: str, n: int, k: int, act: str = "bfloat16", **more: Any) -> tuple[Any, ...]:
    """(operation, canonical tensors, buffers of "tiles16") of a kind of triton_made."""
    from gpu_kernels_triton import DEVICE

    from quant_core.kernels import tiles
    from triton_made import SPECS, make_layer, make_op

    op = make_op(SPECS[name], n, k, act=act, bias=True, device=DEVICE, **more)
    experts = more.get("experts", 0)
    buffers, parts = tiles.allocate(op, "cuda"), []
    for e in range(max(1, experts)):
        parts.append(make_layer(SPECS[name], n, k, seed=e, bias=True))
        at = {"row": 0, "expert": e} if experts else {"row": 0}
        tiles.load_(buffers, op, parts[-1], at)
    return op, parts, list(buffers.values())


def products(
    op: Any, lt: Any, run: Callable[[Tensor], Tensor], rows: Iterable[int], label: str = ""
) -> list[str]:
    """A linear layer against float64 products."""
    from quant_core.dequantize import dense_weight

    wrong, k = [], op.size("k")
    w, bias = dense_weight(lt.weight, k).double().cuda(), lt.bias.double().cuda()
    for m in rows:
        x = torch.randn(m, k, device="cuda").to(getattr(torch, op.act_dtype))
        wrong += far(f"{label} {m} rows", run(x), x.double() @ w.t() + bias, BF16)
    return wrong


def gluon(name: str, kind: str, rows: Sequence[int] = (5, 100)) -> list[str]:
    """``gluon_ring`` or ``gluon_ws`` with some block sizes each, cut along K or not."""
    from quant_kernels_triton.gluon_plan import WAYS, Ring, plan, stages
    from quant_kernels_triton.gluon_run import run_config
    from quant_kernels_triton.recipe import describe

    op, (lt,), held = tiles_layer(name, 200, 544)
    r = describe(op, ops=("linear",))
    p = plan(r)
    sums = p.spg == 1 and p.mode in (1, 2)
    if kind == "ring":
        ways: list[Any] = [Ring(16, 4, 4, 2, sums), Ring(64, 4, 4, 1, False)]
    else:
        ways = [w for w, _ in WAYS if sums or not w.acc][::4]
        ways = [replace(w, stages=stages(p, w)) for w in ways]
        ways += [replace(ways[1], programs=7)]  # shares that run over the ends of tiles
    wrong = []
    for c in ways:
        wrong += products(op, lt, lambda x, c=c: run_config(r, x, held, c), rows, f"{name} {c}")
    return wrong


def plain(kernel: str, name: str) -> list[str]:
    """``triton_wna16`` or ``triton_dense``, and rows of an embedding."""
    from quant_kernels_triton.wna16 import Dense, PlainTriton

    op, (lt,), held = tiles_layer(name, 200, 544)
    run = {"triton_wna16": PlainTriton, "triton_dense": Dense}[kernel]().bind(op)
    wrong = products(op, lt, lambda x: run(held, x), (1, 33, 100), name)
    if kernel == "triton_wna16":
        from quant_core.kernels import tiles

        table = replace(op, op="embedding", features=frozenset())
        buffers = tiles.allocate(table, "cuda")
        tiles.load_(buffers, table, replace(lt, bias=None), {"row": 0})
        ids = torch.tensor([0, 199, 7, 7], device="cuda")
        y = PlainTriton().bind(table)(list(buffers.values()), ids)
        wrong += far(f"{name} rows", y, lt.weight.dequantize().cuda()[ids], BF16)
    return wrong


def mixed(
    name: str, kind: str, blocks: str, rows: int = 100, sizes: tuple[int, int] = (200, 544)
) -> list[str]:
    """``mixed_ring``, ``mixed_ws`` with ``mixed_turns``, or ``mixed_pair``, every block size."""
    from gpu_mixed import check_blocks

    row = check_blocks(name, kind, rows=rows, sizes=sizes, only=blocks)
    return [str(b) for b in row["bad"]] + ([] if row["blocks"] else ["no block size"])


def scaled(kind: str) -> list[str]:
    """``scaled_ring`` and ``scaled_ws`` on row-major codes."""
    from gpu_eight_bits import SIZES, WIDE, check_ring

    some = [*SIZES[::5], *(c for c in WIDE if kind != "block" or c.bm == 64)]
    return [str(b) for b in check_ring(kind, ((200, 544),), (5, 100), some)["bad"]]


def codes() -> list[str]:
    """Rounding of activations to codes, in every order of columns."""
    from gpu_eight_bits import check_codes

    return [str(b) for b in check_codes((512, 544))["bad"]]


def round_input(names: Sequence[str], acts: Sequence[str], k: int) -> list[str]:
    """``triton_round`` against the reference, bit for bit."""
    from gpu_rounding import check

    wrong = []
    for name in names:
        for act in acts:
            row = check((name, act, k))
            wrong += [f"{name} {act} {key}: {v}" for key, v in row.items()
                      if v and key not in ("spec", "act", "k")]  # fmt: skip
    return wrong


def hadamard(*orders: tuple[int, int, int]) -> list[str]:
    from gpu_rounding import check_hadamard

    limits = {"bfloat16": 2.2e-3, "float16": 4.5e-4, "float32": 5e-6}
    wrong = []
    for order in orders:
        for key, e in check_hadamard(order).items():
            limit = limits.get(key.split()[0], 0)
            if key not in ("order", "k") and not (isinstance(e, float) and e <= limit):
                wrong.append(f"{order} {key}: {e}")
    return wrong


def steps(*kinds: str, most: int = 1 << 22) -> list[str]:
    """Cases of gpu_step.py whose names begin with one of ``kinds``; caches of few elements."""
    import gpu_step

    wrong = []
    for name, (run, bound) in gpu_step.cases().items():
        shape = name[name.find("(") + 1 : name.find(")")].split(",") if "(" in name else ["1"]
        size = math.prod(int(s) for s in shape if s.strip())
        if not name.startswith(kinds) or size > most:
            continue
        e = gpu_step.error(*run())
        wrong += [] if e <= bound else [f"{name}: error {e:.2e}, allowed {bound:.2e}"]
    return wrong


def routing() -> list[str]:
    """Rows to experts: order, blocks, copies, sums; one, all and no rows of some expert."""
    from quant_kernels_triton import schedule_run

    wrong, experts = [], 6
    for t in (1, 7, 100, 700, 3000, 9000):
        for kind in ("any", "one", "none"):
            index = torch.randint(-1, experts + 1, (t,), device="cuda")
            index = torch.full_like(index, {"one": 3, "none": -1}[kind]) if kind != "any" else index
            r = schedule_run.routed(index, experts, 16)
            known = torch.where((index >= 0) & (index < experts), index, experts)
            counts = known.bincount(minlength=experts + 1)
            label = f"{t} rows, {kind}"
            if not torch.equal(r.counts.long(), counts):
                wrong.append(f"{label}: counts")
            if not torch.equal(r.order.long(), known.argsort(stable=True)):
                wrong.append(f"{label}: order")
            if int(r.blocks) != int((counts[:experts] + 15).div(16, rounding_mode="floor").sum()):
                wrong.append(f"{label}: blocks")
            inside = counts[:experts].sum()
            x = torch.randn(t, 200, device="cuda").bfloat16()
            if not torch.equal(schedule_run.gathered_rows(x, r)[:inside],
                               x[r.order.long()][:inside]):  # fmt: skip
                wrong.append(f"{label}: copies")
            schedule_run.clear_rows(index, x, experts)
            if x[known == experts].any() or (kind == "one" and not x.any()):
                wrong.append(f"{label}: zeros")
    y, w = torch.randn(9 * 4, 200, device="cuda").bfloat16(), torch.rand(9, 4, device="cuda")
    want = (y.double().view(9, 4, 200) * w.double()[:, :, None]).sum(1)
    return wrong + far("sums of a token", schedule_run.combined(y, w), want, BF16)


def stack(name: str, first: int = 0, step: int = 1, rows: Sequence[int] = (3, 90)) -> list[str]:
    """``gluon_experts`` with every block size from ``first`` on, by ``step``."""
    from quant_kernels_triton.gluon_experts_run import run_stack
    from quant_kernels_triton.gluon_plan import plan
    from quant_kernels_triton.gluon_stack import WAYS
    from quant_kernels_triton.recipe import describe

    n, k, experts = 200, 544, 5
    op, parts, held = tiles_layer(name, n, k, op="grouped_linear", experts=experts)
    r = describe(op, ops=("grouped_linear",))
    p = plan(r)
    sums = p.spg == 1 and p.mode in (1, 2)
    ways = [w if sums or not w.acc else replace(w, acc=False) for w, _ in WAYS]
    ways = [replace(w, halves=1, few=False) if p.bytes else w for w in ways]
    w = torch.stack([lt.dequantize() for lt in parts]).double().cuda()
    b = torch.stack([lt.bias for lt in parts]).double().cuda()
    wrong = []
    for way in ways[first::step]:
        for t in rows:
            x = torch.randn(t, k, device="cuda").bfloat16()
            index = torch.randint(-1, experts + 1, (t,), device="cuda")
            index[0] = 2
            y = run_stack(r, x, index, held, way.fitted(p))
            here = (index >= 0) & (index < experts)
            at = index[here]
            want = torch.einsum("tk,tnk->tn", x[here].double(), w[at]) + b[at]
            wrong += far(f"{name} {way} {t} rows", y[here], want, ALL16)
            wrong += [f"{name} {way} {t}: rows of no expert"] if y[~here].any() else []
    return wrong


def experts_in_one(name: str, tokens: Sequence[int] = (3, 60)) -> list[str]:
    """Gate, up, gating, down and the sums of tokens, as one call."""
    import torch.nn.functional as F

    from quant_kernels_triton.wna16 import GluonTiles

    hidden, inner, experts, top = 544, 224, 5, 2
    kinds = [tiles_layer(name, n, k, op="grouped_linear", experts=experts)
             for n, k in ((inner, hidden), (inner, hidden), (hidden, inner))]  # fmt: skip
    run = GluonTiles().bind_experts([op for op, _, _ in kinds])
    ws = [torch.stack([lt.dequantize() for lt in parts]).double().cuda() for _, parts, _ in kinds]
    bs = [torch.stack([lt.bias for lt in parts]).double().cuda() for _, parts, _ in kinds]
    wrong = []
    for t in tokens:
        x = torch.randn(t, hidden, device="cuda").bfloat16()
        index = torch.randint(0, experts, (t, top), device="cuda")
        weights = torch.rand(t, top, device="cuda")
        y = run([held for _, _, held in kinds], lambda g, u: F.silu(g) * u, x, index, weights)
        want = torch.zeros(t, hidden, dtype=torch.float64, device="cuda")
        for j in range(top):
            e = index[:, j]
            sides = [torch.einsum("tk,tnk->tn", x.double(), w[e]) + b[e]
                     for w, b in zip(ws[:2], bs[:2], strict=True)]  # fmt: skip
            h = F.silu(sides[0]) * sides[1]
            want += weights[:, j, None] * (torch.einsum("tk,tnk->tn", h, ws[2][e]) + bs[2][e])
        wrong += far(f"{name} {t} tokens", y, want, 8e-3)  # sides are rounded between
    return wrong


def mixed_stack(name: str, kind: str) -> list[str]:
    from gpu_mixed import check_experts

    return [str(b) for b in check_experts(name, kind, (1, 7, 60))["bad"]]


def stack_a8(
    name: str, kind: str, first: int, step: int, rows: Sequence[int] = (3, 90)
) -> list[str]:
    """``gluon_experts_a8`` with every block size from ``first`` on, by ``step``."""
    from gpu_mixed import KNOWN, Mixed, from_text, operation

    from quant_core.kernels import tiles
    from quant_core.kernels.activations import fake_quantize
    from quant_kernels_triton.gluon_experts_a8_run import run_stack_a8
    from quant_kernels_triton.gluon_stack_a8 import ways
    from triton_made import make_layer

    n, k, experts = 200, 544, 5
    op = operation(name, kind, n, k, bias=True, experts=experts)
    parts = [make_layer(KNOWN[name], n, k, seed=e, bias=True) for e in range(experts)]
    buffers = tiles.allocate(op, "cuda")
    for e, part in enumerate(parts):
        tiles.load_(buffers, op, part, {"row": 0, "expert": e})
    p, held = from_text(Mixed().bind(op).args[0]), list(buffers.values())
    w = torch.stack([lt.dequantize() for lt in parts]).double().cuda()
    b = torch.stack([lt.bias for lt in parts]).double().cuda()
    wrong = []
    for way in [c for c, _ in ways()][first::step]:
        for t in rows:
            x = torch.randn(t, k, device="cuda").bfloat16()
            index = torch.randint(-1, experts + 1, (t,), device="cuda")
            index[0] = 2
            y = run_stack_a8(p, x, index, held, way.fitted(p))
            here = (index >= 0) & (index < experts)
            at, xq = index[here], fake_quantize(x.float(), op.operand("input")).double()
            want = torch.einsum("tk,tnk->tn", xq[here], w[at]) + b[at]
            wrong += far(f"{name} {way} {t} rows", y[here], want, 5e-3)
            wrong += [f"{name} {way} {t}: rows of no expert"] if y[~here].any() else []
    return wrong


def _every_lane_arrives() -> None:
    """Change resident.cu: all lanes of a warp arrive, not one for all behind ``__syncwarp``.

    What one thread's arrival says of others' stores racecheck does not see ("control cuda warps").
    """
    from quant_kernels_cuda import compiler

    plain, (source, headers) = compiler.sources, compiler.sources("resident")
    for old, new in (
        ("barrier_init(barriers + threadIdx.x * 8, WARPS);",
         "barrier_init(barriers + threadIdx.x * 8, WARPS * 32);"),
        ("if (lane == 0) barrier_arrive(", "barrier_arrive("),
    ):  # fmt: skip
        if source.count(old) != 1:
            raise LookupError(f"resident.cu has {source.count(old)} times {old!r}, expected one")
        source = source.replace(old, new)
    compiler.sources = lambda name="decode": (  # type: ignore[assignment]
        (source, headers) if name == "resident" else plain(name)
    )


def decode(part: str, every_lane: bool = False) -> list[str]:
    """``cuda_decode``: kinds of layers, stacks, or cuts of the work."""
    import gpu_kernels_cuda as cuda

    if every_lane:
        _every_lane_arrives()
    cuda.BAD.clear()
    if part == "layers":
        cuda.correct(cuda.CHECKED, cuda.CHECK_SHAPES, (1, 9))
    elif part == "experts":
        cuda.experts("int4_g128")
        cuda.experts("fp4_e8m0_g32")
    else:  # scales in the weights are exchanged by shuffles
        cuda.every_cut("fp4_e4m3_g16" if part == "cuts of fp4" else "int4_g128", 168, 6144, (1, 9))
    return list(cuda.BAD)


def control(name: str) -> list[str]:
    from gpu_sanitizer_controls import run_control

    return run_control(name)


def _controls() -> dict[str, Case]:
    from gpu_sanitizer_controls import CONTROLS

    out = {}
    for name in CONTROLS:
        tool = "memcheck" if name in ("beyond", "within") else "racecheck"
        said = "error" if name in ("early", "reused", "beyond", "cuda none") else ""
        said = (
            "limit" if name.startswith("right") or name in ("cuda elected", "cuda warps") else said
        )
        out[f"control {name}"] = Case(partial(control, name), (tool,), said)
    return out


_INT4, _MX = "uint4 g128 bf16", "mxfp4"
_ROUND = ("int8 token", "int8 tensor", "int8 groups of 24", "int8 token, zero", "int4 clipped",
          "fp8 token", "fp8 groups", "mx fp4_e2m1 even", "nvfp4", "nvfp4 stored",
          "fp8 stored columns")  # fmt: skip


def cases() -> dict[str, Case]:
    """Every case by name, the slowest first."""
    c: dict[str, Case] = {}
    for i in range(3):
        c[f"gluon_experts int4 {i}"] = Case(partial(stack, _INT4, i, 3))
    c["gluon_experts int4 zeros"] = Case(partial(stack, "uint4 g32 bf16 code", 1, 3))
    c["gluon_experts mxfp4"] = Case(partial(stack, _MX, 2, 3))
    c["gluon_experts int8"] = Case(partial(stack, "int8 channel", 1, 4))
    for name, kind in ((_INT4, "fp8"), ("uint4 g32 bf16", "int8"), (_MX, "fp8"),
                       ("int8 channel", "int8")):  # fmt: skip
        c[f"mixed_pair {name} {kind}"] = Case(partial(mixed, name, kind, "MixedPair"))
    for name, kind in ((_INT4, "fp8"), ("fp8 channel", "fp8")):
        c[f"mixed_ring {name} {kind}"] = Case(partial(mixed, name, kind, "MixedRing"))
        c[f"mixed_ws {name} {kind}"] = Case(partial(mixed, name, kind, "MixedWide"))
    # more tiles than programs
    c["mixed_turns"] = Case(partial(mixed, _INT4, "fp8", "MixedWide", 3000, (1480, 288)))
    for kind in ("fp8", "block", "int8"):
        c[f"gluon_scaled {kind}"] = Case(partial(scaled, kind), alone=True)
    for name in (_INT4, "uint4 g32 bf16 code"):
        c[f"gluon_ws {name}"] = Case(partial(gluon, name, "ws"))
        c[f"gluon_ring {name}"] = Case(partial(gluon, name, "ring"))
    c["gluon_ws fp8 block"] = Case(partial(gluon, "fp8 block", "ws"))
    c["experts in one call"] = Case(partial(experts_in_one, _INT4))
    for i in range(2):
        c[f"gluon_experts_a8 int4 fp8 {i}"] = Case(partial(stack_a8, _INT4, "fp8", i, 2))
        c[f"gluon_experts_a8 int8 {i}"] = Case(partial(stack_a8, "int8 channel", "int8", i, 2))
    for name, kind in ((_INT4, "fp8"), ("uint4 g32 bf16", "fp8")):
        c[f"mixed experts {name}"] = Case(partial(mixed_stack, name, kind))
    for part in ("layers", "experts", "cuts", "cuts of fp4"):
        c[f"cuda_decode {part}"] = Case(partial(decode, part), control="limit")
        c[f"cuda_decode {part}, every lane arrives"] = Case(
            partial(decode, part, True), ("racecheck",)
        )
    for i in range(3):
        c[f"triton_round {i}"] = Case(partial(round_input, _ROUND[i::3], ("bfloat16",), 200))
    c["triton_round float32"] = Case(partial(round_input, _ROUND[::4], ("float32",), 4096))
    c["codes of activations"] = Case(codes)
    c["hadamard"] = Case(partial(hadamard, (1, 128, 512), (12, 32, 1152), (20, 256, 5120)))
    c["hadamard 4096"] = Case(partial(hadamard, (1, 4096, 4096)))
    for name in (_INT4, "fp8 block"):
        c[f"triton_dense {name}"] = Case(partial(plain, "triton_dense", name))
    c["triton_wna16"] = Case(partial(plain, "triton_wna16", _INT4))
    c["routing"] = Case(routing)
    c["attention"] = Case(partial(steps, "attention", most=1 << 20))
    c["decode step"] = Case(partial(steps, "decode"))
    c["norms"] = Case(partial(steps, "norm (5", "norm (1", "norm (300"))
    c["rotation, gates"] = Case(partial(steps, "rotary", "gated"))
    return c | _controls()


CASES = cases()
"""name -> case."""
