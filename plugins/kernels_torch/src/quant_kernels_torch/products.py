"""The torch ops over row-major 8-bit weights: quantize x, multiply codes, scale.

    quant_torch::fp8_linear(x, tensors, op)        torch._scaled_mm, scales per row
    quant_torch::block_fp8_linear(x, tensors, op)  torch.nn.functional.scaled_mm, 1x128 and 128x128
    quant_torch::int8_linear(x, tensors, op)       torch._int_mm
    quant_torch::fp8_grouped(x, experts, tensors, op)  torch._scaled_grouped_mm, tokens sorted

``tensors`` are the reference kernel's buffers, ``op`` the operation as text. Fast accumulation of
``_scaled_mm`` stays off: it costs ten times the error (1.7e-2 against 1.7e-3 measured on H100).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.kernels.calls import fake_grouped, fake_linear
from quant_core.kernels.reference import ReferenceKernel
from quant_core.numerics import decode_scale
from quant_core.spec import OpSpec
from quant_core.spec_json import op_from_text
from quant_kernels_torch.codes import group_codes, row_codes

__all__ = ["by_expert", "run_block_fp8", "run_fp8", "run_fp8_grouped", "run_int8"]

_FP8 = torch.float8_e4m3fn
_INT8_ROWS = 32  # torch._int_mm on CUDA wants more than 16

_lib = torch.library.Library("quant_torch", "DEF")
for _name in ("fp8_linear", "block_fp8_linear", "int8_linear"):
    _lib.define(f"{_name}(Tensor x, Tensor[] tensors, str op) -> Tensor")
_lib.define("fp8_grouped(Tensor x, Tensor experts, Tensor[] tensors, str op) -> Tensor")


@functools.lru_cache(maxsize=4096)
def _names(text: str) -> tuple[str, ...]:
    return tuple(ReferenceKernel().allocate(op_from_text(text), "meta"))


def _named(text: str, tensors: list[Tensor]) -> tuple[OpSpec, dict[str, Tensor]]:
    return op_from_text(text), dict(zip(_names(text), tensors, strict=True))


def _finished(y: Tensor, x: Tensor, held: dict[str, Tensor], n: int) -> Tensor:
    y = y.to(x.dtype)
    if "bias" in held:
        y = y + held["bias"].to(y.dtype)
    return y.view(*x.shape[:-1], n)


def _weight_scale(held: dict[str, Tensor], op: OpSpec) -> Tensor:
    """float32 [1, N] or [1, 1]."""
    return decode_scale(held["scales_0"], op.weight.scales[0].element).reshape(1, -1)


def _fp8_linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, flat = op.size("n"), x.reshape(-1, op.size("k"))
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], n)
    acts = op.operand("input")
    assert acts is not None
    codes, s = row_codes(flat, acts, held.get("input_scale"))
    w, sw = held["codes"].view(_FP8), _weight_scale(held, op)
    if x.dtype == torch.bfloat16 and not s.numel() == sw.numel() == 1:
        s, sw = s.expand(flat.shape[0], 1).contiguous(), sw.expand(1, n).contiguous()
        y = torch._scaled_mm(codes, w.t(), scale_a=s, scale_b=sw, out_dtype=x.dtype)
    else:  # row scales are for bfloat16 results only
        one = torch.ones((), device=x.device)
        y = torch._scaled_mm(codes, w.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        y = y * s * sw
    return _finished(y, x, held, n)


def _block_fp8_linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, flat = op.size("n"), x.reshape(-1, op.size("k"))
    rows = flat.shape[0]
    if not rows:
        return x.new_empty(*x.shape[:-1], n)
    acts = op.operand("input")
    assert acts is not None
    padded = F.pad(flat, (0, 0, 0, -rows % 8))  # cuBLAS refuses a single row
    codes, s = group_codes(padded, acts, 128)
    sw = decode_scale(held["scales_0"], op.weight.scales[0].element)
    sw = F.pad(sw, (0, -sw.shape[1] % 4))  # wanted by torch: blocks along K in fours
    kinds = F.ScalingType
    y = F.scaled_mm(
        codes,
        held["codes"].view(_FP8).t(),
        scale_a=s.t().contiguous().t(),
        scale_recipe_a=kinds.BlockWise1x128,
        scale_b=sw.t(),
        scale_recipe_b=kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return _finished(y[:rows], x, held, n)


def _int8_linear(x: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, flat = op.size("n"), x.reshape(-1, op.size("k"))
    rows = flat.shape[0]
    if not rows:
        return x.new_empty(*x.shape[:-1], n)
    acts = op.operand("input")
    assert acts is not None
    codes, s = row_codes(flat, acts, held.get("input_scale"), held.get("input_zero"))
    if x.device.type == "cuda" and rows < _INT8_ROWS:
        codes = F.pad(codes, (0, 0, 0, _INT8_ROWS - rows))
    sums = torch._int_mm(codes, held["codes"].view(torch.int8).t())[:rows]
    if "out_scale" in held:
        total = sums + held["acc_bias"] if "acc_bias" in held else sums
        y = torch.mul(total, held["out_scale"])
    else:
        y = torch.mul(sums, s).mul_(_weight_scale(held, op))
    if s.numel() == 1:  # no scale of its own tells of a token's NaN or infinity
        y = torch.where(flat.isfinite().all(dim=-1, keepdim=True), y, torch.nan)
    return _finished(y, x, held, n)


def by_expert(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token order sorted by expert, end of each expert's tokens int32 [E], token has an expert).

    An index outside [0, count) is a sentinel for "no expert here"; such tokens come last.
    """
    here = (experts >= 0) & (experts < count)
    key = torch.where(here, experts, count)
    order = torch.argsort(key, stable=True)
    edges = torch.arange(count, device=key.device, dtype=key.dtype)
    ends = torch.searchsorted(key[order], edges, right=True)
    return order, ends.to(torch.int32), here


