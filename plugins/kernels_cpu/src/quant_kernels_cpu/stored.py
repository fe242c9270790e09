"""Weights used in the order in which files have them: no memory of their own, no repacking.

    order    codes (bytes)             scales, zero points    csrc/stored.h
    rows     [N, K * bits / 8]         [N, G]
    words    [K / 8, N * 4]            [G, N]
    across   [K, N / 2]                [G, N]
    fields   [N, K / 32 * block]       in the blocks

``order_of`` says which order a ``Packing`` is; ``stored_layout`` what the kernel runs of it; the
kernel itself is in ``stored_kernel``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.kernels.base import Rejected
from quant_core.row_order import head_of, in_model_order
from quant_core.spec import CANONICAL, OpSpec, Packing, QuantSpec
from quant_kernels_cpu.support import (
    ZERO_CODE,
    ZERO_CONST,
    ZERO_FLOAT,
    ZERO_FOLDED,
    ZERO_OFFSET,
    Layout,
    describe,
)

if TYPE_CHECKING:
    import torch

__all__ = ["order_of", "stored_layout", "stored_shapes"]

_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)  # slot of each of 8 rows in a word
_WORD_BITS = {"uint8": 8, "int16": 16, "int32": 32}
_RUN = 32  # codes of a block of fields
_FLOATS = ("f32", "f16", "bf16")


def order_of(packing: Packing, bits: int, k: int) -> str:
    """The order of csrc/stored.h that codes in ``packing`` have; "" if none."""
    word = _WORD_BITS[packing.word]
    if packing.planes or word % bits or bits not in (4, 8):
        return ""
    if packing.fields:
        only = packing.fields[0]
        halves = (only.width, only.stride) in ((4, 16), (8, 1)) and only.width == bits
        single = len(packing.fields) == 1 and only.count == _RUN
        return "fields" if halves and single and packing.axis == "in" else ""
    if packing.axis == "out":
        across = packing.k_major and word == 32 and bits == 4 and packing.order == _INTERLEAVED
        return "across" if across else ""
    if packing.order is not None:
        return ""
    if packing.k_major:
        return "words" if word == 32 and bits == 4 else ""
    return "rows" if k * bits % word == 0 else ""


def _problem(order: str, layout: Layout, spec: QuantSpec) -> Rejected | None:
    """Why the kernel does not run ``layout`` in that order."""
    if layout.bits != layout.width or layout.kind not in ("uint", "int") or layout.gather:
        have = "reordered columns" if layout.gather else layout.element
        return Rejected(axis="element", have=have, need="integers of 4 or 8 bits, in order")
    if layout.element == "int4":
        return Rejected(axis="element", have="int4", need="uint4, int8 or uint8")
    scales = (*layout.scales, *layout.offsets)
    if layout.stored or len(layout.scales) != 1 or len(layout.offsets) > 1:
        return Rejected(axis="scales", have=spec.label, need="one factor")
    if any(f.single or f.element not in _FLOATS for f in scales):
        return Rejected(axis="scales", have=spec.label, need="floats of a row or group")
    kinds = [ZERO_FOLDED, ZERO_CONST, ZERO_CODE, ZERO_OFFSET]
    if order == "fields":
        kinds = [ZERO_FOLDED, ZERO_OFFSET] if layout.width == 4 else [ZERO_FOLDED]
    elif order != "rows":
        kinds.remove(ZERO_CONST)
    if layout.zero not in kinds or layout.zero == ZERO_FLOAT:
        return Rejected(axis="zero", have=spec.label, need="what this order of codes has")
    if order == "across" and layout.n % 8:
        return Rejected(axis="out_features", have=str(layout.n), need="a multiple of 8")
    if order == "rows" and layout.width == 8 and layout.bias not in (0, 128):
        return Rejected(axis="zero", have=str(layout.bias), need="codes less 0 or 128")
    if layout.op == "embedding" and order not in ("rows", "fields"):
        return Rejected(axis="packing", have=order, need="rows of codes")
    return None


def _fields_problem(layout: Layout, packing: Packing, spec: QuantSpec) -> Rejected | None:
    """The block is: float16 scale, float16 offset if there is one, codes."""
    head = 2 * (len(layout.scales) + len(layout.offsets))
    nbytes = head + _RUN * layout.width // 8
    floats = all(f.element == "f16" and f.group == _RUN for f in (*layout.scales, *layout.offsets))
    if packing.block == nbytes and packing.fields[0].at == head and floats and layout.k % _RUN == 0:
        return None
    need = "blocks of a float16 scale, an offset, 32 codes"
    return Rejected(axis="packing", have=f"{spec.label} in {packing.block} bytes", need=need)


def stored_layout(op: OpSpec, *, ops: tuple[str, ...]) -> Layout | Rejected:
    """What C needs to know of ``op``, whose codes are in ``op.packing``, or why it cannot run."""
    head = head_of(op)
    found = describe(replace(in_model_order(op), packing=CANONICAL), ops=ops)
    if isinstance(found, Rejected):
        return found
    spec = op.weight
    order = order_of(op.packing, found.bits, found.k)
    if not order:
        return Rejected(axis="packing", have=str(op.packing), need="an order that files have")
    if problem := _problem(order, found, spec):
        return problem
    if head and (order != "fields" or head % 2 or found.n % head or found.op != "linear"):
        have = f"{order} in heads of {head}"
        return Rejected(axis="features", have=have, need="whole even heads of fields")
    if order != "fields":
        return replace(found, order=order)
    if problem := _fields_problem(found, op.packing, spec):
        return problem
    at = op.packing.fields[0].at
    return replace(found, order=order, block=op.packing.block, at=at, head=head)


def stored_shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Buffer name -> (shape, dtype), in the order of the contract."""
    import torch

    from quant_core.numerics import scale_dtype

    n, k, width, order = layout.n, layout.k, layout.width, layout.order
    codes = {
        "rows": (n, k * width // 8),
        "words": (k // 8, n * 4),
        "across": (k, n // 2),
        "fields": (n, k // _RUN * layout.block),
    }[order]
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (codes, torch.uint8)}
    if order != "fields":
        groups = -(-k // layout.scales[0].group)
        grid = (n, groups) if order == "rows" else (groups, n)
        out["scales_0"] = (grid, scale_dtype(layout.scales[0].element))
        if layout.zero == ZERO_CODE:
            out["zeros"] = (grid, torch.uint8)
        if layout.offsets:
            out["offset_0"] = (grid, scale_dtype(layout.offsets[0].element))
    if layout.bias_dtype:
        out["bias"] = ((n,), getattr(torch, layout.bias_dtype))
    return out
