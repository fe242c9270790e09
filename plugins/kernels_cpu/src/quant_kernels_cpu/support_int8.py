"""Which operations with int8 activations the C kernels run; imports no torch.

``describe_int8`` turns an ``OpSpec`` into an ``Int8Layout`` or says why not. A code of the weight
is kept as the byte c + 128, c being the code less its constant zero point.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, Element, OpSpec, QuantSpec
from quant_kernels_cpu.support import ROWS

__all__ = [
    "IN_BLOCKS",
    "SIGNED_ROWS",
    "UNSIGNED_ROWS",
    "Int8Layout",
    "describe_int8",
    "int8_layout_from_text",
]

IN_BLOCKS, SIGNED_ROWS, UNSIGNED_ROWS = range(3)  # csrc/int8.h
_STEP = 16  # columns that the loops take at once
_MOST_K = 1 << 16  # sums of 255 * 128 a column stay within 32 bits
_FLOATS = ("bfloat16", "float16", "float32")
_WIDE = ("f32", "f16", "bf16")
_SIDE = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Layout:
    """All that the buffers' shapes and the C kernel depend on.

    ``group`` columns share a weight scale, as they are stored; ``input_scale`` is the element of
    the stored activation scale, "" where it is max|x| / peak of each token.
    """

    op: str
    n: int
    k: int
    experts: int
    bits: int
    bias: int  # subtracted from a code, modulo 256, where it is kept
    scale: str
    group: int
    single: bool  # one scale for the whole matrix
    input_scale: str
    input_zero: bool
    peak: float
    least: float
    most: float
    lowest: int
    highest: int
    acc_bias: bool
    out_scale: bool
    bias_dtype: str  # "" = no bias
    act_dtype: str
    stored: int = IN_BLOCKS  # how codes lie, and scales with them

    width = 8
    up = 0
    per = 4  # codes of one row in 32 bits

    @property
    def blocks(self) -> int:
        return -(-self.n // ROWS)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes that one matrix takes."""
        return self.blocks * ROWS * self.k

    @property
    def sums(self) -> bool:
        """Whether a zero point asks for the sums of the weight's codes."""
        return self.input_zero and not self.out_scale

    def text(self) -> str:
        """Compact JSON in single quotes, which Inductor's C++ code needs as it escapes none; the
        argument of the torch ops. Inverse of ``int8_layout_from_text``."""
        return json.dumps(asdict(self), separators=(",", ":")).replace('"', "'")


@functools.lru_cache(maxsize=4096)
def int8_layout_from_text(text: str) -> Int8Layout:
    """The ``Int8Layout`` of a text, cached: called by the torch ops on every call."""
    return Int8Layout(**json.loads(text.replace("'", '"')))


def _range(e: Element) -> tuple[int, int]:
    """Lowest and highest value of an integer element."""
    if e.kind == "uint":
        return 0, (1 << e.bits) - 1
    return -(1 << (e.bits - 1)), (1 << (e.bits - 1)) - 1


def _input_problem(op: OpSpec) -> Rejected | None:
    spec = op.operand("input")
    if spec is None:
        return Rejected(axis="operands", have="weight", need="input, weight")
    if spec.element.kind != "int" or not 2 <= spec.element.bits <= 8:
        return Rejected(axis="input", have=spec.element.name, need="int2 to int8")
    if len(spec.scales) != 1 or spec.gather or spec.blocks:
        return Rejected(axis="input", have=spec.label, need="one scale, columns in order")
    scale = spec.scales[0]
    if scale.grain != (TENSOR if scale.static else CHANNEL) or scale.inverse or scale.add:
        need = "a stored scale of the tensor, or a run-time scale of each token"
        return Rejected(axis="input", have=spec.label, need=need)
    if scale.element not in _WIDE or scale.rule:
        return Rejected(axis="input", have=scale.element, need=" or ".join(_WIDE))
    if spec.ties != "even":
        return Rejected(axis="input", have=f"ties {spec.ties}", need="ties to even")
    if spec.zero is not None and not (scale.static and spec.zero.kind == "code"):
        return Rejected(axis="input", have=spec.label, need="a stored zero code, or none")
    if spec.zero is not None and spec.zero.element != "int8":
        return Rejected(axis="input", have=f"zero in {spec.zero.element}", need="a zero in int8")
    return None


def _code_zero(spec: QuantSpec) -> int | None:
    """The constant to subtract so that codes fit a signed byte; None if there is none."""
    e, zero = spec.element, spec.zero
    value = 0 if zero is None else zero.value
    if (zero is not None and zero.kind != "const") or spec.blocks:
        return None
    if e.kind not in ("int", "uint") or not 2 <= e.bits <= 8 or (e.kind == "int" and e.bits < 8):
        return None
    lowest, highest = _range(e)
    return value if lowest - value >= -128 and highest - value <= 127 else None


