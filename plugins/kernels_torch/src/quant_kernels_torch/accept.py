"""Which operations PyTorch's matrix products can run, and roughly how long they take.

Imports no torch. Each function answers None, or the first reason against.
"""

from __future__ import annotations

import math

from quant_core.kernels.base import ANY_ROWS, Rejected
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, OpSpec, Scale

__all__ = ["BLOCK", "at_rows", "block_fp8_problem", "common_problem", "fp8_problem", "int8_problem"]

BLOCK = 128
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # the last: or more
_WIDE = ("f32", "bf16", "f16")
_FLOATS = ("bfloat16", "float16", "float32")


def common_problem(op: OpSpec, ops: tuple[str, ...], features: tuple[str, ...]) -> Rejected | None:
    """What all row-major kernels ask for: operation, features, packing, dtype."""
    if op.op not in ops:
        return Rejected(axis="op", have=op.op, need=" or ".join(ops))
    if op.act_dtype not in _FLOATS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
    known = (*features, "tied")
    if extra := sorted(f for f in op.features if f.partition(":")[0] not in known):
        return Rejected(axis="features", have=", ".join(extra), need=" or ".join(features))
    spec = op.weight
    if spec.blocks or spec.element.bits != 8:
        return Rejected(axis="element", have=spec.label, need="codes of 8 bits")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if spec.gather:
        return Rejected(axis="gather", have="reordered columns", need="columns in order")
    if op.operand("input") is None:
        return Rejected(axis="operands", have="weight", need="input, weight")
    return None


def _multiple(op: OpSpec, of: int) -> Rejected | None:
    for axis, name in (("in_features", "k"), ("out_features", "n")):
        if op.size(name) % of or not op.size(name):
            return Rejected(axis=axis, have=str(op.size(name)), need=f"a multiple of {of}")
    return None


def _weight_scale_problem(scales: tuple[Scale, ...], k: int) -> Rejected | None:
    if len(scales) != 1:
        return Rejected(axis="scales", have=f"{len(scales)} factors", need="one factor")
    s = scales[0]
    row = s.grain == CHANNEL or (s.grain[0] == 1 and s.grain[1] >= k)
    if s.inverse or s.add or s.element not in _WIDE or not (row or s.grain == TENSOR):
        need = f"a multiplier per row or tensor in {', '.join(_WIDE)}"
        return Rejected(axis="scales", have=f"grain {s.grain} {s.element}", need=need)
    return None


def _input_problem(op: OpSpec, kind: str, name: str) -> Rejected | None:
    acts = op.operand("input")
    assert acts is not None, "common_problem has seen to it"
    if acts.element.name != name or acts.element.kind != kind or acts.ties != "even":
        return Rejected(axis="input", have=acts.label, need=f"{name}, ties to even")
    if len(acts.scales) != 1 or acts.gather or acts.blocks:
        return Rejected(axis="input", have=acts.label, need="one scale")
    s = acts.scales[0]
    if s.inverse or s.add or s.rule or s.element not in _WIDE:
        return Rejected(axis="input", have=acts.label, need=f"a multiplier in {', '.join(_WIDE)}")
    return None


def _grain_problem(op: OpSpec) -> Rejected | None:
    acts = op.operand("input")
    assert acts is not None, "common_problem has seen to it"
    s = acts.scales[0]
    if s.grain not in ((TENSOR,) if s.static else (TENSOR, CHANNEL)):
        need = "a stored scale of the tensor, or a run-time scale of tensor or token"
        return Rejected(axis="input", have=acts.label, need=need)
    if s.static != ("input_scale" in op.features):
        have = "no stored input scale" if s.static else "a stored input scale"
        return Rejected(axis="features", have=have, need="one exactly where the scale is stored")
    return None


