"""Running the mixed kernels: quantize x in their order of columns, multiply.

quant_triton::mixed_linear(x, tensors, plan)            x [..., K] -> [..., N]
quant_triton::mixed_grouped(x, experts, tensors, plan)  x [T, K], experts [T] -> [T, N]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_kernels_triton.codes_run import Rule, hopper_codes
from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.mixed_asm import ASM, POWER
from quant_kernels_triton.mixed_plan import (
    SMS,
    MixedPair,
    MixedPlan,
    MixedRing,
    MixedWide,
    config,
)
from quant_kernels_triton.schedule_run import clear_rows, each_alone, sorted_blocks

__all__ = ["exchanged_codes", "run_mixed", "run_mixed_grouped"]

mixed_pair, mixed_ring = Jitted("mixed_pair", "mixed_pair"), Jitted("mixed_ring", "mixed_ring")
mixed_specialized = Jitted("mixed_ws", "mixed_specialized")
mixed_turns = Jitted("mixed_turns", "mixed_turns")

_WEIGHT_STAGES = 4  # of mixed_ws, of 8 KB
_ELSEWHERE = ("GROUPED", "SUB", "BYTES")  # constants that mixed_turns does not have
_Schedule = tuple[Tensor, Tensor, Tensor]  # order of rows; of blocks: expert, bounds


def exchanged_codes(
    p: MixedPlan, x: Tensor, tensors: Sequence[Tensor], rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 (bits of e4m3) or int8 [T, K] in the kernels' order, float32 scales [T].

    Args:
        rows: the row of x that each token is; None: all in order.
    """
    r = p.recipe
    gather = tensors[r.buffers.index("gather")] if r.gather else None
    return hopper_codes(_rule(p), x, tensors[-1] if p.static else None, rows, gather)


@functools.cache
def _rule(p: MixedPlan) -> Rule:
    bounds = (p.peak, p.least, p.most)
    order = 8 if p.bytes else 4
    return Rule(key=p, k=p.recipe.k, fp8=not p.integer, bounds=bounds, order=order)


class _Layer:
    """A plan with what is fixed of its launches."""

    __slots__ = ("configs", "constants", "p", "places", "sizes", "views")

    def __init__(self, p: MixedPlan) -> None:
        r = p.recipe
        self.p, self.configs = p, dict[int, "MixedPair | MixedRing | MixedWide"]()
        self.sizes = (r.n, r.rows, r.groups)
        codes = r.buffers.index("codes")
        names = ["codes", *p.names, "bias"]
        self.places = [r.buffers.index(n) if n in r.buffers else codes for n in names]
        self.views = {1: torch.int8} | {
            1 + i: torch.int8 for i, at in enumerate(self.places) if at == codes
        }
        self.constants = {
            "GROUPED": bool(r.experts),
            "PDL": True,
            "SUB": p.sub,
            "BYTES": p.bytes,
            "INT": p.integer,
            "C0": p.factors[0],
            "C1": p.factors[1],
            "R0": p.rows[0],
            "R1": p.rows[1],
            "HAS_BIAS": r.bias,
            "ASM": ASM[p.operand],
            "POWER": POWER[p.operand],
        }

    def config(self, rows: int) -> MixedPair | MixedRing | MixedWide:
        held = self.configs.get(rows)
        if held is None:
            held = self.configs[rows] = config(self.p, rows)
        return held


@functools.cache
def _layer(p: MixedPlan) -> _Layer:
    return _Layer(p)


def _descriptor(p: MixedPlan, q: Tensor, tokens: int) -> Descriptor:
    return Descriptor(q, (tokens, 128), dtype=torch.int8 if p.integer else torch.float8_e4m3fn)


