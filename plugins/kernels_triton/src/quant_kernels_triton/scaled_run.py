"""Running products of 8-bit codes: one kernel quantizes x, one multiplies.

    rows of x   few          more
    fp8         gemm8        torch._scaled_mm with scales per row (bfloat16, N a multiple of 16),
                             else gemm8
    int8        gemm8        torch._int_mm and ``epilogue`` (N a multiple of 8), else gemm8
    block       gemm8        torch.nn.functional.scaled_mm (N a multiple of 128), else gemm8

Fast accumulation of torch's fp8 product stays off: it costs ten times the error.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels_triton.arguments import capability
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.scaled_plan import ScaledPlan, few_rows
from quant_kernels_triton.wna16 import gluon_missing

__all__ = ["codes_of", "run_scaled"]

quantize, scaled = Jits("quantize"), Jits("scaled")

_BN = 64  # outputs of a block of gemm8


def _codes_key(p: ScaledPlan, dtype: torch.dtype, bt: int, column_major: bool) -> tuple[Any, ...]:
    bounded = p.least > 0 or p.most > 0
    if p.kind == "block":
        return ("quantize_groups", dtype, column_major, bounded, bt, p.k)
    return ("quantize", p, dtype)


def codes_of(
    p: ScaledPlan, x: Tensor, input_scale: Tensor | None, column_major: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes uint8 (bits of e4m3) or int8 [T, K], and float32 scales [T] or [T, K/128].

    With ``column_major`` the scales of groups lie as [K/128, T] and are returned transposed.
    """
    t, k, device = x.shape[0], p.k, x.device
    fp8 = p.kind != "int8"
    q = torch.empty(t, k, dtype=torch.uint8 if fp8 else torch.int8, device=device)
    bounds = (p.peak, p.least, p.most)
    bounded = p.least > 0 or p.most > 0
    bt = 16 if t > 16 else 4
    key = _codes_key(p, x.dtype, bt, column_major)
    if p.kind == "block":
        groups = -(-k // 128)
        s = torch.empty((groups, t) if column_major else (t, groups), device=device)

        def build() -> Build:
            fixed = {"COLUMN_MAJOR": column_major, "BOUNDED": bounded, "BT": bt}
            return Build(constants=fixed, options={"num_warps": 4})

        args = (x, q, s, t, k, *bounds)
        launch(quantize.quantize_groups, key, (-(-t // bt), groups), args, device.index, build)
        return q, s.t() if column_major else s
    s = torch.empty(t, dtype=torch.float32, device=device)
    bk = max(128, 1 << (k - 1).bit_length())
    warps = 4 if bk <= 4096 else 8 if bk <= 8192 else 16
    constants = {"FP8": fp8, "BK": bk} | ({} if p.static else {"BOUNDED": bounded})

    def build_tokens() -> Build:
        return Build(constants=constants, options={"num_warps": warps})

    if p.static:
        assert input_scale is not None
        args = (x, input_scale, q, s, k)
        launch(quantize.quantize_static, key, (t, 1), args, device.index, build_tokens)
    else:
        args = (x, q, s, k, *bounds)
        launch(quantize.quantize_tokens, key, (t, 1), args, device.index, build_tokens)
    return q, s


def _hopper(device: int | None) -> bool:
    """Whether the quantizers of ``codes_gluon`` run there."""
    return capability(device) == 90 and not gluon_missing()


def _codes_for_torch(p: ScaledPlan, x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``codes_of`` with scales of groups column-major, by the faster kernels where they run."""
    if not _hopper(x.device.index):
        return codes_of(p, x, input_scale, column_major=True)
    from quant_kernels_triton.codes_run import hopper_codes, scaled_rule

    q, s = hopper_codes(scaled_rule(p), x, input_scale)
    return q, s.t() if p.kind == "block" else s


def _rows_of_block(m: int) -> int:
    return 16 if m <= 16 else 32 if m <= 32 else 64


def _gemm8(p: ScaledPlan, q: Tensor, s: Tensor, held: dict[str, Tensor], y: Tensor) -> None:
    m, device = q.shape[0], q.device
    bm = _rows_of_block(m)
    codes = held["codes"]
    few = p.n < 16384  # keep all multiprocessors busy
    bk = 256 if few and p.kind != "block" else 128

    def build() -> Build:
        fixed = {
            "FP8": p.kind != "int8",
            "BLOCKED": p.kind == "block",
            "SINGLE": p.single,
            "HAS_BIAS": p.bias,
            "BM": bm,
            "BN": _BN,
            "BK": bk,
            "INTERPRET": interpreting(),
        }
        word = torch.uint8 if p.kind != "int8" else torch.int8
        options = {"num_warps": 4, "num_stages": 4}
        return Build(constants=fixed, options=options, views={2: word})

    args = (
        q, s, codes, held["scales_0"], held.get("bias", codes), y, m, p.n, p.k, -(-p.k // 128),
    )  # fmt: skip
    grid = (-(-m // bm) * -(-p.n // _BN), 1)
    launch(scaled.gemm8, ("gemm8", p, bm, y.dtype), grid, args, device.index, build)


def _finish(p: ScaledPlan, sums: Tensor, s: Tensor, held: dict[str, Tensor], y: Tensor) -> None:
    def build() -> Build:
        fixed = {"SINGLE": p.single, "HAS_BIAS": p.bias, "BN": 1024}
        return Build(constants=fixed, options={"num_warps": 4})

    args = (sums, s, held["scales_0"], held.get("bias", s), y, p.n)
    key = ("epilogue", p, sums.dtype, y.dtype)
    grid = (y.shape[0], -(-p.n // 1024))
    launch(scaled.epilogue, key, grid, args, y.device.index, build)


@functools.cache
def _block_product() -> bool:
    return hasattr(F, "scaled_mm") and hasattr(F, "ScalingType")


def _many(p: ScaledPlan, x: Tensor, held: dict[str, Tensor]) -> Tensor | None:
    """The product by torch's matmuls; None where they do not take it."""
    m, n, device = x.shape[0], p.n, x.device
    if device.type == "meta":  # planned: nothing of torch's products is compiled
        _codes_for_torch(p, x, held.get("input_scale"))
        return x.new_empty(m, n)
    if device.type != "cuda":
        return None
    if p.kind == "int8" and n % 8 == 0 and p.k % 8 == 0:
        q, s = _codes_for_torch(p, x, held.get("input_scale"))
        y = x.new_empty(m, n)
        _finish(p, torch._int_mm(q, held["codes"].view(torch.int8).t()), s, held, y)
        return y
    if p.kind == "fp8" and n % 16 == 0:
        q, s = _codes_for_torch(p, x, held.get("input_scale"))
        w = held["codes"].view(torch.float8_e4m3fn).t()
        q = q.view(torch.float8_e4m3fn)
        if x.dtype == torch.bfloat16 and not p.bias:
            sw = held["scales_0"].float().reshape(1, -1).expand(1, n).contiguous()
            return torch._scaled_mm(q, w, scale_a=s[:, None], scale_b=sw, out_dtype=x.dtype)
        one = torch.ones((), device=device)
        sums = torch._scaled_mm(q, w, scale_a=one, scale_b=one, out_dtype=torch.float32)
        y = x.new_empty(m, n)
        _finish(p, sums, s, held, y)
        return y
    if p.kind != "block" or n % 128 or p.k % 128 or not _block_product():
        return None
    if x.dtype != torch.bfloat16:
        return None
    rows = m + -m % 8
    padded = F.pad(x, (0, 0, 0, rows - m)) if rows != m else x
    q, s = _codes_for_torch(p, padded, None)
    sw = held["scales_0"].float()
    if short := -sw.shape[1] % 4:  # torch wants blocks along K in fours
        sw = F.pad(sw, (0, short))
    kinds = F.ScalingType
    y = F.scaled_mm(
        q.view(torch.float8_e4m3fn),
        held["codes"].view(torch.float8_e4m3fn).t(),
        scale_a=s,
        scale_recipe_a=kinds.BlockWise1x128,
        scale_b=sw.t(),
        scale_recipe_b=kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )[:m]
    return y + held["bias"].to(y.dtype) if p.bias else y


def run_scaled(
    p: ScaledPlan, x: Tensor, tensors: Sequence[Tensor], few: int | None = None
) -> Tensor:
    """y [M, N] of x [M, K]; see the module's docstring. ``few``: rows that gemm8 takes at most."""
    x = aligned(x)
    m = x.shape[0]
    held = dict(zip(p.buffers, tensors, strict=True))
    most = few_rows(p.kind, p.n) if few is None else few
    if m == 0:
        return x.new_empty(0, p.n)
    if m > most and (y := _many(p, x, held)) is not None:
        return y
    q, s = codes_of(p, x, held.get("input_scale"))
    y = x.new_empty(m, p.n)
    _gemm8(p, q, s, held, y)
    return y