def fp8_problem(op: OpSpec) -> Rejected | None:
    """fp8 times fp8 under one scale per row or tensor."""
    if op.weight.element.name != "fp8_e4m3" or op.weight.zero is not None:
        return Rejected(axis="element", have=op.weight.label, need="fp8_e4m3 without a zero")
    acts = op.operand("input")
    if acts is not None and acts.zero is not None:
        return Rejected(axis="input", have=acts.label, need="no zero")
    return (
        _input_problem(op, "float", "fp8_e4m3")
        or _weight_scale_problem(op.weight.scales, op.size("k"))
        or _grain_problem(op)
        or _multiple(op, 16)
    )


def block_fp8_problem(op: OpSpec) -> Rejected | None:
    """fp8 in blocks of 128 x 128 times fp8 in groups of 128."""
    if op.weight.element.name != "fp8_e4m3" or op.weight.zero is not None:
        return Rejected(axis="element", have=op.weight.label, need="fp8_e4m3 without a zero")
    if bad := _input_problem(op, "float", "fp8_e4m3"):
        return bad
    acts, scales = op.operand("input"), op.weight.scales
    assert acts is not None, "_input_problem has seen to it"
    if acts.scales[0].grain != (1, BLOCK) or acts.scales[0].static or acts.zero is not None:
        return Rejected(axis="input", have=acts.label, need="a run-time scale per 128 columns")
    fits = len(scales) == 1 and scales[0].grain == (BLOCK, BLOCK) and not scales[0].inverse
    if not fits or scales[0].add or scales[0].element not in _WIDE:
        return Rejected(axis="scales", have=op.weight.label, need="one scale per 128 x 128 block")
    if op.size("k") % BLOCK or op.size("n") % BLOCK:
        have = f"{op.size('n')} x {op.size('k')}"
        return Rejected(axis="sizes", have=have, need=f"multiples of {BLOCK}")
    if op.device[1] and op.device[1] != "9.0":
        return Rejected(axis="device", have=f"capability {op.device[1]}", need="9.0")
    return None


def int8_problem(op: OpSpec) -> Rejected | None:
    """int8 times int8 under one scale per row or tensor, or one combined output scale."""
    w = op.weight
    if w.element.name != "int8" or w.element.kind != "int" or w.zero is not None:
        return Rejected(axis="element", have=w.label, need="int8 without a zero")
    if bad := _input_problem(op, "int", "int8") or _weight_scale_problem(w.scales, op.size("k")):
        return bad
    if bad := _grain_problem(op):
        return bad
    acts = op.operand("input")
    assert acts is not None, "_input_problem has seen to it"
    combined = "out_scale" in op.features
    if acts.zero is not None and not (combined and acts.zero.kind == "code"):
        return Rejected(axis="input", have=acts.label, need="no zero, or a combined output scale")
    if ("input_zero" in op.features) != (acts.zero is not None):
        return Rejected(
            axis="features", have="input_zero", need="a zero exactly where it is stored"
        )
    if combined and not acts.scales[0].static:
        return Rejected(axis="features", have="out_scale", need="a stored input scale with it")
    if "acc_bias" in op.features and not combined:
        return Rejected(axis="features", have="acc_bias alone", need="out_scale with it")
    return _multiple(op, 8)


def at_rows(
    nbytes: float,
    flops_per_row: float,
    *,
    fixed_us: float,
    gbs: float,
    tflops: float,
    bytes_per_row: float = 0.0,
    first: bool = False,
) -> tuple[tuple[int, float], ...]:
    """Microseconds per number of rows: launches, then the larger of reading and multiplying.

    Args:
        bytes_per_row: moved besides, for every row of x.
        first: the weights are expanded before anything is multiplied: the sum of both.
    """
    out = []
    for m in ROWS:
        read, multiply = nbytes / gbs / 1e3, m * flops_per_row / tflops / 1e6
        work = read + multiply if first else max(read, multiply)
        us = fixed_us + work + m * bytes_per_row / gbs / 1e3
        out.append((ANY_ROWS if m == ROWS[-1] else m, math.ceil(us * 10) / 10))
    return tuple(out)