def _stay(
    held: _Layer, q: Tensor, s: Tensor, tensors: Sequence[Tensor], y: Tensor, c: MixedWide
) -> None:
    """Programs that stay for several tiles."""
    p, (n, rows, groups) = held.p, held.sizes
    codes, *fixed = [tensors[i] for i in held.places]
    shape = (rows // 16, groups * 256)
    words = Descriptor(codes, (8, 256), shape=shape, dtype=torch.int32, plain=True)
    tiles = -(-q.shape[0] // c.bm) * -(-rows // 128)
    split, count, part = c.split, s, s
    if split > 1:
        counter = counters(q.device.index, tiles * 2)
        if counter is None:
            split = 1
        else:
            count = counter
            sums = tiles * (split - 1) * 128 * c.bm
            part = torch.empty(sums, dtype=torch.float32, device=q.device)

    def build() -> Build:
        constants = {n: v for n, v in held.constants.items() if n not in _ELSEWHERE}
        constants |= {"BT": c.bt, "NH": c.halves, "ST": c.stages, "GN": c.together}
        constants |= {"SPLIT": split}
        views = {at: dtype for at, dtype in held.views.items() if at > 1}
        options = {"num_warps": 4, "launch_pdl": True}
        return Build(constants=constants, options=options, views=views)

    sizes = (q.shape[0], n, rows, groups)
    args = (_descriptor(p, q, c.bt), words, *fixed, s, y, part, count, *sizes)
    key = (p, c, "stay", split, y.dtype)
    launch(mixed_turns, key, (min(tiles * split, SMS), 1), args, q.device.index, build)


def _multiply(
    held: _Layer, q: Tensor, s: Tensor, tensors: Sequence[Tensor], y: Tensor,
    c: MixedPair | MixedRing | MixedWide, experts: _Schedule | None,
) -> None:  # fmt: skip
    if isinstance(c, MixedWide) and c.stay:
        return _stay(held, q, s, tensors, y, c)
    p, device = held.p, q.device.index
    m = q.shape[0] if experts is None else experts[1].shape[0] * c.bm
    n, rows, groups = held.sizes
    key = (p, c, experts is None, y.dtype)
    fixed = [tensors[i] for i in held.places]
    lists = experts or (s, s, s)
    if isinstance(c, MixedWide):
        desc = _descriptor(p, q, c.bt)
        grid = (-(-m // c.bm) * -(-rows // 128), 1)

        def build() -> Build:
            sizes = {"BT": c.bt, "NH": c.halves, "ST": c.stages, "GN": c.together}
            sizes["PARTIAL"] = c.partial
            constants = held.constants | sizes | {"WST": _WEIGHT_STAGES}
            options = {"num_warps": 4, "launch_pdl": True}
            return Build(constants=constants, options=options, views=held.views)

        args = (desc, *fixed, s, y, *lists, m, n, rows, groups)
        launch(mixed_specialized, key, grid, args, device, build)
        return
    pair = isinstance(c, MixedPair)
    blocks = -(-m // c.bm) * -(-rows // (64 if pair else 16 * c.warps))
    split, count, part = c.split, s, s
    if split > 1:
        counter = counters(device, blocks)
        if counter is None:
            split = 1
        else:
            count = counter
            size = blocks * split * 64 * c.bm if pair else split * m * n
            part = torch.empty(size, dtype=torch.float32, device=q.device)
    key = (*key, split)
    desc = _descriptor(p, q, c.bm)
    if isinstance(c, MixedPair):
        sizes = {"BT": c.bm, "ST": c.stages, "WST": _WEIGHT_STAGES, "SPLIT": split, "GN": 8}

        def build_pair() -> Build:
            constants = {n: v for n, v in held.constants.items() if n != "GROUPED"} | sizes
            options = {"num_warps": 4, "launch_pdl": True}
            return Build(constants=constants, options=options, views=held.views)

        args = (desc, *fixed, s, y, part, count, m, n, rows, groups)
        launch(mixed_pair, key, (blocks * split, 1), args, device, build_pair)
        return

    def build_ring() -> Build:
        sizes = {"BM": c.bm, "NW": c.warps, "ST": c.stages, "SPLIT": split, "GN": 8}
        options = {"num_warps": c.warps, "launch_pdl": True}
        return Build(constants=held.constants | sizes, options=options, views=held.views)

    args = (desc, *fixed, s, y, part, count, *lists, m, n, rows, groups)
    launch(mixed_ring, key, (blocks * split, 1), args, device, build_ring)


def run_mixed(
    p: MixedPlan,
    x: Tensor,
    tensors: Sequence[Tensor],
    c: MixedPair | MixedRing | MixedWide | None = None,
    experts: _Schedule | None = None,
) -> Tensor:
    """y [M, N] of x [M, K], with the block sizes of ``config`` or ``c``.

    Args:
        experts: order of the rows of x, and blocks of ``c.bm`` rows in that order.
    """
    own = getattr(torch, p.recipe.act_dtype)
    dtype, y = x.dtype, torch.empty(x.shape[0], p.recipe.n, dtype=own, device=x.device)
    if x.shape[0]:
        held = _layer(p)
        rows = None if experts is None else experts[0]
        q, s = exchanged_codes(p, aligned(x), tensors, rows)
        _multiply(held, q, s, tensors, y, c or held.config(x.shape[0]), experts)
    return y.to(dtype)


def run_mixed_grouped(
    p: MixedPlan,
    x: Tensor,
    index: Tensor,
    tensors: Sequence[Tensor],
    c: MixedPair | MixedRing | MixedWide | None = None,
) -> Tensor:
    """y [T, N]: row t through expert ``index[t]``; zeros where that is no expert."""
    t, count = x.shape[0], p.recipe.experts
    if not t:
        return x.new_zeros(0, p.recipe.n)
    c = c or _layer(p).config(t)
    few = t <= max(2, count // 4)  # sorting costs more than reading an expert twice
    blocks = each_alone(index, count) if few else sorted_blocks(index, count, c.bm)
    y = run_mixed(p, x, tensors, c, blocks)
    clear_rows(index, y, count)
    return y
