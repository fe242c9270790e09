"""Which recipes the Gluon kernels run, and with which block sizes; plain data, no torch.

ring    up to 64 rows, or 128 of small layers: gluon_ring
ws      more: gluon_ws, by a model of what its ways cost
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
    "grouped_config",
    "plan",
    "specialized",
]

_AS = {
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
        return self.element not in ("uint4", "e2m1")


def _mode(grouped: list[Factor], recipe: Recipe) -> int:
    if recipe.zero == ZERO_OFFSET:
        return 3
    if not grouped:
        return 0
    exact = (*_SMALL, ELEMENTS["f16"]) if recipe.act_dtype == "float16" else _SMALL
    one = len(grouped) == 1 and grouped[0].element in exact and not grouped[0].inverse
    return 1 if one else 2


def _problem(recipe: Recipe) -> Rejected | None:
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
    integer = element in ("uint4", "uint8", "int8")
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
    """Block sizes of gluon_ws: two tiles of rows, consumers (64 outputs each), stages of 64
    columns, whether sums are scaled, and how many programs share the work (0: one a tile)."""

    b1: int
    b2: int
    consumers: int
    stages: int
    acc: bool
    programs: int

    @property
    def bm(self) -> int:
        """Rows of a block."""
        return self.b1 + self.b2

    def tiles(self, rows: int, outputs: int) -> int:
        """Tiles of a product."""
        return -(-rows // self.bm) * -(-outputs // (64 * self.consumers))


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


# gluon_ws, its ways: microseconds of a program for a group of 128 columns (int4, groups of 128),
# measured on an H100
WAYS = (
    (Specialized(64, 0, 2, 8, True, 0), 0.72),
    (Specialized(64, 32, 2, 8, True, 0), 0.86),
    (Specialized(64, 32, 3, 8, False, 0), 1.01),
    (Specialized(128, 0, 2, 8, True, 0), 0.92),
    (Specialized(128, 0, 2, 8, False, 0), 0.86),
    (Specialized(128, 0, 3, 8, False, 0), 1.12),
    (Specialized(128, 32, 2, 8, True, 0), 1.10),
    (Specialized(128, 32, 2, 8, False, 0), 1.03),
    (Specialized(128, 64, 2, 7, False, 0), 1.07),
    (Specialized(256, 0, 2, 5, False, 0), 1.31),
)
# microseconds: of a launch; of splitting tiles, and for each part of 128 rows; of shares that run
# over the ends of tiles
_START, _SPLIT, _PART, _CROSS = 3.0, 2.5, 0.6, 3.0
_READ = 2.8e6  # bytes a microsecond
_EXACT = 1.1  # how much slower it may be to scale sums, which rounds less, than weights


def _slower(p: GluonPlan, c: Specialized) -> float:
    """What dequantizing other than int4 with one scale for 128 columns costs."""
    if p.bytes:
        weights = 0.2 if p.mode == 2 and not c.acc else 0.0
        return (1.07 if c.acc or c.bm >= 256 else 1.3) + weights * (1.0 if c.bm < 256 else 0.5)
    more = 0.3 if p.spg >= 8 or p.mode == 3 else 0.13 if p.spg > 1 else 0.0
    return 1.0 + more * (2.0 if c.bm < 128 else 1.0 if c.bm < 256 else 0.3)


def _fits(p: GluonPlan, c: Specialized) -> bool:
    """Whether registers hold the parameters of weights beside the sums (ptxas: spilled bytes)."""
    if p.spg >= 8 and p.mode >= 2:
        return c.consumers == 2 and c.bm < 256
    return p.mode < 3 or c.consumers == 2


def _programs(tiles: int, groups: int) -> list[int]:
    """How many programs may share ``tiles``: 0, one a tile; equal parts of each; all there are."""
    out = [0, *(tiles * s for s in (2, 4, 8) if groups % s == 0 and tiles * s <= SMS)]
    few = tiles * groups >= 2 * SMS and tiles <= 8 * SMS  # many tiles: the last round hardly counts
    return [*out, SMS] if few and cut(tiles, groups, SMS) else out


def _us(p: GluonPlan, recipe: Recipe, c: Specialized, unit: float, tiles: int) -> float:
    """Microseconds of ``gluon_ws``: the groups that one processor computes, cuts, reads."""
    groups, programs = recipe.groups, c.programs or tiles
    share = -(-tiles * groups // programs) * -(-programs // SMS)
    us = share * unit * _slower(p, c)
    if cut(tiles, groups, programs):
        crossing = tiles * groups % programs or groups % share
        if crossing:  # no processor rests, and all of them draw power
            us *= 1.12 if c.bm >= 192 else 1.04
        us += _SPLIT + _PART * -(-groups // share) * c.bm / 128 + (_CROSS if crossing else 0.0)
    elif c.programs == 0 and tiles > SMS:
        us *= 1.0 + 0.15 * min(max(us - 90.0, 0.0) / 100.0, 1.0)
    us *= 1.0 + 0.1 * min(max(us - 300.0, 0.0) / 300.0, 1.0)  # the longer, the warmer, the slower
    return _START + max(us, recipe.weight_bytes / _READ)


def specialized(p: GluonPlan, recipe: Recipe, rows: int) -> tuple[Specialized, float]:
    """The quickest way for ``rows`` rows and its microseconds by a model of tiles and rounds.

    One that scales sums, which rounds less, goes before one that scales weights where it takes
    less than a tenth more.
    """
    sums, groups = p.spg == 1 and p.mode in (1, 2), recipe.groups
    held = []
    for way, unit in WAYS:
        if (sums or not way.acc) and _fits(p, way):
            tiles = way.tiles(rows, recipe.rows)
            for programs in _programs(tiles, groups):
                c = replace(way, programs=programs)
                held.append((_us(p, recipe, c, unit, tiles), c))
    least = min(us for us, _ in held)
    near = [h for h in held if h[0] <= least * (_EXACT if h[1].acc else 1.0)]
    us, c = min(near, key=lambda h: (not h[1].acc, h[0]))
    return c, us


def _ring(p: GluonPlan, recipe: Recipe, rows: int) -> Ring:
    """Block sizes of ``gluon_ring``."""
    groups, n = recipe.groups, recipe.rows
    sums = p.spg == 1 and p.mode in (1, 2)
    wide = n // 64 >= 2 * SMS and rows > 32
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    warps = 8 if wide else 4
    stages = 3 if p.bytes and bm == 64 else 4
    blocks = -(-rows // bm) * (n // (16 * warps))
    return Ring(bm, warps, stages, _split(blocks, groups, 2 * SMS), sums and not wide)


def config(p: GluonPlan, recipe: Recipe, rows: int) -> Ring | Specialized:
    """Block sizes for ``rows`` rows; measured on an H100, see docs/kernels/triton.md."""
    if rows > 64 and (rows > 128 or recipe.rows >= 2048):
        return specialized(p, recipe, rows)[0]
    sums = p.spg == 1 and p.mode in (1, 2)
    if sums and 32 < rows <= 64 and recipe.rows >= 2048:
        c, us = specialized(p, recipe, rows)
        # what gluon_ring took there
        if us < 8.8 + 0.1475 * recipe.groups * recipe.rows / 4096 and recipe.rows // 64 < 2 * SMS:
            return c
    return _ring(p, recipe, rows)


def grouped_config(p: GluonPlan, recipe: Recipe, rows: int) -> Ring | Specialized:
    """Block sizes for ``rows`` rows spread over the experts of a stack."""
    each = -(-rows // max(recipe.experts, 1))
    if each > 96:  # one block for most experts, though half empty
        return Specialized(256, 0, 2, 5, False, 0)
    acc = p.spg == 1 and p.mode in (1, 2)
    if each <= 16:
        return Ring(16, 4, 4, 1, acc)
    if each <= 32:
        return Ring(32, 4, 4, 1, acc)
    return Ring(64, 4, 3 if p.bytes else 4, 1, False) if each <= 64 else Ring(128, 4, 3, 1, False)
