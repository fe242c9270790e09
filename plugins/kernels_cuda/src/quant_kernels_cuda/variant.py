"""Which operations the decode kernel runs, and the compile-time constants of each.

``describe`` turns an ``OpSpec`` into a ``Variant`` or says why not. Where a factor goes:

    one value per matrix or row     onto the output (a divisor divides), if nothing is added to it
    groups of 16 to 128 columns     through the ring, onto the sums of the group
    the same, e2m1 or e4m3 codes    into the weight, where scale times code fits the wider type
    groups of 256, 512, ...         through the ring, one value for several groups
    blocks of r x c (r of 16, c of 128)  read beside the ring

Zero points that are integers are subtracted from the codes; other ones and offsets are multiplied
with the sum of x of their columns.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from quant_core.kernels.base import Rejected
from quant_core.spec import OpSpec, QuantSpec, Scale

__all__ = ["TYPES", "Grid", "Variant", "describe", "variant_from_text"]

TYPES = {"f32": 1, "f16": 2, "bf16": 3, "int8": 5, "fp8_e4m3": 6, "e8m0": 7}
_SIZES = {1: 4, 2: 2, 3: 2}
_FINE, _COARSE, _ROW, _BLOCK = 1, 2, 3, 4
BIAS_TYPES = {"float32": 1, "float16": 2, "bfloat16": 3}
_ONE = {"fp4_e2m1": "0x7E807E80u", "fp8_e4m3": "0x7B807B80u"}  # 2^126, 2^120: what bf16 codes lack


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One factor, zero or offset: its buffer, type, grain as csrc/factors.cuh names it."""

    buffer: str
    type: int
    grain: int
    subs: int = 1  # values per 128 columns
    single: bool = False  # one value for the matrix (outputs only)
    inverse: bool = False  # outputs only

    def stage_bytes(self, groups: int) -> int:
        """Bytes in one stage of the ring that holds ``groups`` groups of 128."""
        size = _SIZES.get(self.type, 1)
        per = {_FINE: groups * self.subs, _COARSE: groups, _ROW: 1}.get(self.grain, 0)
        return 16 * per * size


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """All that the compiled code and the launch depend on, but the number of rows."""

    op: str
    n: int
    k: int  # stored columns
    k_in: int  # input features
    experts: int
    bits: int  # stored bits: 2, 3, 4 or 8
    act: str
    defines: tuple[tuple[str, str], ...]
    ring: tuple[tuple[str, Grid], ...]  # of S0 S1 Z O0 O1
    rows: tuple[Grid, ...]
    parts: int  # scales on the sums per 128 columns
    xsums: bool
    coarse: int  # columns per value of a coarse factor
    block: tuple[int, int]
    bias: str
    gather: bool

    @property
    def groups(self) -> int:
        return -(-self.k // 128)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes and group factors that one matrix takes."""
        np_ = self.n + -self.n % 64
        factors = sum(g.stage_bytes(1) for _, g in self.ring if g.grain in (_FINE, _COARSE))
        return np_ // 16 * self.groups * (256 * self.bits + factors)

    def stage_bytes(self, groups: int) -> int:
        """Bytes of one warp's stage of the ring: ``STAGE`` of csrc/decode.cu."""
        planes = {2: 512, 3: 768, 4: 1024, 8: 2048}[self.bits] * groups
        return planes + sum(g.stage_bytes(groups) for _, g in self.ring)

    def text(self) -> str:
        """Compact JSON; the argument of the torch ops. Inverse of ``variant_from_text``."""
        return json.dumps(asdict(self), separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def variant_from_text(text: str) -> Variant:
    """The ``Variant`` of a text."""
    f = json.loads(text)
    f["ring"] = tuple((name, Grid(**g)) for name, g in f["ring"])
    f["rows"] = tuple(Grid(**g) for g in f["rows"])
    f["defines"] = tuple((a, b) for a, b in f["defines"])
    f["block"] = tuple(f["block"])
    return Variant(**f)


def _type(element: str) -> int | None:
    if element.startswith("uint") and 1 <= int(element[4:]) <= 8:
        return 4
    return TYPES.get(element)


def _grid(buffer: str, s: Scale, k: int) -> Grid | Rejected:
    """A factor as the kernel reads it."""
    from quant_core.kernels.tiles import grain_kind

    kind = _type(s.element)
    if kind is None:
        return Rejected(axis=buffer, have=s.element, need=" or ".join(("uint", *TYPES)))
    if s.add:
        return Rejected(axis=buffer, have="a summand", need="a factor")
    r, c = s.grain
    where = grain_kind(s.grain, k)
    if where == "tensor":
        return Grid(buffer=buffer, type=kind, grain=_ROW, single=True, inverse=s.inverse)
    if where == "channel":
        return Grid(buffer=buffer, type=kind, grain=_ROW, inverse=s.inverse)
    if s.inverse:
        return Rejected(axis=buffer, have="a divisor per group", need="a multiplier")
    if where == "block":
        if r % 16 or not r or c % 128 or not c:
            return Rejected(axis=buffer, have=f"blocks {s.grain}", need="multiples of (16, 128)")
        return Grid(buffer=buffer, type=kind, grain=_BLOCK)
    if c <= 128:
        return Grid(buffer=buffer, type=kind, grain=_FINE, subs=128 // c)
    if c & (c - 1):
        return Rejected(axis=buffer, have=f"group {c}", need="a power of two")
    return Grid(buffer=buffer, type=kind, grain=_COARSE)


def _grids(prefix: str, scales: tuple[Scale, ...], k: int) -> list[Grid] | Rejected:
    out = []
    for i, s in enumerate(scales):
        g = _grid(f"{prefix}_{i}", s, k)
        if isinstance(g, Rejected):
            return g
        out.append(g)
    return out


def _codes(spec: QuantSpec) -> dict[str, object] | Rejected:
    """How codes become numbers: flips, and the constant zero in unsigned terms."""
    e, zero = spec.element, spec.zero
    if e.kind == "float":
        if e.name not in _ONE:
            return Rejected(axis="element", have=e.name, need=" or ".join(_ONE) + " or integers")
        if zero is not None:
            return Rejected(axis="zero", have=f"{zero.kind} of {e.name}", need="no zero")
        return {"FLOAT_CODES": 1, "SIGNED_FLIP": 0, "ZERO": 0}
    if e.kind not in ("uint", "int"):
        return Rejected(axis="element", have=e.name, need="integers, fp4_e2m1 or fp8_e4m3")
    signed = e.kind == "int"
    value = zero.value if zero is not None and zero.kind == "const" else 0
    if signed and zero is not None and zero.kind == "code":
        return Rejected(axis="zero", have=f"codes of {e.name}", need="unsigned codes")
    flip = 1 << (e.bits - 1) if signed else 0
    value += flip
    highest = 255 if e.bits == 8 else 127
    if not 0 <= value <= highest:
        return Rejected(axis="zero", have=str(value - flip), need=f"{-flip} to {highest - flip}")
    return {"FLOAT_CODES": 0, "SIGNED_FLIP": flip, "ZERO": value}


def _zero_grid(spec: QuantSpec, k: int) -> Grid | Rejected | None:
    zero = spec.zero
    if zero is None or zero.kind != "code":
        return None
    fine = spec.scales[0]
    g = _grid("zeros", Scale(element=zero.element, grain=fine.grain), k)
    if isinstance(g, Rejected):
        return g
    if g.type not in (1, 2, 3, 4):
        return Rejected(axis="zeros", have=zero.element, need="unsigned codes or floats")
    if g.single or g.grain == _BLOCK:
        return Rejected(axis="zeros", have=f"grain {fine.grain}", need="one per row or group")
    if g.type == 4 and spec.element.bits < 8 and int(zero.element[4:]) > 7:
        return Rejected(axis="zeros", have=zero.element, need="at most 7 bits")
    return g


def _in_weight(spec: QuantSpec, ring: list[Grid], f16: bool) -> bool:
    """Whether code times finest scale is exact in the type of the activations."""
    if spec.element.kind != "float" or len(ring) != 1 or ring[0].grain != _FINE:
        return False
    if ring[0].type == TYPES["e8m0"]:
        return not f16
    return ring[0].type == TYPES["fp8_e4m3"] and spec.element.name == "fp4_e2m1"


def _float_constants(spec: QuantSpec, in_weight: bool, f16: bool) -> dict[str, object]:
    """Powers of two of csrc/dequant.cuh: in the weight, and what is left for the output."""
    e2m1 = spec.element.name == "fp4_e2m1"
    if in_weight:
        out = 8 if f16 else 48
        exponent = 0 if f16 else (78 if e2m1 else 72)
        return {"WEIGHT_MUL": 1, "WEIGHT_EXP": exponent, "WEIGHT_CONST": 0, "OUT_EXP": out}
    if f16:
        left = 14 if e2m1 else 8
        return {"WEIGHT_MUL": 0, "WEIGHT_EXP": 0, "WEIGHT_CONST": 0, "OUT_EXP": left}
    constant = _ONE[spec.element.name]
    return {"WEIGHT_MUL": 1, "WEIGHT_EXP": 0, "WEIGHT_CONST": constant, "OUT_EXP": 0}


def _places(
    spec: QuantSpec, k: int
) -> tuple[list[Grid], list[Grid], Grid | None, list[Grid]] | Rejected:
    """(factors through the ring, factors of the output, zeros, offsets), or why not."""
    scales = _grids("scales", spec.scales, k)
    zeros = _zero_grid(spec, k)
    levels = spec.zero.levels if spec.zero is not None else ()
    offsets = _grids("offset", levels, k)
    for answer in (scales, zeros, offsets):
        if isinstance(answer, Rejected):
            return answer
    assert isinstance(scales, list)
    assert isinstance(offsets, list)
    added = bool(offsets) or (zeros is not None and zeros.type != 4)
    ring, rows = [], []
    for g in scales:
        (rows if g.grain == _ROW and (g.single or not added) else ring).append(g)
    if added and (rows or any(g.inverse for g in ring)):
        return Rejected(axis="scales", have="one per matrix, or a divisor, beside an offset",
                        need="multipliers per row or group")  # fmt: skip
    if any(g.single or g.inverse for g in offsets):
        return Rejected(axis="offset", have="one per matrix, or a divisor", need="multipliers")
    blocks = [g for g in ring + offsets if g.grain == _BLOCK]
    if blocks and (len(ring) > 1 or added):
        return Rejected(axis="scales", have="blocks beside other groups", need="blocks alone")
    if len(ring) > 2 or len(rows) > 3 or len(offsets) > 2:
        return Rejected(axis="scales", have=f"{len(scales)} factors", need="at most two of groups")
    return ring, rows, None if isinstance(zeros, Rejected) else zeros, offsets


def describe(
    op: OpSpec, *, ops: tuple[str, ...] = ("linear", "grouped_linear")
) -> Variant | Rejected:
    """What the decode kernel needs to know of ``op``, or the first reason why it cannot run it."""
    from quant_core.kernels import tiles

    if op.op not in ops:
        return Rejected(axis="op", have=op.op, need=" or ".join(ops))
    roles = sorted({role for role, _ in op.operands})
    if roles != ["weight"]:
        return Rejected(axis="operands", have=", ".join(roles), need="weight only")
    if problem := tiles.problem(op):
        return problem
    spec, k_in = op.weight, op.size("k")
    n, k = op.size("n"), op.size("k_stored", k_in)
    if k != k_in and not spec.gather:
        return Rejected(axis="in_features", have=f"{k} stored of {k_in}", need="a gather")
    if op.act_dtype not in ("bfloat16", "float16"):
        return Rejected(axis="act_dtype", have=op.act_dtype, need="bfloat16 or float16")
    f16 = op.act_dtype == "float16"
    bits = tiles.stored_bits(spec.element.bits)
    codes = _codes(spec)
    places = _places(spec, k)
    for answer in (codes, places):
        if isinstance(answer, Rejected):
            return answer
    assert isinstance(codes, dict)
    assert isinstance(places, tuple)
    ring, rows, zeros, offsets = places
    in_weight = _in_weight(spec, ring, f16)
    xsums = bool(offsets) or (zeros is not None and zeros.type != 4)
    on_sums = [g.subs for g in ([] if in_weight else ring) + offsets]
    on_sums += [zeros.subs] if zeros is not None and xsums else []
    parts = max(on_sums, default=0)
    named = dict(zip(("S0", "S1"), ring)) | dict(zip(("O0", "O1"), offsets))
    if zeros is not None:
        named["Z"] = zeros
    defines: dict[str, object] = {"F16": int(f16), "CODE_BITS": min(spec.element.bits, 8), **codes}
    if bits == 8 and spec.element.bits < 8:
        defines["CODE_BITS"] = 7
    for name in ("S0", "S1", "Z", "O0", "O1"):
        g = named.get(name)
        defines |= {f"{name}_TYPE": g.type if g else 0, f"{name}_GRAIN": g.grain if g else 0,
                    f"{name}_SUBS": g.subs if g else 1}  # fmt: skip
    # codes are decoded as multiples of 2^-LOW (csrc/dequant.cuh)
    floats = {"WEIGHT_MUL": 0, "WEIGHT_EXP": 0, "WEIGHT_CONST": 0, "OUT_EXP": 12 if f16 else 8}
    if spec.element.kind == "float":
        floats = _float_constants(spec, in_weight, f16)  # type: ignore[assignment]
    defines |= {"IN_WEIGHT": int(in_weight), "FLUSH": parts, **floats}
    coarse = {
        s.grain[1]
        for s in (*spec.scales, *(spec.zero.levels if spec.zero is not None else ()))
        if s.grain[0] == 1 and 128 < s.grain[1] < k
    }
    if len(coarse) > 1:
        return Rejected(axis="scales", have=f"groups {sorted(coarse)}", need="one size above 128")
    block = next((s.grain for s in spec.scales if s.grain[0] > 1), (0, 0))
    bias = next((f.partition(":")[2] for f in op.features if f.startswith("bias:")), "float32")
    if "bias" in op.features and bias not in BIAS_TYPES:
        return Rejected(axis="bias", have=bias, need=" or ".join(BIAS_TYPES))
    return Variant(
        op=op.op,
        n=n,
        k=k,
        k_in=k_in,
        experts=op.size("experts", 0),
        bits=bits,
        act=op.act_dtype,
        defines=tuple(sorted((name, str(v)) for name, v in defines.items())),
        ring=tuple(named.items()),
        rows=tuple(rows),
        parts=parts,
        xsums=xsums,
        coarse=coarse.pop() if coarse else 128,
        block=block,
        bias=bias if "bias" in op.features else "",
        gather=spec.gather,
    )
