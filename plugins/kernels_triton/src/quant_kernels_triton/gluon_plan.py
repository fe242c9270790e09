"""Which recipes the Gluon kernels run, and with which block sizes; plain data, no torch.

ring    up to 16 rows, 32 of very wide layers, 128 of small ones: gluon_ring
ws      more, and 2- and 3-bit codes always: gluon_ws, by a model of what its ways cost
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_core.kernels.base import Rejected
from quant_kernels_triton.recipe import (
    ABSENT,
    BLOCK,
    CHANNEL,
    ELEMENTS,
    GROUP,
    TENSOR,
    ZERO_CODE,
    ZERO_CONST,
    ZERO_OFFSET,
    Factor,
    Recipe,
)

__all__ = [
    "SMS",
    "WAYS",
    "GluonPlan",
    "Ring",
    "Specialized",
    "config",
    "cut",
    "plan",
    "specialized",
    "stages",
]

_AS = {
    "uint2": "uint2",
    "uint3": "uint3",
    "uint4": "uint4",
    "uint5": "uint8",
    "uint6": "uint8",
    "uint7": "uint8",
    "uint8": "uint8",
    "int8": "int8",
    "fp4_e2m1": "e2m1",
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
}
_SMALL = tuple(ELEMENTS[e] for e in ("bf16", "e8m0", "fp8_e4m3", "uint", "int"))
SMS = 132  # multiprocessors of an H100: only block counts depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class GluonPlan:
    """How the kernels read a recipe: constants, and the buffers behind their pointers."""

    element: str  # of asm.dequant
    mode: int
    zero: int
    zero_value: int | None
    spg: int  # scales of a row in 128 columns
    factors: tuple[int, int, int, int, int]  # two scales, zero, two offsets
    names: tuple[str, str, str, str, str]  # their buffers, "" = none
    rows: tuple[int, int]  # factors of a row or of the matrix
    row_names: tuple[str, str]

    @property
    def bytes(self) -> bool:
        """Whether a code takes a byte."""
        return self.bits == 8

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return {"uint2": 2, "uint3": 3, "uint4": 4, "e2m1": 4}.get(self.element, 8)

    @property
    def early(self) -> bool:
        """Whether codes are read ahead of a product: where they take long to become weights."""
        return self.element == "e2m1"

    @property
    def sums(self) -> bool:
        """Whether scales may multiply the sums of 128 columns."""
        return self.spg == 1 and self.mode in (1, 2)


def _mode(grouped: list[Factor], recipe: Recipe) -> int:
    if recipe.zero == ZERO_OFFSET:
        return 3
    if not grouped:
        return 0
    exact = (*_SMALL, ELEMENTS["f16"]) if recipe.act_dtype == "float16" else _SMALL
    one = len(grouped) == 1 and grouped[0].element in exact and not grouped[0].inverse
    return 1 if one else 2


def _problem(recipe: Recipe) -> Rejected | None:
    if recipe.experts and recipe.bits < 4:
        return Rejected(axis="element", have=recipe.element, need="4 or 8 bits for experts")
    if recipe.element not in _AS:
        return Rejected(axis="element", have=recipe.element, need=" or ".join(_AS))
    if recipe.act_dtype not in ("bfloat16", "float16"):
        return Rejected(axis="act_dtype", have=recipe.act_dtype, need="bfloat16 or float16")
    scales, offsets = recipe.scales, recipe.offsets
    grouped = [f for f in scales if f.kind >= GROUP]
    outer = [f for f in scales if f.kind < GROUP]
    if len(grouped) > 2 or len(outer) > 2:
        have = f"{len(grouped)} by group and {len(outer)} by row"
        return Rejected(axis="scales", have=have, need="at most two of each")
    if any(f.element > ELEMENTS["f16"] or f.inverse for f in outer):
        return Rejected(axis="scales", have="a small or inverse factor of rows", need="a float")
    if recipe.zero == ZERO_CODE and scales[0].kind != GROUP:
        return Rejected(axis="zero", have="zeros per row or rectangle", need="zeros per group")
    if recipe.bits == 4 and recipe.zero_bits > 7:
        return Rejected(axis="zero", have=f"codes of {recipe.zero_bits} bits", need="at most 7")
    if recipe.bits < 4 and any(f.kind == GROUP and f.cols < 32 for f in (*scales, *offsets)):
        have = f"groups of {min(f.cols for f in scales)} columns"
        return Rejected(axis="scales", have=have, need="groups of 32 or more for 2 and 3 bits")
    if recipe.zero == ZERO_OFFSET and (outer or any(f.kind != GROUP for f in (*scales, *offsets))):
        have = "an offset with factors of rows"
        return Rejected(axis="offset", have=have, need="factors per group only")
    if recipe.zero == ZERO_CONST and recipe.zero_value > 127 and recipe.bits == 4:
        return Rejected(axis="zero", have=str(recipe.zero_value), need="at most 127")
    return None


def plan(recipe: Recipe) -> GluonPlan | Rejected:
    """The plan of a recipe, or why there is none."""
    if problem := _problem(recipe):
        return problem
    grouped = [(f"scales_{i}", f) for i, f in enumerate(recipe.scales) if f.kind >= GROUP]
    outer = [(f"scales_{i}", f) for i, f in enumerate(recipe.scales) if f.kind in (TENSOR, CHANNEL)]
    zeros = Factor(
        kind=GROUP, element=ELEMENTS["uint"], rows=1, cols=recipe.scales[0].cols
    )  # fmt: skip
    coded = [("zeros", zeros)] if recipe.zero == ZERO_CODE else []
    shifts = [(f"offset_{i}", f) for i, f in enumerate(recipe.offsets)]

    def filled(of: list[tuple[str, Factor]], count: int) -> list[tuple[str, int]]:
        return [(n, f.constant()) for n, f in of] + [("", ABSENT)] * (count - len(of))

    inner = filled(grouped, 2) + filled(coded, 1) + filled(shifts, 2)
    rows = filled(outer, 2)
    cols = [f.cols for _, f in (*grouped, *coded, *shifts) if f.kind != BLOCK]
    element = _AS[recipe.element]
    integer = "int" in element
    return GluonPlan(
        element=element,
        mode=_mode([f for _, f in grouped], recipe),
        zero=recipe.zero,
        zero_value=recipe.zero_value if recipe.zero == ZERO_CONST and integer else None,
        spg=128 // min([128, *cols]),
        factors=tuple(c for _, c in inner),  # type: ignore[arg-type]
        names=tuple(n for n, _ in inner),  # type: ignore[arg-type]
        rows=tuple(c for _, c in rows),  # type: ignore[arg-type]
        row_names=tuple(n for n, _ in rows),  # type: ignore[arg-type]
    )


@dataclass(frozen=True, slots=True)
class Ring:
    """Block sizes of gluon_ring: rows, warps (16 outputs each), stages, parts of K."""

    bm: int
    warps: int
    stages: int
    split: int
    acc: bool


@dataclass(frozen=True, slots=True)
class Specialized:
    """Block sizes of gluon_ws: two tiles of rows, consumers, tiles of 64 outputs of each, whether
    sums are scaled, stages, how many programs share the work (0: one a tile), and groups of 128
    columns that a round of the loop takes."""

    b1: int
    b2: int
    consumers: int
    wide: int
    acc: bool
    stages: int = 2
    programs: int = 0
    unroll: int = 1

    @property
    def bm(self) -> int:
        """Rows of a block."""
        return self.b1 + self.b2

    @property
    def per(self) -> int:
        """Columns of a stage, in sixty-fours: few of many rows fit, so they are short."""
        return 1 if self.bm >= 192 else 2

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return 64 * self.consumers * self.wide

    def tiles(self, rows: int, outputs: int) -> int:
        """Tiles of a product."""
        return -(-rows // self.bm) * -(-outputs // self.outputs)


def cut(tiles: int, groups: int, programs: int) -> bool:
    """Whether equal shares cut tiles along K; see ``gluon_share``."""
    rounds = max(tiles // programs - 1, 0)
    line = (tiles - rounds * programs) * groups
    return bool(line % programs or line // programs % groups)


def _split(blocks: int, groups: int, want: int) -> int:
    split = 1
    while split < 8 and blocks * split * 2 <= want and groups // (split * 2) >= 4:
        split *= 2
    return split


# gluon_ws, its ways: microseconds of a program for 128 columns (int4, groups of 128),
# measured on an H100
WAYS = (
    (Specialized(32, 0, 2, 1, True), 0.425),
    (Specialized(32, 0, 2, 1, False), 0.43),
    (Specialized(32, 0, 3, 1, True), 0.57),
    (Specialized(32, 0, 2, 2, True), 0.867),
    (Specialized(64, 0, 2, 1, True), 0.53),
    (Specialized(64, 0, 2, 1, False), 0.555),
    (Specialized(64, 0, 3, 1, True), 0.765),
    (Specialized(64, 0, 3, 1, False), 0.765),
    (Specialized(64, 0, 2, 2, True), 1.044),
    (Specialized(64, 0, 2, 2, False), 1.03),
    (Specialized(64, 32, 2, 1, True), 0.71),
    (Specialized(64, 32, 2, 1, False), 0.72),
    (Specialized(64, 32, 3, 1, False), 0.97),
    (Specialized(128, 0, 2, 1, True), 0.825),
    (Specialized(128, 0, 2, 1, False), 0.775),
    (Specialized(128, 0, 3, 1, False), 1.13),
    (Specialized(128, 0, 2, 2, False), 1.53),
    (Specialized(128, 64, 2, 1, False), 1.10),
    (Specialized(256, 0, 2, 1, False), 1.34),
)
# microseconds: of a launch; of splitting tiles, and for each part of 128 x 128 sums; between two
# tiles of a program, and between two programs of one tile
_START, _SPLIT, _PART, _TILE, _NEXT = 3.8, 1.6, 0.9, 1.5, 5.5
_CROSS, _CROSS_ROWS = 0.5, 70.0  # of shares that run over the ends of tiles; rows that add one
# how much slower tiles are that are cut at different columns, by what of x the cache does not hold
_APART, _CACHE, _BEYOND = 0.4, 45e6, 60e6
_READ = 2.6e6  # bytes a microsecond
_EXACT = 1.05  # how much slower it may be to scale sums, which rounds less, than weights
_SHARED = 232448 - 6500  # bytes of a block, less what the epilogue takes


def stages(p: GluonPlan, c: Specialized) -> int:
    """Stages that shared memory holds."""
    factors = 0
    for f in (f for f in p.factors if f & 7 == GROUP):
        pair = {0: 8, 1: 4, 2: 4}.get(f >> 3 & 7, 2)  # bytes, by element
        factors += c.outputs // 2 * max(64 // ((f >> 20) * 16), 1) * pair
    slot = c.bm * 128 + c.outputs * 8 * p.bits + factors  # 64 columns
    return min(16 // c.per, _SHARED // (slot * c.per))


def _more(p: GluonPlan) -> float:
    """Microseconds that 64 outputs by 128 columns take above int4 with one scale, per consumer."""
    more = 0.085 if p.bytes else {2: 0.03, 3: 0.06}.get(p.bits, 0.0)
    if p.element == "e2m1":
        more += 0.065 if p.spg <= 4 else 0.11
    elif p.mode == 3 or p.spg >= 8:
        more += 0.1
    elif p.zero == ZERO_CODE and p.sums:
        more += 0.025
    elif p.spg > 1 or (p.mode == 2 and not p.sums):
        more += 0.04
    return more


def _fits(p: GluonPlan, c: Specialized) -> bool:
    """Whether registers hold the parameters of weights beside the sums (ptxas: spilled bytes)."""
    if p.mode == 3 or (p.spg >= 8 and p.mode == 2):
        return c.consumers == 2 and c.bm * c.wide <= 192
    if p.bits == 3:
        return c.consumers == 2 and c.wide == 1
    return c.consumers < 4


def _programs(tiles: int, shares: int) -> list[int]:
    """How many programs may share ``tiles``: 0, one a tile; equal parts of each; as many as give
    each the same number of tiles; all there are."""
    out = [0, *(tiles * s for s in (2, 4, 8) if shares % s == 0 and tiles * s <= SMS)]
    if tiles > SMS:
        even = range(SMS, SMS * 7 // 8, -1)
        out += [p for p in even if tiles % p == 0][:1]
    few = tiles * shares >= 2 * SMS
    return [*out, SMS] if few and cut(tiles, shares, SMS) else out


def _us(p: GluonPlan, recipe: Recipe, c: Specialized, unit: float, rows: int) -> float:
    """Microseconds of ``gluon_ws``: the groups that one processor computes, cuts, reads."""
    tiles = c.tiles(rows, recipe.rows)
    shares, programs = recipe.groups // c.unroll, c.programs or tiles
    share = -(-tiles * shares // programs)  # of a program
    hidden = 1.0 if c.bm <= 96 else 0.7 if c.bm <= 128 else 0.2  # behind products
    unit = (unit + hidden * _more(p) * c.consumers * c.wide) * c.unroll
    rounds = -(-programs // SMS)
    us = rounds * share * unit + (rounds - 1) * _NEXT + max(tiles / programs - 1, 0.0) * _TILE
    if cut(tiles, shares, programs):
        crossing = tiles * shares % programs or shares % share
        sums = -(-shares // share) * c.bm * c.outputs / 16384
        us += _SPLIT + _PART * sums + (_CROSS + c.bm / _CROSS_ROWS if crossing else 0.0)
        if crossing and tiles > programs:
            beyond = min(max(2.0 * rows * recipe.k - _CACHE, 0.0) / _BEYOND, 1.0)
            us += min(share, 2 * shares) * unit * _APART * beyond
    us *= 1.0 + 0.015 * min(max(us - 300.0, 0.0) / 300.0, 1.0)  # the longer, the warmer, the slower
    return _START + max(us, recipe.weight_bytes / _READ)


def specialized(p: GluonPlan, recipe: Recipe, rows: int) -> tuple[Specialized, float]:
    """The quickest way for ``rows`` rows and its microseconds by a model of tiles and rounds.

    One that scales sums, which rounds less, goes before one that scales weights where it takes
    little more.
    """
    groups, held = recipe.groups, []
    for way, unit in WAYS:
        if (p.sums or not way.acc) and _fits(p, way):
            twice = groups % 2 == 0 and way.wide == 1 and not (way.acc and way.bm >= 128)
            twice = twice and way.bm > (128 if p.early else 64 if p.bytes else 0)
            way = replace(way, stages=stages(p, way), unroll=1 + twice)
            tiles = way.tiles(max(rows, 1), recipe.rows)
            for programs in _programs(tiles, groups // way.unroll):
                c = replace(way, programs=programs)
                held.append((_us(p, recipe, c, unit, max(rows, 1)), c))
    least = min(us for us, _ in held)
    near = [h for h in held if h[0] <= least * (_EXACT if h[1].acc else 1.0)]
    us, c = min(near, key=lambda h: (not h[1].acc, h[0]))
    return c, us


def _ring(p: GluonPlan, recipe: Recipe, rows: int) -> Ring:
    """Block sizes of ``gluon_ring``."""
    groups, n = recipe.groups, recipe.rows
    wide = n // 64 >= 2 * SMS and rows > 32
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    warps = 8 if wide else 4
    stages = 3 if p.bytes and bm == 64 else 4
    blocks = -(-rows // bm) * (n // (16 * warps))
    return Ring(bm, warps, stages, _split(blocks, groups, 2 * SMS), p.sums and not wide)


def config(p: GluonPlan, recipe: Recipe, rows: int) -> Ring | Specialized:
    """Block sizes for ``rows`` rows; measured on an H100, see docs/kernels/triton.md."""
    rows = max(rows, 1)  # of no rows nothing is launched
    few = 128 if recipe.rows < 2048 else 32 if recipe.rows // 64 >= 3 * SMS else 16
    if rows <= few and p.bits >= 4:
        return _ring(p, recipe, rows)
    return specialized(p, recipe, rows)[0]
