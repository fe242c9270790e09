"""Members side by side along the output: ``concat_out`` and ``pad_out``, and why not.

    q [N1, K]  per-tensor scale 0.5          [ 0.5 ] N1 rows
    k [N2, K]  per-tensor scale 0.25    ->   [ 0.25] N2 rows     widened to one value per row

Unequal per-tensor factors are never refolded into one: widening changes no weight, refolding does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from quant_core.packing_words import view_as
from quant_core.rewrites.codes import concat_rows, repack
from quant_core.rewrites.grains import levels, regrain, with_grains
from quant_core.rewrites.refuse import only_weight, refuse
from quant_core.spec import CANONICAL, QuantSpec
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["concat_out", "disagreement", "same_bytes"]


def same_bytes(a: Tensor | None, b: Tensor | None) -> bool:
    """Both absent, or of one dtype and shape with the same bits."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dim() == 0:
        a, b = a.view(1), b.view(1)
    return torch.equal(view_as(a, torch.uint8), view_as(b, torch.uint8))


def _any_rows(spec: QuantSpec) -> QuantSpec:
    """``spec`` without its row grains: those can always be made equal, exactly."""
    return with_grains(spec, lambda s: (0, s.grain[1]))


def _unlike_weights(a: QuantizedTensor, b: QuantizedTensor) -> str | None:
    if _any_rows(a.spec) != _any_rows(b.spec):
        return f"specs {a.spec.label!r} and {b.spec.label!r}"
    if len(a.shape) != len(b.shape) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        return f"shapes {a.shape} and {b.shape}"
    if not same_bytes(a.gather, b.gather):
        return "column orders (gather)"
    if len(a.codebook) != len(b.codebook) or not all(map(same_bytes, a.codebook, b.codebook)):
        return "codebooks"
    return None


def disagreement(a: LayerTensors, b: LayerTensors) -> str | None:
    """What keeps two members from being one matrix, in a few words; None if nothing does.

    Packings and row grains may differ (they are made equal), and so may bias and acc_bias (none =
    zeros).
    """
    if set(a.operands) != {"weight"} or set(b.operands) != {"weight"}:
        return f"operands {sorted(a.operands)} and {sorted(b.operands)}"
    unlike = _unlike_weights(a.weight, b.weight)
    if unlike is not None:
        return unlike
    if not (same_bytes(a.input_scale, b.input_scale) and same_bytes(a.input_zero, b.input_zero)):
        return "static input scales"
    if (a.out_scale is None) != (b.out_scale is None):
        return "combined output scales (one has none)"
    for name in ("bias", "acc_bias", "out_scale"):
        x, y = getattr(a, name), getattr(b, name)
        if x is not None and y is not None and x.dtype != y.dtype:
            return f"dtypes of {name}: {x.dtype} and {y.dtype}"
    for lt in (a, b):
        if any(t.site == "output" for t, _ in lt.transforms):
            return "transforms of the output"
    if [t for t, _ in a.transforms] != [t for t, _ in b.transforms] or not all(
        len(x) == len(y) and all(map(same_bytes, x, y))
        for (_, x), (_, y) in zip(a.transforms, b.transforms)
    ):
        return "input transforms"
    return None


def _aligned(parts: list[QuantizedTensor]) -> list[QuantizedTensor]:
    """Parts whose row grids join: per-tensor factors per row unless equal, blocks cut at seams."""
    seams = list(accumulate(p.shape[-2] for p in parts[:-1]))
    grids = [list(levels(p.spec)) for p in parts]
    for at, (name, index, scale) in enumerate(grids[0]):
        rows = math.gcd(*(grid[at][2].grain[0] for grid in grids))
        if rows:
            rows = math.gcd(rows, *seams)
        elif not _one_value(parts, name, index):
            rows = 1
        grain = (rows, scale.grain[1])
        parts = [regrain(p, index, grain, of=name) for p in parts]
    return parts


def _one_value(parts: list[QuantizedTensor], name: str, index: int) -> bool:
    """Whether a level without row grain (and the zeros on its grid) is the same in all parts."""
    first, *others = parts
    same = all(same_bytes(getattr(p, name)[index], getattr(first, name)[index]) for p in others)
    if (name, index) == ("scales", 0):
        same = same and all(same_bytes(p.zeros, first.zeros) for p in others)
    return same


def _joined_level(parts: list[QuantizedTensor], name: str) -> tuple[Tensor, ...]:
    described = [(i, s) for kind, i, s in levels(parts[0].spec) if kind == name]
    return tuple(
        getattr(parts[0], name)[i]
        if s.grain[0] == 0
        else torch.cat([getattr(p, name)[i] for p in parts], dim=-2)
        for i, s in described
    )


def _concat_weights(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    parts = list(weights)
    if any(p.packing != parts[0].packing for p in parts):
        parts = [repack(p, CANONICAL) for p in parts]
    parts = _aligned(parts)
    first = parts[0]
    zeros = first.zeros
    if zeros is not None and first.spec.scales[0].grain[0] != 0:
        zeros = torch.cat([p.zeros for p in parts if p.zeros is not None], dim=-2)
    return replace(
        first,
        shape=(*first.shape[:-2], sum(p.shape[-2] for p in parts), first.shape[-1]),
        codes=concat_rows(parts),
        scales=_joined_level(parts, "scales"),
        offset=_joined_level(parts, "offset"),
        zeros=zeros,
    )


def _concat_rows_of(members: Sequence[LayerTensors], name: str) -> Tensor | None:
    """Per-row vectors joined; a member without one gets zeros (adding 0 changes nothing)."""
    tensors: list[Tensor | None] = [getattr(m, name) for m in members]
    like = next((t for t in tensors if t is not None), None)
    if like is None:
        return None
    out = []
    for member, t in zip(members, tensors):
        *stack, n, _ = member.weight.shape
        if t is None:
            t = torch.zeros(*stack, n, dtype=like.dtype, device=like.device)
        elif t.numel() == 1:
            t = t.reshape(1).expand(*stack, n)
        out.append(t)
    return torch.cat(out, dim=-1)


def concat_out(members: Sequence[LayerTensors]) -> LayerTensors:
    """Members one below the other as one layer [N1 + N2 + ..., K]. Exact.

    Per-tensor factors become one value per row unless all are equal; row grains that differ or
    that a seam cuts become finer; unlike packings become ``CANONICAL``; a missing bias counts as
    zeros.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` naming the two members and what they disagree on: spec, K,
            gather, codebook, static input scale, transforms, or kinds of output scale.
    """
    if not members:
        raise refuse("FUSED", "concat_out: no members, expected at least one. Pass the members.")
    for lt in members:
        only_weight(lt, "concat_out")
    for i, lt in enumerate(members[1:], 1):
        why = disagreement(members[0], lt)
        if why is not None:
            raise refuse(
                "FUSED",
                f"concat_out: members 0 and {i} have unlike {why}. "
                "Keep them apart (quant_core.fuse makes a composite).",
                expected="equal members",
                actual=why,
            )
    if len(members) == 1:
        return members[0]
    return replace(
        members[0],
        operands={"weight": _concat_weights([m.weight for m in members])},
        bias=_concat_rows_of(members, "bias"),
        acc_bias=_concat_rows_of(members, "acc_bias"),
        out_scale=_concat_rows_of(members, "out_scale"),
    )
