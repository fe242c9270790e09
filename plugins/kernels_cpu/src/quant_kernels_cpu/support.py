"""Which operations the C kernels run, and the short text that describes one to them.

``describe`` turns an ``OpSpec`` into a ``Layout`` or says why not; nothing here imports torch.
A code is kept less a ``bias`` that makes it small and signed, and what its zero point still asks
for is subtracted after a group's sum:

    const v    bias = v   4-bit codes: W = code' * s, nothing left to subtract
                          8-bit codes: v if it fits a signed byte, the rest is ``shift``
    code z     bias = half the range       W = (code' + bias - z) * s
    float z    bias = 0 (8-bit: 128)       W = (code' + bias - z) * s
    offset o   bias = 0 (8-bit: 128)       W = (code' + bias) * s + o

Factors that C does not read (a rectangle of rows, more than two, one that is added or read from a
table) are multiplied while loading, to one float32 a group and row, and kept as they are stored
beside it, for ``restore``; ``stored`` names them then.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, TENSOR, OpSpec, QuantSpec, Scale

__all__ = ["FLOAT8", "ORDERS", "ROWS", "Factor", "Layout", "Stored", "describe", "layout_from_text"]

ROWS = 32  # output rows of a block
ORDERS = ("", "rows", "words", "across", "fields")
"""Blocks of 32 rows, and the orders of csrc/stored.h, in which weights lie as files have them."""
_STEP = 16  # columns that every loop of the C kernels takes at once
_FLOATS = ("bfloat16", "float16", "float32")
_WIDE = ("bf16", "f16", "f32")
_FEATURES = ("bias", "gather")  # and what says more of them: "bias:float16", "tied:embedding"
ZERO_FOLDED, ZERO_CONST, ZERO_CODE, ZERO_OFFSET, ZERO_FLOAT = range(5)
FLOAT8 = {
    "fp8_e4m3": (4, 7),
    "fp8_e5m2": (5, 15),
    "fp8_e4m3_fnuz": (4, 8),
    "fp8_e5m2_fnuz": (5, 16),
    "fp6_e2m3": (2, 1),
    "fp6_e3m2": (3, 3),
}
"""Bits of the exponent, and what it is stored more by. A float of 6 bits is kept as one of 8 bits
whose last bits of fraction are zero."""
_MOST_RESOLVED = 1 / 8  # bytes of float32 factors made while loading, to those of the codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One factor of a scale: ``group`` columns share a value; ``single``: the whole matrix, and
    ``inverse`` if its value divides."""

    element: str
    group: int
    single: bool = False
    inverse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor of scales as it is stored: ``rows`` x ``columns`` share a value, 0 = all."""

    element: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that the buffers' shapes and the C kernels depend on."""

    op: str
    n: int
    k: int  # stored columns
    k_in: int  # input features
    experts: int
    element: str
    kind: str  # of the element
    bits: int
    width: int  # bits a code takes in the blocks: 4 or 8
    bias: int
    shift: int
    zero: int
    zero_element: str  # of float zero points
    scales: tuple[Factor, ...]
    stored: tuple[Stored, ...]  # what ``scales`` were made of; () = they are what is stored
    offsets: tuple[Factor, ...]
    gather: bool
    bias_dtype: str  # "" = no bias
    act_dtype: str
    order: str = ""  # of ORDERS
    block: int = 0  # bytes of a block of fields
    at: int = 0  # of codes in it
    head: int = 0  # rows of a head whose halves are stored interleaved

    @property
    def blocks(self) -> int:
        return -(-self.n // ROWS)

    @property
    def codebooks(self) -> tuple[int, ...]:
        """Entries of the tables that the layer brings."""
        own = (1 << self.bits,) if self.kind == "lut" else ()
        return own + (256,) * any(s.element == "lut8" for s in self.stored)

    @property
    def up(self) -> int:
        """Zero bits below a code in its byte."""
        return 8 - self.bits if self.kind == "float" and self.width == 8 else 0

    @property
    def per(self) -> int:
        """Codes of one row in 32 bits."""
        return 32 // self.width

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes that one matrix takes."""
        return self.blocks * ROWS * self.k * self.width // 8

    def text(self) -> str:
        """Compact JSON in single quotes, which Inductor's C++ code needs as it escapes none; the
        argument of the torch ops. Inverse of ``layout_from_text``."""
        return _text(self)


@functools.lru_cache(maxsize=4096)
def _text(layout: Layout) -> str:
    return json.dumps(asdict(layout), separators=(",", ":")).replace('"', "'")


@functools.lru_cache(maxsize=4096)
def layout_from_text(text: str) -> Layout:
    """The ``Layout`` of a text, cached: called by the torch ops on every call."""
    fields = json.loads(text.replace("'", '"'))
    for name in ("scales", "offsets"):
        fields[name] = tuple(Factor(**f) for f in fields[name])
    fields["stored"] = tuple(Stored(**f) for f in fields["stored"])
    return Layout(**fields)


def _factor_problem(s: Scale, k: int, *, last: bool) -> Rejected | None:
    """``last``: a coarser factor that only multiplies the one before it."""
    if s.inverse and not (last and s.grain == TENSOR):
        return Rejected(axis="scales", have="a stored divisor", need="a multiplier")
    if not s.static:
        return Rejected(axis="scales", have="a run-time scale", need="a stored scale")
    if s.add or s.element == "lut8":
        have = "a scale that is added" if s.add else "scales that are codes of a table"
        return Rejected(axis="scales", have=have, need="factors stored as numbers")
    r, c = s.grain
    if s.grain == TENSOR:
        if s.element != "f32":
            return Rejected(axis="scales", have=f"per tensor {s.element}", need="per tensor f32")
        return None
    if r != 1:
        return Rejected(axis="scales", have=f"grain {s.grain}", need="one row per value")
    if c % _STEP and c < k:
        return Rejected(axis="group", have=str(c), need=f"a multiple of {_STEP}")
    return None


def _factor(s: Scale, k: int) -> Factor:
    group = s.grain[1] if 0 < s.grain[1] < k else k
    single = s.grain == TENSOR
    return Factor(element=s.element, group=group, single=single, inverse=s.inverse)


def _scale_problem(scales: tuple[Scale, ...], k: int, what: str) -> Rejected | None:
    if not 1 <= len(scales) <= 2:
        return Rejected(axis=what, have=f"{len(scales)} factors", need="one or two factors")
    for i, s in enumerate(scales):
        if problem := _factor_problem(s, k, last=i == 1 and what == "scales"):
            return problem
    fine, coarse = _factor(scales[0], k).group, _factor(scales[-1], k).group
    if coarse % fine and coarse != k:
        return Rejected(axis=what, have=f"groups {fine} and {coarse}", need="nested groups")
    return None


def _resolved(spec: QuantSpec, k: int, width: int) -> Factor | Rejected:
    """The factor that stands for all scales of ``spec``, if it is worth its memory."""
    scales = spec.scales
    if any(not s.static for s in scales):
        return Rejected(axis="scales", have="a run-time scale", need="stored scales")
    if len(scales) == 1 and scales[0].inverse:
        return Rejected(axis="scales", have="a stored divisor", need="a multiplier")
    if spec.zero is not None and spec.zero.kind != "const":
        return Rejected(axis="scales", have=spec.label, need="scales on the grid of the zeros")
    columns = [s.grain[1] if 0 < s.grain[1] < k else k for s in scales]
    group = min(columns, default=k)
    if any(c % group and c != k for c in columns) or (group % _STEP and group != k):
        return Rejected(axis="scales", have=f"groups {columns}", need="nested groups")
    if not scales or _MOST_RESOLVED * group * width < 32:
        need = "factors stored as numbers, one row each, or groups of more codes"
        return Rejected(axis="scales", have=spec.label, need=need)
    return Factor(element="f32", group=group)


def _element_problem(spec: QuantSpec) -> Rejected | None:
    e = spec.element
    if spec.blocks:
        return Rejected(axis="blocks", have=spec.blocks, need="codes with scales")
    plain = (e.kind == "uint" and 2 <= e.bits <= 8) or (e.kind, e.bits) == ("int", 8)
    plain = plain or (e.kind == "float" and e.name in FLOAT8)
    by_table = e.name == "fp4_e2m1" or (e.kind in ("int", "lut") and 2 <= e.bits <= 4)
    if not plain and not by_table:
        need = "uint2 to uint8, int2 to int8, floats of 4 to 8 bits, or a table of 16"
        return Rejected(axis="element", have=e.name, need=need)
    return None


def _zero(spec: QuantSpec) -> tuple[int, int, int]:
    """(kind, bias, shift) of the module's table."""
    e, zero = spec.element, spec.zero
    unsigned = e.kind == "uint"
    if zero is None or zero.kind == "const":
        value = 0 if zero is None else zero.value
        if e.kind in ("float", "lut"):
            return ZERO_FOLDED, 0, 0
        if not unsigned and e.bits == 8:
            return (ZERO_CONST if value else ZERO_FOLDED), 0, value
        if e.bits < 8:
            return ZERO_FOLDED, value, 0
        return (ZERO_FOLDED if value == 128 else ZERO_CONST), 128, value - 128
    half = 1 << (e.bits - 1) if unsigned else 0
    if zero.kind == "code" and zero.element not in _WIDE:
        return ZERO_CODE, half, 0
    kind = ZERO_FLOAT if zero.kind == "code" else ZERO_OFFSET
    return kind, (half if e.bits == 8 else 0), 0


def _zero_problem(spec: QuantSpec, k: int) -> Rejected | None:
    e, zero = spec.element, spec.zero
    if zero is None:
        return None
    if zero.kind == "const":
        room = 1 << (e.bits - 1) if 4 < e.bits < 8 else 128
        room = 0 if e.kind in ("float", "lut") else room
        if not 0 <= zero.value <= room:
            return Rejected(axis="zero", have=str(zero.value), need=f"0 to {room}")
        return None
    if e.kind != "uint" and (e.kind, e.bits) != ("int", 8):
        return Rejected(axis="zero", have=f"{zero.kind} of {e.name}", need="an integer element")
    if zero.kind == "code":
        if not zero.element.startswith("uint") and zero.element not in _WIDE:
            return Rejected(axis="zero", have=zero.element, need="unsigned codes or floats")
        if spec.scales[0].grain == TENSOR:
            return Rejected(axis="zero", have="one zero per tensor", need="one per row or group")
        return None
    if problem := _scale_problem(zero.levels, k, "offset"):
        return problem
    if _factor(zero.levels[0], k).group != _factor(spec.scales[0], k).group:
        return Rejected(axis="offset", have="a grid of its own", need="the grid of the scale")
    return None


@functools.lru_cache(maxsize=4096)
def describe(op: OpSpec, *, ops: tuple[str, ...]) -> Layout | Rejected:
    """What the kernels need to know of ``op``, or the first reason why they cannot run it.

    Args:
        ops: operations on offer.
    """
    if op.op not in ops:
        return Rejected(axis="op", have=op.op, need=" or ".join(ops))
    if op.device[0] != "cpu":
        return Rejected(axis="device", have=op.device[0], need="cpu")
    roles = sorted({role for role, _ in op.operands})
    if roles != ["weight"]:
        return Rejected(axis="operands", have=", ".join(roles), need="weight only")
    spec = op.weight
    n, k_in = op.size("n"), op.size("k")
    k = op.size("k_stored", k_in)
    if problem := _element_problem(spec):
        return problem
    width = 4 if spec.element.bits <= 4 else 8
    scales, stored = tuple(_factor(s, k) for s in spec.scales), ()
    problem = _scale_problem(spec.scales, k, "scales")
    if problem is not None:
        resolved = problem if problem.axis == "group" else _resolved(spec, k, width)
        if isinstance(resolved, Rejected):
            return resolved
        scales = (resolved,)
        stored = tuple(
            Stored(element=s.element, rows=s.grain[0], columns=s.grain[1]) for s in spec.scales
        )
    if problem := _zero_problem(spec, k):
        return problem
    if k % _STEP or k == 0:
        return Rejected(axis="in_features", have=str(k), need=f"a multiple of {_STEP}")
    if n == 0:
        return Rejected(axis="out_features", have="0", need="at least one row")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if spec.gather and op.op == "embedding":
        return Rejected(axis="gather", have="reordered columns", need="columns in order")
    known = (*_FEATURES, "tied")
    if extra := sorted(f for f in op.features if f.partition(":")[0] not in known):
        return Rejected(axis="features", have=", ".join(extra), need=" or ".join(_FEATURES))
    if op.act_dtype not in _FLOATS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
    bias = next((f.partition(":")[2] for f in op.features if f.startswith("bias:")), "float32")
    if "bias" in op.features and bias not in _FLOATS:
        return Rejected(axis="bias", have=bias, need=" or ".join(_FLOATS))
    kind, code_bias, shift = _zero(spec)
    levels = spec.zero.levels if spec.zero is not None else ()
    return Layout(
        op=op.op,
        n=n,
        k=k,
        k_in=k_in,
        experts=op.size("experts", 0),
        element=spec.element.name,
        kind=spec.element.kind,
        bits=spec.element.bits,
        width=width,
        bias=code_bias,
        shift=shift,
        zero=kind,
        zero_element=spec.zero.element if kind == ZERO_FLOAT and spec.zero is not None else "",
        scales=scales,
        stored=stored,
        offsets=tuple(_factor(s, k) for s in levels),
        gather=spec.gather,
        bias_dtype=bias if "bias" in op.features else "",
        act_dtype=op.act_dtype,
    )
