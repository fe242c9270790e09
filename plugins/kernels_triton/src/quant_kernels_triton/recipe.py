"""Which operations the kernels on "tiles16" run, as plain data; nothing here imports torch.

``describe`` turns an ``OpSpec`` into a ``Recipe``, or says why not. A recipe travels as text: the
argument of the torch ops, and the key under which compiled kernels are kept.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, OpSpec, QuantSpec, Scale
from quant_core.spec_json import to_text

__all__ = ["ABSENT", "ELEMENTS", "FLOATS", "Factor", "Recipe", "describe", "recipe_from_text"]

ELEMENTS = {"f32": 0, "bf16": 1, "f16": 2, "e8m0": 3, "fp8_e4m3": 4, "uint": 5, "int": 6}
"""How a stored scale is read; the numbers are constants of the kernels."""

FLOATS = {  # name: (exponent bits, mantissa bits)
    "fp4_e2m1": (2, 1),
    "fp6_e2m3": (2, 3),
    "fp6_e3m2": (3, 2),
    "fp8_e4m3": (4, 3),
    "fp8_e5m2": (5, 2),
}
TENSOR, CHANNEL, GROUP, BLOCK = range(4)
ABSENT = 7  # the constant of a factor that is not there
ZERO_CONST, ZERO_CODE, ZERO_OFFSET = range(3)
_ACTS = ("bfloat16", "float16", "float32")
_FEATURES = ("bias", "gather", "tied")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One factor: its grain kind, how a value is read, rows and columns that share one."""

    kind: int
    element: int
    rows: int
    cols: int
    inverse: bool = False

    def constant(self) -> int:
        """All of it in one number, which is how a kernel takes it: kind in bits 0-2, element 3-5,
        inverse 6, rows / 16 from 8 on, columns / 16 from 20 on."""
        head = self.kind | self.element << 3 | int(self.inverse) << 6
        return head | self.rows // 16 << 8 | self.cols // 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """All that the kernels depend on. Equal to itself only, so that it is a cheap key: one text
    gives one object (``recipe_from_text``)."""

    op: str
    n: int
    k: int  # stored columns
    k_in: int  # input features
    experts: int
    element: str
    bits: int  # of a code as it is kept: 2, 3, 4 or 8
    zero: int
    zero_value: int
    zero_bits: int  # of a zero code
    scales: tuple[Factor, ...]
    offsets: tuple[Factor, ...]
    gather: bool
    bias: bool
    act_dtype: str
    input: str  # how activations are rounded, as text; "" = not
    buffers: tuple[str, ...]  # names, in the order of ``tiles.allocate``

    @property
    def groups(self) -> int:
        """Groups of 128 columns."""
        return -(-self.k // 128)

    @property
    def rows(self) -> int:
        """Output rows as they are stored: n rounded up to 64."""
        return self.n + -self.n % 64

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes of one matrix."""
        return self.rows * self.groups * 128 * self.bits // 8

    def text(self) -> str:
        """Compact JSON. Inverse of ``recipe_from_text``."""
        return json.dumps(asdict(self), separators=(",", ":"))


@functools.cache
def recipe_from_text(text: str) -> Recipe:
    """The ``Recipe`` of a text, cached: called by the torch ops on every call."""
    fields = json.loads(text)
    for name in ("scales", "offsets"):
        fields[name] = tuple(Factor(**f) for f in fields[name])
    fields["buffers"] = tuple(fields["buffers"])
    return Recipe(**fields)


def _read_as(element: str) -> int | None:
    if element in ELEMENTS:
        return ELEMENTS[element]
    name = element.rstrip("0123456789")
    return ELEMENTS[name] if name in ("uint", "int") and element != name else None


def _factor(s: Scale, k: int, name: str) -> Factor | Rejected:
    read = _read_as(s.element)
    if read is None:
        need = "f32, bf16, f16, e8m0, fp8_e4m3 or integers"
        return Rejected(axis=name, have=s.element, need=need)
    if read == ELEMENTS["int"] and s.element != "int8":
        return Rejected(axis=name, have=s.element, need="int8 or unsigned integers")
    if s.add:
        return Rejected(axis=name, have="a summand", need="factors that multiply")
    if not s.static:
        return Rejected(axis=name, have="a run-time scale", need="a stored scale")
    r, c = s.grain
    if r == 0 and c == 0:
        kind = TENSOR
    elif r == 1:
        kind = CHANNEL if c == 0 or c >= k else GROUP
    else:
        kind = BLOCK
    if kind == GROUP and c not in (16, 32, 64) and c % 128:
        return Rejected(axis=name, have=f"group {c}", need="16, 32, 64 or a multiple of 128")
    if kind == BLOCK and (r % 16 or c % 128):
        need = "rows a multiple of 16 and columns of 128"
        return Rejected(axis=name, have=f"blocks {s.grain}", need=need)
    return Factor(kind=kind, element=read, rows=r, cols=c, inverse=s.inverse)


