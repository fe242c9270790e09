"""Activations rounded in C: core's operation ``quantize``; csrc/round.h.

    quant_cpu::round_input(x, scale, zero, spec) -> x^
    quant_cpu::round_experts(x, scale, zero, experts, spec) -> x^

Equal to the reference bit for bit. Where x or a scale is not finite the reference itself answers,
and so it does for any dtype but three.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.activations import fake_quantize, unsupported_input
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.numerics import decode_scale, element_range, mx_scale
from quant_core.spec import TENSOR, Element, OpSpec, QuantSpec, Scale
from quant_core.spec_json import from_text, to_text
from quant_kernels_cpu.descriptor import DTYPES
from quant_kernels_cpu.library import ISAS, library
from quant_kernels_cpu.offered import no_c_call
from quant_kernels_cpu.watch import watched

__all__ = ["ROUND", "CpuRound"]

_CALL = struct.Struct("@13q")  # qk_round_call of csrc/round_calls.h
_STORED, _FLOAT, _EXPONENT, _SMALL = range(4)
_NONE, _OF_STORED, _OF_TOKEN, _OF_TENSOR = range(4)
_TIES = {"even": 0, "down": 1, "up": 2, "away": 2}
_FORMS = {  # fraction bits, exponent of the smallest normal number
    "fp4_e2m1": (1, 0),
    "fp6_e2m3": (3, 0),
    "fp6_e3m2": (2, -2),
    "fp8_e4m3": (3, -6),
    "fp8_e5m2": (2, -14),
    "fp8_e4m3_fnuz": (3, -7),
    "fp8_e5m2_fnuz": (2, -15),
}
_EPSILON = {"fp8_e4m3": 0.125, "fp8_e5m2": 0.25, "fp8_e4m3_fnuz": 0.125, "fp8_e5m2_fnuz": 0.25}
_EPS32 = 2.0**-23
_NAMES = ("bfloat16", "float16", "float32")
_MOST_BITS = 16
_NEVER = 0x7FFFFFFF  # above the bits of every float
_FIXED_US = 4.0
_US_PER_ELEMENT = 6e-4  # one thread; benchmarks/cpu_layers.py


class _Rounded(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bits", "exponent", "minus_zero")),
        *((name, ctypes.c_double) for name in ("low", "high")),
    ]


class _Rule(ctypes.Structure):
    """``qk_rounding`` of csrc/round_calls.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "factor", "inverse", "factor_inverse")),
        *((name, ctypes.c_int64) for name in ("factor_plain", "zero", "ties", "whole")),
        ("code", _Rounded),
        ("scale", _Rounded),
        *((name, ctypes.c_double) for name in ("peak", "least", "most", "eps", "factor_over")),
    ]


def _rounded(element: Element, ties: str) -> _Rounded:
    low, high = element_range(element)
    if element.kind != "float":
        return _Rounded(bits=-1, low=low, high=high)
    fraction, exponent = _FORMS[element.name]
    minus = not element.name.endswith("_fnuz") or ties != "even"
    return _Rounded(bits=fraction, exponent=exponent, minus_zero=minus, low=low, high=high)


def _kind(scale: Scale) -> int:
    if scale.static:
        return _STORED
    return _EXPONENT if scale.element == "e8m0" else _SMALL if scale.element in _FORMS else _FLOAT


def _factor(spec: QuantSpec) -> int:
    if len(spec.scales) == 1:
        return _NONE
    outer = spec.scales[1]
    return _OF_STORED if outer.static else _OF_TENSOR if outer.grain == TENSOR else _OF_TOKEN


def steps(element: Element, rule: str, peak: float) -> Tensor:
    """int32 [512]: the byte of every power of two, and the bits from which on it is one more.

    Found by asking ``mx_scale`` itself: within one binade its byte rises by at most one.
    """
    first = torch.arange(256, dtype=torch.int32) << 23
    last = first + 0x7FFFFF

    def byte(bits: Tensor) -> Tensor:
        return mx_scale(bits.view(torch.float32), element, rule, peak).to(torch.int32)

    base, low, high = byte(first), first.clone(), last.clone()
    for _ in range(23):
        middle = low + ((high - low) >> 1)
        rises = byte(middle) > base
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return torch.cat([base, torch.where(byte(last) > base, high, _NEVER)])


class _Plan:
    """What a spec asks of C; kept for the life of the process."""

    def __init__(self, spec: QuantSpec) -> None:
        fine = spec.scales[0]
        kind, factor = _kind(fine), _factor(spec)
        outer = spec.scales[1] if factor else None
        peak = fine.peak or element_range(spec.element)[1]
        bound = peak if kind == _EXPONENT else 1.0
        rule = _Rule(
            kind=kind,
            factor=factor,
            inverse=fine.inverse,
            factor_inverse=factor == _OF_STORED and outer is not None and outer.inverse,
            factor_plain=outer is not None and outer.peak > 0,
            zero=spec.zero is not None,
            ties=_TIES[spec.ties],
            whole=kind != _STORED and fine.grain == TENSOR,
            code=_rounded(spec.element, spec.ties),
            peak=peak,
            least=fine.least * bound,
            most=fine.most * bound,
            eps=_EPSILON.get(fine.element, _EPS32),
        )
        if kind == _SMALL:
            small = Element(name=fine.element, bits=8, kind="float")
            rule.scale = _rounded(small, "even")
            rule.factor_over = element_range(spec.element)[1] * element_range(small)[1]
        if outer is not None and outer.peak:
            rule.factor_over = outer.peak
        self.spec, self.rule = spec, rule
        self.address, self.group = ctypes.addressof(rule), fine.grain[1]
        self.steps = steps(spec.element, fine.rule or "rceil", peak) if kind == _EXPONENT else None
        self.steps_at = 0 if self.steps is None else self.steps.data_ptr()
        static = next((s for s in spec.scales if s.static), None)
        self.stored = "" if static is None else static.element
        self.per_group = int(kind == _STORED and self.group > 0)


