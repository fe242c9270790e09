"""Arithmetic of grains: the grids on which scales, zeros and offsets live.

A level of grain (r, c) has one value per r x c rectangle, on a grid [ceil(N/r), ceil(K/c)]; 0
stands for the whole axis. A grid may be made finer exactly by repeating values (``regrain``), and
cut or joined wherever the cut falls on a line of the grid; so every cut is: make the grid as fine
as the cut needs, then slice.

        grain 4, N = 7, cut at 2                grain 2
        | a a a a | b b b |          ->         | a a | a a | b b | b |
              ^ inside a                              ^ on a line
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from quant_core.rewrites.refuse import refuse
from quant_core.spec import Grain, QuantSpec, Scale, Zero
from quant_core.tensors import QuantizedTensor

__all__ = [
    "Level",
    "common_grain",
    "cut_grain",
    "levels",
    "map_levels",
    "regrain",
    "regrain_axis",
    "repeat_grid",
    "with_grains",
]

Level = tuple[str, int, Scale]
"""(list it is in: "scales" or "offset", index in it, its description)."""


def levels(spec: QuantSpec) -> Iterator[Level]:
    """All levels of scales, then of the offset. Zeros of kind "code" follow scales[0]."""
    for i, scale in enumerate(spec.scales):
        yield "scales", i, scale
    if spec.zero is not None and spec.zero.kind == "offset":
        for i, scale in enumerate(spec.zero.levels):
            yield "offset", i, scale


def map_levels(
    qt: QuantizedTensor, change: Callable[[Tensor, Scale], Tensor]
) -> dict[str, tuple[Tensor, ...] | Tensor | None]:
    """``change(values, level)`` applied to scales, offset and zeros: arguments of ``replace``."""
    out: dict[str, tuple[Tensor, ...] | Tensor | None] = {
        "scales": tuple(change(t, s) for t, s in zip(qt.scales, qt.spec.scales, strict=True)),
        "zeros": None if qt.zeros is None else change(qt.zeros, qt.spec.scales[0]),
    }
    if qt.spec.zero is not None and qt.spec.zero.kind == "offset":
        pairs = zip(qt.offset, qt.spec.zero.levels, strict=True)
        out["offset"] = tuple(change(t, s) for t, s in pairs)
    return out


def with_grains(spec: QuantSpec, change: Callable[[Scale], Grain]) -> QuantSpec:
    """``spec`` with the grain of every level replaced by ``change(level)``."""

    def regrained(scales: tuple[Scale, ...]) -> tuple[Scale, ...]:
        return tuple(replace(s, grain=change(s)) for s in scales)

    zero: Zero | None = spec.zero
    if zero is not None and zero.kind == "offset":
        zero = replace(zero, levels=regrained(zero.levels))
    return replace(spec, scales=regrained(spec.scales), zero=zero)


def repeat_grid(t: Tensor, old: Grain, new: Grain, shape: tuple[int, int]) -> Tensor:
    """Values of grain ``old`` on the finer grid ``new``: same value at every weight. Exact."""
    for dim, size, o, n in ((-2, shape[0], old[0], new[0]), (-1, shape[1], old[1], new[1])):
        if o != n:
            times = -(-size // n) if o == 0 else o // n
            t = t.repeat_interleave(times, dim=dim).narrow(dim, 0, -(-size // n))
    return t


def _divides(new: int, old: int) -> bool:
    return new == old or (new > 0 and (old == 0 or old % new == 0))


def regrain(
    qt: QuantizedTensor, level: int, grain: Grain, *, of: str = "scales"
) -> QuantizedTensor:
    """The same weights with one level on a finer grid. Exact.

    Args:
        level: index into ``spec.scales`` or, with ``of="offset"``, into ``spec.zero.levels``.
        grain: must divide the present grain on both axes; 0 = whole axis divides nothing finer.
        of: "scales" or "offset". Zeros of kind "code" follow scales[0].

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` if ``grain`` is not finer or there is no such level.
    """
    old = next((s for name, i, s in levels(qt.spec) if (name, i) == (of, level)), None)
    if old is None:
        raise refuse(
            "GROUP",
            f"regrain: there is no level {level} of {of} in {qt.spec.label!r}. "
            "Give the index of an existing level.",
            actual=(of, level),
        )
    if not (_divides(grain[0], old.grain[0]) and _divides(grain[1], old.grain[1])):
        raise refuse(
            "GROUP",
            f"regrain: grain {grain} does not divide {old.grain} of level {level} of {of}. "
            "Only finer grids are exact.",
            expected=old.grain,
            actual=grain,
        )
    shape = (qt.shape[-2], qt.shape[-1])
    target = replace(old, grain=grain)
    if of == "offset":
        assert qt.spec.zero is not None
        parts = list(qt.spec.zero.levels)
        parts[level] = target
        zero = replace(qt.spec.zero, levels=tuple(parts))
        values = list(qt.offset)
        values[level] = repeat_grid(values[level], old.grain, grain, shape)
        return replace(qt, spec=replace(qt.spec, zero=zero), offset=tuple(values))
    scales, values = list(qt.spec.scales), list(qt.scales)
    scales[level] = target
    values[level] = repeat_grid(values[level], old.grain, grain, shape)
    zeros = qt.zeros
    if level == 0 and zeros is not None:
        zeros = repeat_grid(zeros, old.grain, grain, shape)
    spec = replace(qt.spec, scales=tuple(scales))
    return replace(qt, spec=spec, scales=tuple(values), zeros=zeros)


def regrain_axis(qt: QuantizedTensor, axis: int, change: Callable[[int], int]) -> QuantizedTensor:
    """All levels on the grids ``change(grain along axis)``; axis 0 = rows, 1 = columns. Exact.

    ``change`` must return a divisor of its argument (of the axis, when the argument is 0).
    """
    shape = (qt.shape[-2], qt.shape[-1])

    def finer(scale: Scale) -> Grain:
        r, c = scale.grain
        return (change(r), c) if axis == 0 else (r, change(c))

    changed = map_levels(qt, lambda t, s: repeat_grid(t, s.grain, finer(s), shape))
    return replace(qt, spec=with_grains(qt.spec, finer), **changed)  # type: ignore[arg-type]


def cut_grain(grain: int, at: int) -> int:
    """The coarsest grain that has a line at position ``at``; a whole axis (0) stays whole."""
    return math.gcd(grain, at) if grain else 0


def common_grain(a: Grain, b: Grain) -> Grain:
    """The coarsest grid that has the lines of both."""
    return (math.gcd(a[0], b[0]), math.gcd(a[1], b[1]))
