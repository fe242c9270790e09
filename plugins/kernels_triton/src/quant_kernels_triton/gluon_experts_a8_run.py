"""Running ``gluon_experts_a8`` on a stack's buffers: sorting, x quantized by expert, a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.gluon_plan import SMS
from quant_kernels_triton.gluon_stack_a8 import StackA8, stack_a8_config
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.mixed_plan import MixedPlan, from_text
from quant_kernels_triton.mixed_run import _descriptor, _layer, exchanged_codes
from quant_kernels_triton.schedule_run import Routing, combined, routed

__all__ = ["bound_experts_a8", "multiply_a8", "run_experts_a8", "run_stack_a8"]

grouped_a8 = Jitted("gluon_experts_a8", "grouped_a8")

_TOGETHER = 64  # tiles of outputs that one block of rows goes over before the next


def _codes(codes: Tensor, p: MixedPlan, c: StackA8) -> Descriptor:
    """The descriptor of all experts' codes: 1 KB of each tile of a program."""
    r, words = p.recipe, 512 if p.bytes else 256
    shape = (r.experts * r.rows // 16, r.groups * words)
    box = (4 * c.consumers, 256)
    return Descriptor(codes, box, shape=shape, dtype=torch.int32, plain=True)


def multiply_a8(
    p: MixedPlan, q: Tensor, s: Tensor, tensors: Sequence[Tensor], y: Tensor, routing: Routing,
    c: StackA8, in_order: bool = False,
) -> None:  # fmt: skip
    """y[order[i]] = row i of codes ``q`` under scales ``s`` through the expert of its block; zeros
    in the rows of none.

    Args:
        in_order: y[i] instead; rows of no expert are not written.
    """
    held, device, r = _layer(p), q.device.index, p.recipe
    slots = SMS * c.consumers
    part = torch.empty(slots * 64 * c.bm, dtype=torch.float32, device=q.device)
    count = counters(device, slots)
    if count is None:
        count = torch.zeros(slots, dtype=torch.int32, device=q.device)
    key = ("stack a8", p, c, y.dtype, in_order)

    def build() -> Build:
        fixed = {n: v for n, v in held.constants.items() if n not in ("GROUPED", "SUB")}
        fixed |= {"NH": c.pieces, "BT": c.rows, "B2": c.rest, "ST": c.stages, "NC": c.consumers}
        fixed |= {"GN": _TOGETHER, "TURNS": c.turns, "SORTED": in_order, "KEEP": c.registers}
        views = {at + 1: dtype for at, dtype in held.views.items() if at > 1}
        return Build(constants=fixed, options={"num_warps": 4, "launch_pdl": True}, views=views)

    desc = _descriptor(p, q, c.pieces * c.rows)
    rest = _descriptor(p, q, c.rest) if c.rest else desc
    codes, *others = [tensors[i] for i in held.places]
    table = (routing.order, routing.counts, routing.blocks, routing.expert, routing.bounds)
    args = (desc, rest, _codes(codes, p, c), *others, s, y, part, count, *table,
            q.shape[0], *held.sizes, r.experts)  # fmt: skip
    launch(grouped_a8, key, (SMS, 1), args, device, build)


def run_stack_a8(
    p: MixedPlan, x: Tensor, index: Tensor, tensors: Sequence[Tensor], c: StackA8 | None = None
) -> Tensor:
    """y [T, N]: row t through expert ``index[t]``; zeros where that is no expert."""
    own = getattr(torch, p.recipe.act_dtype)
    y = torch.empty(x.shape[0], p.recipe.n, dtype=own, device=x.device)
    if x.shape[0]:
        c = c or stack_a8_config(p, x.shape[0])
        routing = routed(index, p.recipe.experts, c.bm)
        q, s = exchanged_codes(p, aligned(x), tensors, routing.order)
        multiply_a8(p, q, s, tensors, y, routing, c)
    return y.to(x.dtype)


def run_experts_a8(
    plans: tuple[MixedPlan, MixedPlan, MixedPlan],
    gating: Callable[[Tensor, Tensor], Tensor],
    buffers: Sequence[Sequence[Tensor]],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """Y [T, H] = sum_j weights[t, j] down_e(gating(gate_e(x[t]), up_e(x[t]))), e = index[t, j].

    Rows are sorted once, quantized once for gate and up where these quantize alike, and stay in
    the order of their experts up to the sums of ``down``, which go to their tokens.
    """
    gate, up, down = plans
    tokens, top = index.shape
    if not tokens:
        return x.new_zeros(0, down.recipe.n)
    c = stack_a8_config(gate, tokens * top)
    routing = routed(index.reshape(-1), gate.recipe.experts, c.bm)
    rows = routing.order if top == 1 else routing.order.div(top, rounding_mode="floor")
    x, sides, held = aligned(x), [], None
    for p, own in ((gate, buffers[0]), (up, buffers[1])):
        if held is None or gate.recipe.gather or up.recipe.gather or _rule(gate) != _rule(up):
            held = exchanged_codes(p, x, own, rows)
        sides.append(x.new_empty(tokens * top, p.recipe.n))
        multiply_a8(p, *held, own, sides[-1], routing, c, in_order=True)
    q, s = exchanged_codes(down, aligned(gating(*sides)), buffers[2], None)
    y = x.new_empty(tokens * top, down.recipe.n)
    multiply_a8(down, q, s, buffers[2], y, routing, c.fitted(down))
    return combined(y, weights)


def _rule(p: MixedPlan) -> tuple[Any, ...]:
    """What the codes of x depend on."""
    return p.integer, p.bytes, p.recipe.k, p.peak, p.least, p.most


def bound_experts_a8(
    texts: tuple[str, str, str],
    buffers: Sequence[Sequence[Tensor]],
    gating: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor | None:
    """What ``bind_experts`` gives, with the plans fixed; None for x of another type."""
    gate, up, down = (from_text(text) for text in texts)
    r = gate.recipe
    if x.dim() != 2 or x.shape[1] != r.k_in or x.dtype != getattr(torch, r.act_dtype):
        return None
    return run_experts_a8((gate, up, down), gating, buffers, x, index, weights)