def _factors(levels: tuple[Scale, ...], k: int, name: str) -> tuple[Factor, ...] | Rejected:
    out = []
    for i, s in enumerate(levels):
        factor = _factor(s, k, f"{name}_{i}")
        if isinstance(factor, Rejected):
            return factor
        out.append(factor)
    return tuple(out)


def _element_problem(spec: QuantSpec) -> Rejected | None:
    e = spec.element
    if spec.blocks:
        return Rejected(axis="blocks", have=spec.blocks, need="codes with scales")
    integer = (e.kind == "uint" and 2 <= e.bits <= 8) or (e.kind, e.bits) == ("int", 8)
    table = e.kind == "lut" and 2 <= e.bits <= 4
    if not integer and not table and e.name not in FLOATS:
        need = f"uint2 to uint8, int8, a table of up to 4 bits, {', '.join(FLOATS)}"
        return Rejected(axis="element", have=e.name, need=need)
    zero = spec.zero
    if zero is not None and zero.kind == "code" and not zero.element.startswith("uint"):
        return Rejected(axis="zero", have=f"{zero.element} codes", need="unsigned zero codes")
    if zero is not None and zero.kind == "const" and not 0 <= zero.value <= 255:
        return Rejected(axis="zero", have=str(zero.value), need="0 to 255")
    return None


def _buffer_names(op: OpSpec, offsets: int, bits: int) -> tuple[str, ...]:
    spec = op.weight
    out = ["codes", *(["codes_high"] if bits == 3 else [])]
    out += [f"scales_{i}" for i in range(len(spec.scales))]
    out += ["zeros"] if spec.zero is not None and spec.zero.kind == "code" else []
    out += [f"offset_{i}" for i in range(offsets)]
    out += ["gather"] if spec.gather else []
    out += ["codebook_0"] if spec.element.kind == "lut" else []
    return (*out, *(["bias"] if "bias" in op.features else []))


def describe(op: OpSpec, *, ops: tuple[str, ...]) -> Recipe | Rejected:
    """What the kernels need to know of ``op``, or the first reason why they cannot run it."""
    if op.op not in ops:
        return Rejected(axis="op", have=op.op, need=" or ".join(ops))
    roles = sorted({role for role, _ in op.operands})
    allowed = ["weight"] if op.op == "embedding" else ["input", "weight"]
    if not set(roles) <= set(allowed) or "weight" not in roles:
        return Rejected(axis="operands", have=", ".join(roles), need=" and ".join(allowed))
    spec, acts = op.weight, op.operand("input")
    if acts is not None and any(s.static for s in acts.scales):
        return Rejected(axis="input", have="a stored scale", need="scales computed at run time")
    if problem := _element_problem(spec):
        return problem
    n, k_in = op.size("n"), op.size("k")
    k = op.size("k_stored", k_in)
    if k % 32 or not k:
        return Rejected(axis="in_features", have=str(k), need="a multiple of 32")
    if not n:
        return Rejected(axis="out_features", have="0", need="at least one row")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if op.act_dtype not in _ACTS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_ACTS))
    if extra := sorted(f for f in op.features if f.partition(":")[0] not in _FEATURES):
        return Rejected(axis="features", have=", ".join(extra), need=" or ".join(_FEATURES))
    if spec.gather and op.op == "embedding":
        return Rejected(axis="gather", have="reordered columns", need="columns in order")
    zero = spec.zero
    levels = zero.levels if zero is not None and zero.kind == "offset" else ()
    scales = _factors(spec.scales, k, "scales")
    if isinstance(scales, Rejected):
        return scales
    offsets = _factors(levels, k, "offset")
    if isinstance(offsets, Rejected):
        return offsets
    if not 1 <= len(scales) <= 3 or len(offsets) > 2:
        have = f"{len(scales)} factors and {len(offsets)} of the offset"
        return Rejected(axis="scales", have=have, need="1 to 3 factors, up to 2 of the offset")
    kinds = {None: ZERO_CONST, "const": ZERO_CONST, "code": ZERO_CODE, "offset": ZERO_OFFSET}
    bits = spec.element.bits if spec.element.bits in (2, 3, 4) else 8
    return Recipe(
        op=op.op,
        n=n,
        k=k,
        k_in=k_in,
        experts=op.size("experts", 0),
        element="lut" if spec.element.kind == "lut" else spec.element.name,
        bits=bits,
        zero=kinds[None if zero is None else zero.kind],
        zero_value=zero.value if zero is not None and zero.kind == "const" else 0,
        zero_bits=int(zero.element[4:]) if zero is not None and zero.kind == "code" else 0,
        scales=scales,
        offsets=offsets,
        gather=spec.gather,
        bias="bias" in op.features,
        act_dtype=op.act_dtype,
        input="" if acts is None else to_text(acts),
        buffers=_buffer_names(op, len(offsets), bits),
    )
