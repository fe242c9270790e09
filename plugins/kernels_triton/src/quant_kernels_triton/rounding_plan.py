"""Which activations ``rounding`` rounds, and with which constants; plain data, no torch.

kind      0 stored scale, 1 a float per group, 2 e8m0, 3 a small float per group
factor    0 none, 1 stored, 2 of the token, 3 of the tensor
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from quant_core.kernels.base import Rejected
from quant_core.spec import TENSOR, OpSpec, QuantSpec, Scale
from quant_core.spec_json import from_text, to_text

__all__ = ["MOST", "RoundPlan", "describe_round", "round_from_text"]

ELEMENTS = {  # mantissa bits, exponent of the smallest normal, largest value
    "fp4_e2m1": (1, 0, 6.0),
    "fp6_e2m3": (3, 0, 7.5),
    "fp6_e3m2": (2, -2, 28.0),
    "fp8_e4m3": (3, -6, 448.0),
    "fp8_e5m2": (2, -14, 57344.0),
    "fp8_e4m3_fnuz": (3, -7, 240.0),
    "fp8_e5m2_fnuz": (2, -15, 57344.0),
}
_EPSILON = {"fp8_e4m3": 0.125, "fp8_e5m2": 0.25, "fp8_e4m3_fnuz": 0.125, "fp8_e5m2_fnuz": 0.25}
_WIDE = ("f32", "bf16", "f16")
_EPS32 = 2.0**-23
_TIES = {"even": 0, "down": 1, "up": 2, "away": 2}
MOST = 32768  # elements of a tile: what a program holds in registers
_EARLY = "early "
_ANY = 1024  # columns of a group where groups do not matter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundPlan:
    """All that the kernel depends on but sizes; equal to itself only (one text, one object)."""

    spec: QuantSpec
    group: int  # columns that one scale covers, 0 = the token
    constants: dict[str, Any]
    table: str  # e8m0: of the exponent's steps; small floats: of a stored scale's values; "" none
    first: bool  # magnitudes of the whole tensor come first
    whole: bool  # a program needs all of its token
    stored: bool
    early: bool = False  # the product behind starts early (``Kernel.starts_early``)

    def text(self) -> str:
        """What ``round_from_text`` makes the plan of."""
        return (_EARLY if self.early else "") + to_text(self.spec)

    def columns(self, k: int) -> int:
        """Columns of one group."""
        if self.group:
            return min(self.group, k)
        return k if self.whole_token else min(_ANY, k)

    def held(self, k: int) -> int:
        """Elements of a token that one program must hold."""
        return k if self.whole else self.columns(k)

    @property
    def whole_token(self) -> bool:
        """Whether a group is the token itself."""
        fine = self.spec.scales[0]
        return not fine.static and fine.grain[0] == 1 and fine.grain[1] == 0


def _bits_kind(element: str) -> int:
    if element in _WIDE:
        return 0
    if element.startswith("uint"):
        return 10 + int(element[4:])
    if element.startswith("int"):
        return 20 + int(element[3:])
    return 1


def _kind(scale: Scale) -> int:
    if scale.static:
        return 0
    return 1 if scale.element in _WIDE else 2 if scale.element == "e8m0" else 3


def _constants(spec: QuantSpec, experts: bool) -> dict[str, Any]:
    fine, kind = spec.scales[0], _kind(spec.scales[0])
    outer = spec.scales[1] if len(spec.scales) > 1 else None
    is_float = spec.element.kind == "float"
    man, emin, high = ELEMENTS.get(spec.element.name, (0, 0, 0.0))
    low = -high
    if not is_float:
        signed = spec.element.kind == "int"
        low = -float(1 << (spec.element.bits - 1)) if signed else 0.0
        high = low + float((1 << spec.element.bits) - 1)
    peak = fine.peak or high
    sman, semin, shigh = ELEMENTS.get(fine.element, (0, 0, 0.0))
    bound = peak if kind == 2 else 1.0
    factor = 0
    if outer is not None:
        factor = 1 if outer.static else 3 if outer.grain == TENSOR else 2
    zero = spec.zero
    return {
        "KIND": kind,
        "STORED": _bits_kind(fine.element) if kind == 0 else 0,
        "STORED_ZERO": _bits_kind(zero.element) if kind == 0 and zero is not None else 0,
        "PER_GROUP": kind == 0 and fine.grain[1] != 0,
        "EXPERTS": experts,
        "INVERSE": fine.inverse,
        "HAS_ZERO": zero is not None,
        "FACTOR": factor,
        "FACTOR_INVERSE": factor == 1 and outer is not None and outer.inverse,
        "FACTOR_OVER": (outer.peak if outer is not None else 0.0) or high * (shigh or 1.0),
        "FACTOR_PLAIN": outer is not None and outer.peak > 0,
        "PEAK": peak,
        "LEAST": fine.least * bound,
        "MOST": fine.most * bound,
        "EPS": _EPSILON.get(fine.element, _EPS32),
        "IS_FLOAT": is_float,
        "LOW": low,
        "HIGH": high,
        "MAN": man,
        "EMIN": emin,
        "SIGNED_ZERO": not spec.element.name.endswith("_fnuz") or spec.ties != "even",
        "TIES": _TIES[spec.ties],
        "SMAN": sman,
        "SEMIN": semin,
        "SHIGH": shigh,
        "TENSOR": kind != 0 and fine.grain == TENSOR,
    }


def describe_round(op: OpSpec) -> RoundPlan | Rejected:
    """The plan of a "quantize" operation, or the first reason why there is none.

    The reference must have accepted the operand already (``activations.unsupported_input``).
    """
    if op.op != "quantize":
        return Rejected(axis="op", have=op.op, need="quantize")
    spec = op.operand("input")
    if spec is None:
        return Rejected(axis="operands", have="none", need="input")
    if op.act_dtype not in ("bfloat16", "float16", "float32"):
        return Rejected(axis="act_dtype", have=op.act_dtype, need="bfloat16, float16 or float32")
    known = spec.element.kind in ("int", "uint") or spec.element.name in ELEMENTS
    if not known or spec.element.bits > 16:
        need = f"an integer of up to 16 bits, {' or '.join(ELEMENTS)}"
        return Rejected(axis="input", have=spec.element.name, need=need)
    p, k = _plan(spec, bool(op.size("experts", 0))), op.size("k")
    if "starts_early" in op.features:
        p = replace(p, early=True)
    if not 0 < p.held(k) <= MOST:
        need = f"at most {MOST} features under one scale"
        return Rejected(axis="sizes", have=f"{p.held(k)}", need=need)
    return p


@functools.cache
def _plan(spec: QuantSpec, experts: bool) -> RoundPlan:
    fine, constants = spec.scales[0], _constants(spec, experts)
    table = ""
    if constants["KIND"] == 2:
        table = f"steps {spec.element.name} {fine.rule or 'rceil'} {constants['PEAK']!r}"
    elif constants["STORED"] == 1:
        table = f"values {fine.element}"
    return RoundPlan(
        spec=spec,
        group=fine.grain[1],
        constants=constants,
        table=table,
        first=bool(constants["TENSOR"]) or constants["FACTOR"] == 3,
        whole=constants["FACTOR"] == 2,
        stored=any(s.static for s in spec.scales),
    )


@functools.cache
def round_from_text(text: str, experts: bool) -> RoundPlan:
    """The plan of an "input" operand, given as ``RoundPlan.text`` or as the text of its spec."""
    early, spec = text.startswith(_EARLY), text.removeprefix(_EARLY)
    p = _plan(from_text(spec), experts)
    return replace(p, early=True) if early else p
