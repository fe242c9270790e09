"""Which operations the mixed kernels run, with which block sizes and costs; plain data, no torch.

Weights in the order "tiles16" by activations of 8 bits, multiplied as 8-bit numbers:

    weights            activations, a scale per token or a stored one
    uint4 around 8     fp8_e4m3, int8
    fp4_e2m1           fp8_e4m3
    fp8_e4m3           fp8_e4m3
    int8               int8

Weights have scales by 32, 64 or a multiple of 128 columns, by row or of the matrix.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace

from quant_core.kernels.base import ANY_ROWS, Rejected
from quant_core.spec import CHANNEL, TENSOR, OpSpec, QuantSpec
from quant_kernels_triton.recipe import (
    ABSENT,
    ELEMENTS,
    GROUP,
    ZERO_CONST,
    Factor,
    Recipe,
    describe,
    recipe_from_text,
)
from quant_kernels_triton.scaled_plan import codes_us

__all__ = [
    "SMS",
    "MixedPair",
    "MixedPlan",
    "MixedRing",
    "MixedWide",
    "config",
    "costs",
    "describe_mixed",
    "from_text",
]

_SHARED = 227 << 10  # bytes of shared memory
SMS = 132  # multiprocessors of an H100: only block counts depend on it
MOST_K = 32768  # a token is held in registers while it is quantized
_PEAKS = {"fp8_e4m3": 448.0, "int8": 127.0}
_WIDE = ("f32", "bf16", "f16")
_FLOATS = tuple(ELEMENTS[e] for e in _WIDE)
_READ = (*_FLOATS, ELEMENTS["e8m0"], ELEMENTS["uint"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedPlan:
    """All that the kernels depend on; equal to itself only (one text gives one object)."""

    kind: str  # of weights: "int4", "fp4", "fp8", "int8"
    integer: bool  # whether codes are multiplied as integers, else as fp8
    recipe: Recipe
    sub: int  # pieces of 128 columns that have scales of their own
    factors: tuple[int, int]  # by group
    rows: tuple[int, int]  # of a row or of the matrix
    names: tuple[str, str, str, str]  # the buffers of all four, "" = none
    static: bool  # a stored activation scale
    peak: float
    least: float
    most: float

    @property
    def whole(self) -> bool:
        """Whether sums of integers run over all columns."""
        return self.integer and self.factors[0] == ABSENT

    @property
    def bytes(self) -> bool:
        """Whether a weight takes a byte."""
        return self.kind in ("fp8", "int8")

    @property
    def operand(self) -> str:
        """Which of ``mixed_asm.ASM`` makes operands of codes."""
        if self.bytes:
            return "bytes"
        return self.kind if self.kind == "fp4" else "int8" if self.integer else "fp8"

    def text(self) -> str:
        """Compact JSON. Inverse of ``from_text``."""
        fields = asdict(replace(self, recipe=None))  # type: ignore[arg-type]
        return json.dumps(fields | {"recipe": self.recipe.text()}, separators=(",", ":"))


@functools.cache
def from_text(text: str) -> MixedPlan:
    """The plan of a text."""
    fields = json.loads(text)
    for name in ("factors", "rows", "names"):
        fields[name] = tuple(fields[name])
    return MixedPlan(**fields | {"recipe": recipe_from_text(fields["recipe"])})


def _input_problem(op: OpSpec, acts: QuantSpec) -> Rejected | None:
    if acts.element.name not in _PEAKS or acts.ties != "even":
        return Rejected(axis="input", have=acts.label, need="fp8_e4m3 or int8, ties to even")
    if len(acts.scales) != 1 or acts.zero is not None or acts.gather or acts.blocks:
        return Rejected(axis="input", have=acts.label, need="one scale and no zero")
    s = acts.scales[0]
    if s.inverse or s.add or s.rule or s.element not in _WIDE:
        return Rejected(axis="input", have=acts.label, need=f"a multiplier in {', '.join(_WIDE)}")
    if s.grain != (TENSOR if s.static else CHANNEL):
        need = "a stored scale of the tensor, or a run-time scale of a token"
        return Rejected(axis="input", have=acts.label, need=need)
    if s.static != ("input_scale" in op.features):
        have = "no stored input scale" if s.static else "a stored input scale"
        return Rejected(axis="features", have=have, need="one exactly where the scale is stored")
    if s.static and op.op == "grouped_linear":
        return Rejected(axis="input", have="stored scales of experts", need="run-time scales")
    return None


_KINDS = {  # element and zero of weights, element of activations: kind
    ("uint4", 8, "fp8_e4m3"): "int4",
    ("uint4", 8, "int8"): "int4",
    ("fp4_e2m1", 0, "fp8_e4m3"): "fp4",
    ("fp8_e4m3", 0, "fp8_e4m3"): "fp8",
    ("int8", 0, "int8"): "int8",
}


def _kind(recipe: Recipe, acts: QuantSpec) -> str | Rejected:
    zero = recipe.zero_value if recipe.zero == ZERO_CONST else -1
    kind = _KINDS.get((recipe.element, zero, acts.element.name))
    if kind is None:
        have = f"{recipe.element} by {acts.element.name}"
        need = "uint4 around 8, fp4_e2m1 or fp8_e4m3 by fp8_e4m3; uint4 or int8 by int8"
        return Rejected(axis="element", have=have, need=need)
    return kind


def _factor_problem(recipe: Recipe) -> Rejected | None:
    grouped = [f for f in recipe.scales if f.kind >= GROUP]
    if len(grouped) > 2 or len(recipe.scales) - len(grouped) > 2:
        have = f"{len(grouped)} by group of {len(recipe.scales)}"
        return Rejected(axis="scales", have=have, need="at most two by group and two by row")
    if any(f.kind != GROUP or f.cols < 32 for f in grouped):
        need = "groups of 32 columns or more"
        return Rejected(axis="scales", have="groups of 16 or rectangles", need=need)
    if any(f.element not in (_READ if f.kind == GROUP else _FLOATS) for f in recipe.scales):
        need = "floats, e8m0 or unsigned integers by group; floats by row"
        return Rejected(axis="scales", have="other elements", need=need)
    return None


def describe_mixed(op: OpSpec) -> MixedPlan | Rejected:
    """The plan of ``op``, or the first reason why there is none."""
    from quant_core.kernels.rounded import without_input

    acts = op.operand("input")
    if acts is None:
        return Rejected(axis="operands", have="weight", need="input and weight")
    if problem := _input_problem(op, acts):
        return problem
    recipe = describe(without_input(op), ops=("linear", "grouped_linear"))
    if isinstance(recipe, Rejected):
        return recipe
    kind = _kind(recipe, acts)
    if isinstance(kind, Rejected):
        return kind
    if problem := _factor_problem(recipe):
        return problem
    if recipe.act_dtype not in ("bfloat16", "float16"):
        return Rejected(axis="act_dtype", have=recipe.act_dtype, need="bfloat16 or float16")
    if recipe.k > MOST_K:
        return Rejected(axis="in_features", have=str(recipe.k), need=f"at most {MOST_K}")
    named = [(f"scales_{i}", f) for i, f in enumerate(recipe.scales)]
    grouped = [(n, f) for n, f in named if f.kind == GROUP]
    outer = [(n, f) for n, f in named if f.kind != GROUP]

    def filled(of: list[tuple[str, Factor]]) -> list[tuple[str, int]]:
        return [(n, f.constant()) for n, f in of] + [("", ABSENT)] * (2 - len(of))

    inner, rows = filled(grouped), filled(outer)
    s = acts.scales[0]
    return MixedPlan(
        kind=kind,
        integer=acts.element.name == "int8",
        recipe=recipe,
        sub=128 // min([128, *(f.cols for _, f in grouped)]),
        factors=(inner[0][1], inner[1][1]),
        rows=(rows[0][1], rows[1][1]),
        names=(inner[0][0], inner[1][0], rows[0][0], rows[1][0]),
        static=s.static,
        peak=s.peak or _PEAKS[acts.element.name],
        least=s.least,
        most=s.most,
    )


@dataclass(frozen=True, slots=True)
class MixedRing:
    """Block sizes of mixed_ring: tokens, warps (16 outputs each), stages, parts of K."""

    bm: int
    warps: int
    stages: int
    split: int


@dataclass(frozen=True, slots=True)
class MixedWide:
    """Block sizes of mixed_ws: tokens of a half, halves, stages, blocks that share x in cache,
    whether a second half may have no tokens, whether programs stay for several tiles
    (``mixed_turns``; else ``mixed_ws``), parts of K of these."""

    bt: int
    halves: int
    stages: int
    together: int
    partial: bool = False
    stay: bool = False
    split: int = 1

    @property
    def bm(self) -> int:
        return self.bt * self.halves


@dataclass(frozen=True, slots=True)
class MixedPair:
    """Block sizes of mixed_pair: tokens, stages (an even number), parts of K."""

    bm: int
    stages: int
    split: int


def _split(blocks: int, groups: int, want: int, least: int) -> int:
    """Parts of K: at most ``want`` blocks, each of at least ``least`` groups."""
    split = 1
    while split < 8 and blocks * split * 2 <= want and groups // (split * 2) >= least:
        split *= 2
    return split


def _few(p: MixedPlan, rows: int) -> MixedRing:
    """Block sizes of the ring for ``rows`` tokens, of each expert where there are experts."""
    groups, outputs = p.recipe.groups, p.recipe.rows // 64
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    if p.recipe.experts:
        return MixedRing(min(bm, 64), 4, 4, 1)
    if bm == 16:
        return MixedRing(bm, 4, 4, _split(outputs, groups, 5 * SMS, 8))
    if bm == 128 and 128 < rows <= 192:
        bm = 64  # fewer tokens that are none
    blocks = -(-rows // bm) * outputs
    split = _split(blocks, groups, (3 if bm <= 64 else 2) * SMS, 4)
    if bm == 32 and not p.bytes and split == 1 and 2 * blocks <= 4 * SMS and groups >= 32:
        return MixedRing(bm, 4, 6, 2)  # four blocks a multiprocessor, in place of one or two
    return MixedRing(bm, 4, 4 if p.bytes or bm < 64 else _stages(bm, blocks * split), split)


def _stages(bm: int, blocks: int) -> int:
    """So many that no more blocks fit a multiprocessor than it needs to hold all at once.

    Where more fit, those that begin early take a place beside blocks of the product before, and
    some multiprocessors get one too many.
    """
    each = -(-blocks // SMS)
    return 3 if each > 3 else min(9, (_SHARED // each - 2048) // (bm * 128 + 4096))


def _turns(p: MixedPlan, rows: int) -> list[MixedWide]:
    """Block sizes of mixed_turns for at most some hundred rows."""
    if p.recipe.experts or p.bytes or p.sub > 1 or not 32 < rows <= 1024:
        return []
    found = [MixedWide(64, 1, 6, 16, stay=True)] if rows <= 64 else []
    found += [MixedWide(128, 1, 6, 16, stay=True)] if rows <= 512 else []
    pairs = -(-rows // 256) * -(-p.recipe.rows // 128)
    if rows > 256 and 2 * pairs <= SMS and p.recipe.groups >= 16:
        found.append(MixedWide(128, 2, 5, 16, stay=True, split=2))
    return found


def _pair(p: MixedPlan, rows: int) -> MixedPair | None:
    """Block sizes of the pair, where its blocks fit the multiprocessors."""
    groups, outputs = p.recipe.groups, p.recipe.rows // 64
    if p.recipe.experts or rows <= 32:
        return None
    for bm in (64, 128) if groups < 64 or rows <= 64 else (128,):
        blocks = -(-rows // bm) * outputs
        if blocks <= SMS:
            return MixedPair(bm, 4, _split(blocks, groups, SMS, 8))
    return None


def _wide(p: MixedPlan, rows: int) -> MixedWide:
    halves = 2 if p.sub == 1 else 1
    partial = halves == 2 and (p.recipe.experts > 0 or 0 < rows % 256 <= 128)
    c = MixedWide(128, halves, 4 if p.bytes or halves == 1 else 5, 8, partial)
    if halves == 1 or p.bytes or p.recipe.experts:
        return c
    stay = MixedWide(128, halves, 5, 16, stay=True)
    return min(stay, c, key=lambda c: _work_of(p, c, rows, 1)) if partial else stay


def config(p: MixedPlan, rows: int) -> MixedPair | MixedRing | MixedWide:
    """Block sizes for ``rows`` tokens; measured on an H100, see docs/kernels/triton.md."""
    if p.recipe.experts:
        rows = -(-rows // p.recipe.experts)
        return _wide(p, rows) if rows > 128 else _few(p, rows)
    if pair := _pair(p, rows):
        return pair
    found: list[MixedRing | MixedWide] = [_few(p, rows)] if rows <= 1024 else []
    found += _turns(p, rows) + ([_wide(p, rows)] if rows > 128 else [])
    return min(found, key=lambda c: _work_of(p, c, rows, 1))


# Microseconds, fitted to an H100 (benchmarks/gpu_mixed.py).
_START, _START_EXPERTS = 3.4, 25.4  # beside quantizing: of starting; of sorting too
_BYTES_PER_US = 2.9e6
_PARTS_US, _PARTS_PER_US = 3.0, 4.5e6  # of parts of sums, which the cache holds
_GROUP = {"int4": 1.08, "fp4": 1.08, "fp8": 1.0, "int8": 0.83}  # of 128 x 256 outputs, 128 columns
_WHOLE = 0.8  # the same where sums run over all columns
# the same where programs stay, of one tile each, and for twice as many: the card lowers its clock
_STAY, _STAY_TWICE = 0.87, 0.045
_STAY_FEW = {64: 0.44, 128: 0.57}  # of 128 outputs by so many tokens
_STAY_INT = 1.1  # sums of integers become floats before they are scaled
_SHORT_WIDE = {1: 1.0, 2: 1.0, 4: 1.3}  # by pieces that have scales of their own
_SHORT_RING = {1: 1.0, 2: 1.15, 4: 1.85}
_PAIR = {64: 0.5, 128: 0.64}  # of 64 outputs by so many tokens, two groups
_RING = {16: 0.06, 32: 0.11, 64: 0.205, 128: 0.40}  # of 64 outputs by so many tokens, on its share
# the same of 4 bits: of the first block of a multiprocessor, of each up to three, of each of more
_RING_TURN = {64: (0.22, 0.135, 0.19), 128: (0.25, 0.22, 0.36)}


def _work_of(p: MixedPlan, c: MixedPair | MixedRing | MixedWide, rows: int, stacks: int) -> float:
    """Multiplying ``rows`` tokens by each of ``stacks`` matrices with these block sizes."""
    r = p.recipe
    blocks: float = -(-rows // c.bm)
    if r.experts:  # tokens of an expert are more or fewer
        blocks = max(rows / c.bm + 0.4, 1.0)
    elif isinstance(c, MixedWide) and c.partial:
        blocks -= 0.4
    if isinstance(c, MixedWide):
        waves = -(-int(stacks * blocks * -(-r.rows // 128)) // SMS)
        each = _WHOLE if p.whole else _GROUP[p.kind]
        if c.stay and not p.whole:
            each = (_STAY + _STAY_TWICE * math.log2(waves)) * (_STAY_INT if p.integer else 1.0)
            if c.halves == 1:
                return waves * r.groups * _STAY_FEW[c.bt]
            if c.split > 1:
                return r.groups / c.split * each + _PARTS_US + rows * r.n * 8 / _PARTS_PER_US
        if p.bytes and waves > 14:  # the card lowers its clock
            each *= 1.1
        return waves * r.groups * each * _SHORT_WIDE[p.sub] * (c.halves / 2) ** 0.8
    parts = 0.0 if c.split == 1 else _PARTS_US + c.split * rows * r.n * 8 / _PARTS_PER_US
    if isinstance(c, MixedPair):
        return r.groups / c.split / 2 * _PAIR[c.bm] * _SHORT_RING[p.sub] + parts
    if c.bm in _RING_TURN and not (r.experts or p.bytes):
        fixed, turn, many = _RING_TURN[c.bm]
        most = -(-int(blocks * c.split * r.rows / 64) // SMS)
        each = fixed + turn * most if most <= 3 else many * most
        return r.groups / c.split * each * _SHORT_RING[p.sub] + parts
    share = stacks * blocks * (r.rows / 64) / SMS
    return share * r.groups * _RING[c.bm] * _SHORT_RING[p.sub] + parts


def costs(p: MixedPlan, buckets: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """(largest rows, microseconds) per bucket: reading and multiplying, which overlap mostly."""
    experts, out = p.recipe.experts, []
    each = p.recipe.rows * p.recipe.groups * 128 * (1.0 if p.bytes else 0.53)
    for bound in buckets:
        rows = min(bound, 8192)
        stacks = min(experts, rows) if experts else 1
        read = stacks * each / _BYTES_PER_US
        c = config(p, rows)
        work = _work_of(p, c, -(-rows // max(experts, 1)), stacks)
        start = (_START_EXPERTS if experts else _START) + codes_us(rows, p.recipe.k)
        wide = c.bm == 32 or (c.bm == 64 and (experts or p.bytes))
        apart = 0.4 if isinstance(c, MixedRing) and wide else 0.15
        us = start + max(read, work) + apart * min(read, work) + 0.1 * min(rows, 16)
        out.append((ANY_ROWS if bound == buckets[-1] else bound, round(us, 1)))
    return tuple(out)
