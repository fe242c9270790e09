"""Running ``gluon_experts`` on a stack's buffers: routing, rows by expert, one grouped product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.gluon_plan import SMS
from quant_kernels_triton.gluon_run import _gathered, _Layer, _layer
from quant_kernels_triton.gluon_stack import Stack, stack_config
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.recipe import Recipe, recipe_from_text
from quant_kernels_triton.schedule_run import Routing, combined, gathered_rows, routed

__all__ = ["bound_experts", "multiply", "run_experts", "run_stack"]

grouped = Jitted("gluon_experts", "grouped")

_TOGETHER = 64  # tiles of outputs that one block of rows goes over before the next


def _codes(codes: Tensor, held: _Layer, c: Stack) -> Descriptor:
    """The descriptor of all experts' codes: half a group of the tiles of a program."""
    r, words = held.recipe, 256 if held.plan.bytes else 128
    shape = (r.experts * r.rows // 16, r.groups * 2 * words)
    tiles = 4 if c.consumers == 3 else 4 * c.consumers  # of a copy: a power of two
    box = (tiles, min(words * c.halves, 256))  # numbers of a box, at most
    return Descriptor(codes, box, shape=shape, dtype=torch.int32, plain=True)


def multiply(
    r: Recipe, x: Tensor, tensors: Sequence[Tensor], y: Tensor, routing: Routing, c: Stack,
    top: int = 1, in_order: bool = False,
) -> None:  # fmt: skip
    """y[order[i]] = row order[i] // top of x through the expert of its block; zeros in the others.

    Without ``c.gather`` x holds these rows, in the order of ``routing``, already.

    Args:
        in_order: y[i] instead; rows of no expert are not written.
    """
    held, device = _layer(r), x.device.index
    slots = SMS * c.consumers
    part = torch.empty(slots * 64 * c.bm, dtype=torch.float32, device=x.device)
    count = counters(device, slots)
    if count is None:
        count = torch.zeros(slots, dtype=torch.int32, device=x.device)
    key = ("stack", r, x.dtype, c, top, in_order)
    values = held.arguments(tensors)

    def build() -> Build:
        more = {"B1": c.b1, "B2": c.b2, "NC": c.consumers, "ST": c.stages, "GN": _TOGETHER}
        more |= {"H": c.halves, "FEW": c.few}
        more |= {"GATHER": c.gather, "SORTED": in_order, "ACC": c.acc}
        more |= dict(zip(("KEEP", "FETCH"), c.registers, strict=True))
        b = held.build(x, 4, 0 if c.acc else held.plan.mode, more, first=3)
        views = {at: dtype for at, dtype in b.views.items() if at > 3}
        at = 3 + len(values) + 1
        return replace(b, views=views | {at: torch.float32, at + 1: torch.int32})

    desc = Descriptor(x, (c.b1, 64))
    rest = Descriptor(x, (c.b2, 64)) if c.b2 else desc
    table = (routing.order, routing.counts, routing.blocks, routing.expert, routing.bounds)
    codes = _codes(values[0], held, c)
    args = (desc, rest, codes, x, *values[1:], y, part, count, *table, y.shape[0], *held.sizes,
            r.experts, x.shape[1], top)  # fmt: skip
    launch(grouped, key, (SMS, 1), args, device, build)


def run_stack(
    r: Recipe, x: Tensor, index: Tensor, tensors: Sequence[Tensor], c: Stack | None = None
) -> Tensor:
    """y [T, N]: row t through expert ``index[t]``; zeros where that is no expert."""
    own = getattr(torch, r.act_dtype)
    if x.dtype != own:
        return run_stack(r, x.to(own), index, tensors, c).to(x.dtype)
    y = x.new_empty(x.shape[0], r.n)
    if x.shape[0]:
        c = c or stack_config(_layer(r).plan, r, x.shape[0])
        routing = routed(index, r.experts, c.bm)
        x = aligned(_gathered(r, x, tensors))
        if not c.gather:
            x = gathered_rows(x, routing)
        multiply(r, x, tensors, y, routing, c)
    return y


def run_experts(
    recipes: tuple[Recipe, Recipe, Recipe],
    gating: Callable[[Tensor, Tensor], Tensor],
    buffers: Sequence[Sequence[Tensor]],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Y [T, H] = sum_j weights[t, j] down_e(gating(gate_e(x[t]), up_e(x[t]))), e = index[t, j].

    Rows are sorted once, copied once, and stay in the order of their experts up to the sums of
    ``down``, which go to their tokens.
    """
    gate, _, down = recipes
    tokens, top = index.shape
    if not tokens:
        return x.new_zeros(0, down.n)
    c = stack_config(_layer(gate).plan, gate, tokens * top)
    routing = routed(index.reshape(-1), gate.experts, c.bm)
    x, rows = aligned(x), None
    sides = []
    for r, held in zip(recipes[:2], buffers[:2], strict=True):
        if c.gather or r.gather:
            rows = _gathered(r, x, held)
            rows = aligned(rows) if c.gather else gathered_rows(rows, routing, top)
        elif rows is None:
            rows = gathered_rows(x, routing, top)
        sides.append(x.new_empty(tokens * top, r.n))
        multiply(r, rows, held, sides[-1], routing, c, top, in_order=True)
        rows = None if r.gather else rows
    h = aligned(_gathered(down, gating(*sides), buffers[2]))
    y = x.new_empty(tokens * top, down.n)
    multiply(down, h, buffers[2], y, routing, replace(c, gather=False))
    return combined(y, weights)


def bound_experts(
    texts: tuple[str, str, str],
    buffers: Sequence[Sequence[Tensor]],
    gating: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor | None:
    """What ``bind_experts`` gives, with the recipes fixed; None for x of another type."""
    gate, up, down = (recipe_from_text(text) for text in texts)
    if x.dim() != 2 or x.shape[1] != gate.k_in or x.dtype != getattr(torch, gate.act_dtype):
        return None
    return run_experts((gate, up, down), gating, buffers, x, index, weights)
