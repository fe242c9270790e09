"""Which recipes the Gluon kernels run, and with which block sizes; plain data, no torch.

ring    up to some 128 rows: gluon_ring
ws      more: gluon_ws
"""

from __future__ import annotations

from dataclasses import dataclass

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

__all__ = ["GluonPlan", "Ring", "Specialized", "config", "grouped_config", "plan"]

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
    """Block sizes of gluon_ws: rows, stages, blocks of outputs that share x in the cache."""

    bm: int
    stages: int
    together: int


def _split(blocks: int, groups: int, want: int) -> int:
    split = 1
    while split < 8 and blocks * split * 2 <= want and groups // (split * 2) >= 4:
        split *= 2
    return split


def config(p: GluonPlan, recipe: Recipe, rows: int) -> Ring | Specialized:
    """Block sizes for ``rows`` rows; measured on an H100, see docs/kernels/triton.md."""
    groups, n = recipe.groups, recipe.rows
    if rows > 128 and (n // 128) * -(-rows // 256) >= SMS * 2 // 3:
        return Specialized(256, 5, 8)
    if rows > 256:
        return Specialized(256, 5, 8) if rows > 512 or n >= 8192 else Specialized(128, 8, 8)
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64
    acc = bm <= 32 and p.spg == 1 and p.mode in (1, 2)
    if rows <= 64:
        wide = n // 64 >= 2 * SMS
        warps = 8 if wide and bm == 64 else 4
        stages = 3 if p.bytes and bm == 64 else 4
        return Ring(bm, warps, stages, _split(n // (16 * warps), groups, 2 * SMS), acc)
    if n // 64 >= 2 * SMS:  # a block partly beyond x: two tiles of outputs share its rows
        return Ring(128, 8 if rows % 128 else 4, 3, 1, False)
    blocks = -(-rows // 64) * (n // 64)
    if blocks >= 2 * SMS:
        return Ring(128, 4, 3, 1, False)
    return Ring(64, 4, 3 if p.bytes else 4, _split(blocks, groups, 2 * SMS), False)


def grouped_config(p: GluonPlan, recipe: Recipe, rows: int) -> Ring | Specialized:
    """Block sizes for ``rows`` rows spread over the experts of a stack."""
    each = -(-rows // max(recipe.experts, 1))
    if each > 96:  # one block for most experts, though half empty
        return Specialized(256, 5, 8)
    acc = p.spg == 1 and p.mode in (1, 2)
    if each <= 16:
        return Ring(16, 4, 4, 1, acc)
    if each <= 32:
        return Ring(32, 4, 4, 1, acc)
    return Ring(64, 4, 3 if p.bytes else 4, 1, False) if each <= 64 else Ring(128, 4, 3, 1, False)
