"""Running the ring of 8-bit codes: quantize x, multiply what lies in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_kernels_triton.codes_run import hopper_codes, scaled_rule
from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.scaled_plan import ScaledPlan
from quant_kernels_triton.scaled_ring_plan import RingSizes, WideSizes, ring_sizes

__all__ = ["run_ring"]


scaled_ring = Jitted("scaled_ring", "scaled_ring")
scaled_specialized = Jitted("scaled_ws", "scaled_specialized")


def run_ring(
    p: ScaledPlan, x: Tensor, tensors: Sequence[Tensor], c: RingSizes | WideSizes | None = None
) -> Tensor:
    """y [M, N] of x [M, K], with the block sizes of ``ring_sizes`` or ``c``."""
    m, device = x.shape[0], x.device.index
    y = x.new_empty(m, p.n)
    if not m:
        return y
    held = dict(zip(p.buffers, tensors, strict=True))
    q, s = hopper_codes(scaled_rule(p), aligned(x), held.get("input_scale"))
    c = c or ring_sizes(p, m)
    codes, integer = held["codes"].view(p.n, p.k), p.kind == "int8"
    kind = torch.int8 if integer else torch.float8_e4m3fn
    fixed = {"PDL": True, "INT": integer, "BLOCKED": p.kind == "block", "ST": c.stages}
    fixed |= {"SINGLE": p.single, "HAS_BIAS": p.bias}
    outputs = c.outputs if isinstance(c, WideSizes) else 16 * c.warps
    tiles = -(-m // c.bm) * -(-p.n // outputs)
    wd, xd = (Descriptor(t, (rows, 128), dtype=kind) for t, rows in ((codes, outputs), (q, c.bm)))
    first, last = (wd, xd, held["scales_0"], s, held.get("bias", s), y), (m, p.n, -(-p.k // 128))
    if isinstance(c, WideSizes):
        fixed |= {"BT": c.bm, "GN": c.together, "PAIR": c.pair}

        def build_wide() -> Build:
            return Build(constants=fixed, options={"num_warps": 4, "launch_pdl": True})

        key = ("scaled wide", p, c, y.dtype)
        launch(scaled_specialized, key, (tiles, 1), (*first, *last), device, build_wide)
        return y
    split, count, part = c.split, s, s
    if split > 1:
        counter = counters(device, tiles)
        if counter is None:
            split = 1
        else:
            count = counter
            part = torch.empty(tiles * split * outputs * c.bm, dtype=torch.float32, device=x.device)
    fixed |= {"BM": c.bm, "NW": c.warps, "KS": c.groups, "SPLIT": split, "GN": 8}

    def build() -> Build:
        return Build(constants=fixed, options={"num_warps": c.warps, "launch_pdl": True})

    key = ("scaled ring", p, c, split, y.dtype)
    launch(scaled_ring, key, (tiles * split, 1), (*first, part, count, *last), device, build)
    return y
