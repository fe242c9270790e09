"""Running the ring of 8-bit codes: quantize x, multiply what lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quant_kernels_triton.codes_run import hopper_codes, scaled_rule
from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.gluon_run import _Desc
from quant_kernels_triton.launch import Build, aligned, is_compiled, launch
from quant_kernels_triton.scaled_plan import ScaledPlan
from quant_kernels_triton.scaled_ring import scaled_ring
from quant_kernels_triton.scaled_ring_plan import RingSizes, WideSizes, ring_sizes
from quant_kernels_triton.scaled_ws import scaled_specialized

__all__ = ["run_ring"]


def _descriptor(t: Tensor, rows: int, integer: bool, known: bool) -> Any:
    shape, strides, box = list(t.shape), [t.shape[1], 1], [rows, 128]
    if known:
        return _Desc(t, shape, strides)
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.int8 if integer else gl.float8e4nv)
    held = t.view(torch.int8 if integer else torch.float8_e4m3fn)
    return TensorDescriptor(held, shape, strides, box, layout)


def _wide(
    p: ScaledPlan, c: WideSizes, q: Tensor, s: Tensor, codes: Tensor, held: dict[str, Tensor],
    y: Tensor,
) -> None:  # fmt: skip
    m, device = y.shape[0], y.device.index
    key = ("scaled wide", p, c, y.dtype)

    def build() -> Build:
        fixed = {"BT": c.bm, "ST": c.stages, "GN": c.together, "PDL": True}
        fixed |= {"SINGLE": p.single, "HAS_BIAS": p.bias}
        return Build(constants=fixed, options={"num_warps": 4, "launch_pdl": True})

    known = is_compiled(key, device)
    wd, xd = _descriptor(codes, 128, True, known), _descriptor(q, c.bm, True, known)
    args = (wd, xd, held["scales_0"], s, held.get("bias", s), y, m, p.n, -(-p.k // 128))
    grid = (-(-m // c.bm) * -(-p.n // 128), 1)
    launch(scaled_specialized, key, grid, args, device, build)


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
    if isinstance(c, WideSizes):
        _wide(p, c, q, s, codes, held, y)
        return y
    bn = 16 * c.warps
    tiles = -(-m // c.bm) * -(-p.n // bn)
    split, count, part = c.split, s, s
    if split > 1:
        counter = counters(device, tiles)
        if counter is None:
            split = 1
        else:
            count = counter
            part = torch.empty(tiles * split * bn * c.bm, dtype=torch.float32, device=x.device)
    key = ("scaled ring", p, c, split, y.dtype)

    def build() -> Build:
        fixed = {"BM": c.bm, "NW": c.warps, "KS": c.groups, "ST": c.stages, "SPLIT": split}
        fixed |= {"GN": 8, "PDL": True, "INT": integer, "BLOCKED": p.kind == "block"}
        fixed |= {"SINGLE": p.single, "HAS_BIAS": p.bias}
        return Build(constants=fixed, options={"num_warps": c.warps, "launch_pdl": True})

    known = is_compiled(key, device)
    wd, xd = _descriptor(codes, bn, integer, known), _descriptor(q, c.bm, integer, known)
    args = (wd, xd, held["scales_0"], s, held.get("bias", s), y, part, count, m, p.n,
            -(-p.k // 128))  # fmt: skip
    launch(scaled_ring, key, (tiles * split, 1), args, device, build)
    return y