@functools.lru_cache(maxsize=512)
def _plan(text: str) -> _Plan:
    return _Plan(from_text(text))


def _float32(values: Tensor, element: str) -> Tensor:
    if element == "f32" and values.dtype == torch.float32:
        return values.contiguous()
    return decode_scale(values, element).float().contiguous()


def _in_c(
    x: Tensor, plan: _Plan, scale: Tensor | None, zero: Tensor | None, rows: int
) -> Tensor | None:
    """x^, or None where the reference has to answer; stored values are those of ``rows`` rows."""
    k, kind = x.shape[-1], DTYPES.get(x.dtype)
    if kind is None or x.numel() == 0:
        return None
    held = zeros = None
    count = -(-k // plan.group) if plan.per_group else 1
    if plan.stored:
        zero_element = "" if plan.spec.zero is None else plan.spec.zero.element
        if scale is None or (zero is None) != (not zero_element):
            return None
        held = _float32(scale, plan.stored)
        zeros = None if zero is None else _float32(zero, zero_element)
        if any(t is not None and t.numel() != rows * count for t in (held, zeros)):
            return None
    x = x.contiguous()
    y = torch.empty_like(x)
    lib = library()
    packed = _CALL.pack(
        plan.address, plan.steps_at, x.data_ptr(), 0 if held is None else held.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), y.data_ptr(), kind, x.numel() // k, k,
        min(plan.group, k) or k, plan.per_group, count if rows > 1 else 0, lib.isa,
    )  # fmt: skip
    return None if lib.c.qk_round(packed) else y


def _round(x: Tensor, scale: Tensor | None, zero: Tensor | None, text: str) -> Tensor:
    plan = _plan(text)
    made = _in_c(x, plan, scale, zero, 1)
    return _reference(x, plan.spec, scale, zero) if made is None else made


def _round_experts(
    x: Tensor, scale: Tensor, zero: Tensor | None, experts: Tensor, text: str
) -> Tensor:
    plan, at = _plan(text), experts.clamp(0)  # a token of no expert may be anything
    made = _in_c(x, plan, scale[at], None if zero is None else zero[at], x.shape[0])
    if made is not None:
        return made
    made = x.clone()
    for e in range(scale.shape[0]):
        mine = _reference(x, plan.spec, scale[e], None if zero is None else zero[e])
        made = torch.where((experts == e).unsqueeze(1), mine, made)
    return made


def _reference(x: Tensor, spec: QuantSpec, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    made = fake_quantize(flat, spec, scale, zero)
    return (made.clone() if made is flat else made).view(x.shape)


_lib = torch.library.Library("quant_cpu", "FRAGMENT")
_lib.define("round_input(Tensor x, Tensor? scale, Tensor? zero, str spec) -> Tensor")
_lib.impl("round_input", _round, "CPU")
torch.library.register_fake(
    "quant_cpu::round_input", lambda x, scale, zero, spec: x.new_empty(x.shape), lib=_lib
)
_lib.define(
    "round_experts(Tensor x, Tensor scale, Tensor? zero, Tensor experts, str spec) -> Tensor"
)
_lib.impl("round_experts", _round_experts, "CPU")
torch.library.register_fake(
    "quant_cpu::round_experts",
    lambda x, scale, zero, experts, spec: x.new_empty(x.shape),
    lib=_lib,
)
_op = torch.ops.quant_cpu.round_input.default
_experts_op = torch.ops.quant_cpu.round_experts.default


def _run(
    text: str, buffers: list[Tensor], x: Tensor, scale: Tensor | None = None,
    zero: Tensor | None = None, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if watched(x, x if scale is None else scale):
        return _op(x, scale, zero, text)  # type: ignore[no-any-return]
    return _round(x, scale, zero, text)


def _run_experts(
    text: str, buffers: list[Tensor], x: Tensor, scale: Tensor, zero: Tensor | None,
    experts: Tensor,
) -> Tensor:  # fmt: skip
    """Each token under the stored values of its own expert."""
    if watched(x, scale):
        return _experts_op(x, scale, zero, experts, text)  # type: ignore[no-any-return]
    return _round_experts(x, scale, zero, experts, text)


class CpuRound(Weightless):
    """Every rule that core knows, in one pass over x."""

    name = "cpu_round"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if odd := no_c_call(op, "quantize"):
            return odd
        if odd := unsupported_input(op):
            return odd
        spec = op.operand("input")
        assert spec is not None  # unsupported_input has seen to it
        if spec.element.name not in _FORMS and spec.element.bits > _MOST_BITS:
            need = f"an integer of up to {_MOST_BITS} bits, {' or '.join(_FORMS)}"
            return Rejected(axis="input", have=spec.element.name, need=need)
        if op.act_dtype not in _NAMES:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_NAMES))
        per_row = op.size("k") * _US_PER_ELEMENT
        costs = tuple((m, round(_FIXED_US + m * per_row, 1)) for m in (1, 16, 256, 4096))
        return Accepted(cost=costs[0][1], costs=costs, note=ISAS[library().isa])

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        run = _run_experts if op.size("experts", 0) else _run
        return functools.partial(run, to_text(op.operand("input")))


ROUND = CpuRound()