def _weight_problem(spec: QuantSpec, k: int) -> Rejected | None:
    if _code_zero(spec) is None:
        need = "int8, or unsigned codes less a constant that makes them signed bytes"
        return Rejected(axis="element", have=spec.label, need=need)
    if spec.gather:
        return Rejected(axis="gather", have="reordered columns", need="columns in order")
    if len(spec.scales) != 1:
        return Rejected(axis="scales", have=f"{len(spec.scales)} factors", need="one factor")
    s = spec.scales[0]
    if s.inverse or not s.static or s.add or s.element not in _WIDE:
        need = f"a stored multiplier in {', '.join(_WIDE)}"
        return Rejected(axis="scales", have=spec.label, need=need)
    if s.grain != TENSOR and s.grain[0] != 1:
        return Rejected(axis="scales", have=f"grain {s.grain}", need="one row per value")
    if s.grain[1] % _STEP and s.grain[1] < k:
        return Rejected(axis="group", have=str(s.grain[1]), need=f"a multiple of {_STEP}")
    return None


def _feature_problem(op: OpSpec) -> Rejected | None:
    known = {f for f in op.features if f.partition(":")[0] in (*_SIDE, "tied")}
    if extra := sorted(op.features - known):
        return Rejected(axis="features", have=", ".join(extra), need=" or ".join(_SIDE))
    spec = op.operand("input")
    assert spec is not None  # _input_problem has seen to it
    static, out = spec.scales[0].static, "out_scale" in op.features
    stored = {"input_scale": static, "input_zero": spec.zero is not None}
    if wrong := [name for name, need in stored.items() if (name in op.features) != need]:
        return Rejected(axis="features", have=", ".join(sorted(op.features)), need=str(wrong[0]))
    if "acc_bias" in op.features and not out:
        return Rejected(axis="features", have="acc_bias alone", need="out_scale with it")
    if out and not static:
        return Rejected(axis="features", have="out_scale", need="a stored input scale with it")
    return None


def describe_int8(op: OpSpec, *, ops: tuple[str, ...]) -> Int8Layout | Rejected:
    """What the kernel needs to know of ``op``, or the first reason why it cannot run it.

    Args:
        ops: operations on offer.
    """
    if op.op not in ops:
        return Rejected(axis="op", have=op.op, need=" or ".join(ops))
    roles = sorted({role for role, _ in op.operands})
    if roles != ["input", "weight"]:
        return Rejected(axis="operands", have=", ".join(roles), need="input, weight")
    n, k = op.size("n"), op.size("k")
    problem = _input_problem(op) or _weight_problem(op.weight, k) or _feature_problem(op)
    if problem is not None:
        return problem
    if k % _STEP or not 0 < k <= _MOST_K or op.size("k_stored", k) != k:
        need = f"a multiple of {_STEP} up to {_MOST_K}"
        return Rejected(axis="in_features", have=str(k), need=need)
    if n == 0:
        return Rejected(axis="out_features", have="0", need="at least one row")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if op.act_dtype not in _FLOATS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
    bias = next((f.partition(":")[2] for f in op.features if f.startswith("bias:")), "float32")
    if "bias" in op.features and bias not in _FLOATS:
        return Rejected(axis="bias", have=bias, need=" or ".join(_FLOATS))
    return _layout(op, n, k, bias if "bias" in op.features else "")


def _layout(op: OpSpec, n: int, k: int, bias_dtype: str) -> Int8Layout:
    acts, weight = op.operand("input"), op.weight
    assert acts is not None
    scale, grain = acts.scales[0], weight.scales[0].grain
    lowest, highest = _range(acts.element)
    return Int8Layout(
        op=op.op,
        n=n,
        k=k,
        experts=op.size("experts", 0),
        bits=weight.element.bits,
        bias=((_code_zero(weight) or 0) - 128) % 256,
        scale=weight.scales[0].element,
        group=grain[1] if 0 < grain[1] < k else k,
        single=grain == TENSOR,
        input_scale=scale.element if scale.static else "",
        input_zero=acts.zero is not None,
        peak=scale.peak or highest,
        least=scale.least,
        most=scale.most,
        lowest=lowest,
        highest=highest,
        acc_bias="acc_bias" in op.features,
        out_scale="out_scale" in op.features,
        bias_dtype=bias_dtype,
        act_dtype=op.act_dtype,
    )