def _fp8_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], op_text: str) -> Tensor:
    op, held = _named(op_text, tensors)
    n, count = op.size("n"), op.size("experts")
    out = x.new_zeros(x.shape[0], n)
    if not x.shape[0]:
        return out
    acts = op.operand("input")
    assert acts is not None
    order, ends, here = by_expert(experts, count)
    codes, s = row_codes(x[order], acts, None)
    sw = decode_scale(held["scales_0"], op.weight.scales[0].element).reshape(count, -1)
    y = torch._scaled_grouped_mm(
        codes,
        held["codes"].view(_FP8).transpose(1, 2),
        s.reshape(-1),
        sw.expand(count, n).contiguous(),
        offs=ends,
        out_dtype=torch.bfloat16,
    )
    if "bias" in held:
        y = y + held["bias"].to(y.dtype)[experts[order].clamp(0, count - 1)]
    out[order] = torch.where(here[order].unsqueeze(1), y.to(x.dtype), 0)
    return out


for _name, _impl, _fake in (
    ("fp8_linear", _fp8_linear, fake_linear),
    ("block_fp8_linear", _block_fp8_linear, fake_linear),
    ("int8_linear", _int8_linear, fake_linear),
    ("fp8_grouped", _fp8_grouped, fake_grouped),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_torch::{_name}", _fake, lib=_lib)


def run_fp8(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    return torch.ops.quant_torch.fp8_linear(x, tensors, text)


def run_block_fp8(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    return torch.ops.quant_torch.block_fp8_linear(x, tensors, text)


def run_int8(text: str, tensors: list[Tensor], x: Tensor) -> Tensor:
    return torch.ops.quant_torch.int8_linear(x, tensors, text)


def run_fp8_grouped(text: str, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    return torch.ops.quant_torch.fp8_grouped(x, experts, tensors, text)
