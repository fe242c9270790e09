"""The goals of GPU speed, and what a run of ``benchmarks/gpu.py`` reached of them.

A value is a ratio, larger is better:

    peer    time of the best peer over that of the plan's pick (peers: bf16, torch's int4 op,
            humming, and for int4 Marlin's figures below)
    bf16    time of bf16 over the pick's
    best    time of the best candidate (exact kernels and humming) over the pick's: 1 is the best
    bound   time of the fastest peer that is given sorted rows, over the pick's: what a complete
            call of experts cannot be expected to reach
    bytes   int4's time per byte of weights over the pick's: 1 where only bytes cost

A cell of the table holds the worst shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["BASE", "GOALS", "Goal", "Point", "points", "table", "worst"]

BASE = "bf16"
MARLIN: dict[str, dict[int, float]] = {
    "4096x4096": {1: 10.1, 2: 10.0, 4: 10.1, 8: 10.1, 16: 10.6, 32: 19.8, 64: 29.3, 128: 24.0},
    "4096x28672": {1: 29.8, 2: 30.0, 4: 30.2, 8: 30.5, 16: 32.1, 32: 35.2, 64: 49.9, 128: 89.6},
    "14336x4096": {1: 17.7, 2: 17.7, 4: 17.7, 8: 17.7, 16: 18.5, 32: 28.6, 64: 42.8, 128: 51.0},
}
"""Microseconds of Marlin (as in SGLang 0.5.23, sm_90a), int4 in groups of 128, bf16, by the same
method on the same kind of card in another run: KxN -> rows -> time. It is not installed here."""

ALL = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A class of layers, how many rows, and the least ratio; 0: told, not asked for."""

    label: str
    scheme: str
    against: str = "best"
    low: int = 1
    high: int = ALL
    must: float = 0.95
    experts: bool = False


def _goals() -> tuple[Goal, ...]:
    out = [
        Goal(label="int4", scheme="int4", against="peer", high=16, must=1.1),
        Goal(label="int4", scheme="int4", against="peer", low=17, high=64, must=1.0),
        Goal(label="int4", scheme="int4", against="peer", low=65, high=255, must=0.85),
        Goal(label="int4", scheme="int4", against="bf16", low=65, high=255),
        Goal(label="int4", scheme="int4", against="peer", low=256),
    ]
    for scheme, label in (("int4-zero", "zero codes"), ("mxfp4", "MXFP4"), ("nvfp4", "NVFP4")):
        out.append(Goal(label=label, scheme=scheme, against="bytes", high=16, must=1 / 1.1))
        out.append(Goal(label=label, scheme=scheme, against="peer", must=0.0))
    for scheme, label in (
        ("int8a16", "W8A16 int8"), ("fp8a16", "W8A16 fp8"), ("fp8", "fp8 W8A8 per row and token"),
        ("fp8_block", "fp8 blocks 128 x 128"), ("int8", "int8 W8A8"),
        ("w4a8", "int4, fp8 activations"), ("w4a8-int8", "int4, int8 activations"),
    ):  # fmt: skip
        out.append(Goal(label=label, scheme=scheme))
    for scheme, label in (
        ("int4", "experts int4"),
        ("fp8", "experts fp8"),
        ("mxfp4", "experts MXFP4"),
    ):
        out.append(Goal(label=label, scheme=scheme, experts=True))
        out.append(Goal(label=label, scheme=scheme, experts=True, against="bound", must=0.0))
    return tuple(out)


GOALS = _goals()


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value: the pick of one shape and number of rows, and what it is compared with."""

    shape: str
    rows: int
    value: float
    pick: str
    us: float
    rival: str
    rival_us: float


def _by_cell(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Any]]:
    out: dict[tuple[str, str, int], list[Any]] = {}
    for r in records:
        out.setdefault((r["scheme"], r["shape"], r["rows"]), []).append(r)
    return out


def _pick(cell: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((r for r in cell if r["chosen"]), None)


def _rivals(goal: Goal, cell: Sequence[Mapping[str, Any]], shape: str) -> dict[str, float]:
    if goal.against == "bound":
        return {r["who"]: r["us"] for r in cell if r["bound"]}
    whole = [r for r in cell if not r["bound"]]
    if goal.against == "bf16":
        whole = [r for r in whole if r["who"] == BASE]
    if goal.against == "best":
        whole = [r for r in whole if r["who"] != BASE and r["exact"]]
    if goal.against in ("best", "bf16"):
        return {r["who"]: r["us"] for r in whole}
    times = {r["who"]: r["us"] for r in whole if r["peer"]}
    marlin = MARLIN.get(shape, {}).get(cell[0]["rows"])
    if goal.scheme == "int4" and marlin:
        times["Marlin"] = marlin
    return times


def points(goal: Goal, records: Sequence[Mapping[str, Any]]) -> Iterator[Point]:
    """Every value that a run has for a goal."""
    cells = _by_cell(records)
    for (scheme, shape, rows), cell in cells.items():
        if scheme != goal.scheme or not goal.low <= rows <= goal.high:
            continue
        if (shape.count("x") == 2) != goal.experts or (pick := _pick(cell)) is None:
            continue
        facts = {"shape": shape, "rows": rows, "pick": pick["who"], "us": pick["us"]}
        if goal.against == "bytes":
            of = _pick(cells.get(("int4", shape, rows), ()))
            if of is None or not (of["bytes"] and pick["bytes"]):
                continue
            value = of["us"] / pick["us"] * pick["bytes"] / of["bytes"]
            yield Point(**facts, value=value, rival="int4", rival_us=of["us"])
            continue
        rivals = _rivals(goal, cell, shape)
        if rivals:
            best = min(rivals, key=lambda who: rivals[who])
            yield Point(**facts, value=rivals[best] / pick["us"], rival=best, rival_us=rivals[best])


def worst(found: Sequence[Point]) -> Point:
    return min(found, key=lambda p: p.value)


_AGAINST = {
    "peer": "the best peer", "bf16": "bf16", "best": "the best candidate",
    "bytes": "int4's time per byte", "bound": "products of sorted rows",
}  # fmt: skip


def _rows_text(goal: Goal) -> str:
    if goal.high == ALL:
        return f", {goal.low} rows and more" if goal.low > 1 else ""
    return f", {goal.low} to {goal.high} rows" if goal.low > 1 else f", up to {goal.high} rows"


def _reached(goal: Goal, found: Sequence[Point]) -> str:
    """``1: **1.17**, 16: 0.98``: the worst shape per number of rows, bold where it is enough."""
    parts = []
    for m in sorted({p.rows for p in found}):
        value = worst([p for p in found if p.rows == m]).value
        enough = goal.must and value >= goal.must
        parts.append(f"{m}: **{value:.2f}**" if enough else f"{m}: {value:.2f}")
    return ", ".join(parts)


def _line(goal: Goal, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one goal's row; empty where the run has none of it."""
    found = list(points(goal, records))
    if not found:
        return []
    far = worst(found)
    beside = [p.value for p in points(replace(goal, against="bf16"), records)]
    met = sum(p.value >= goal.must for p in found)
    return [
        f"{goal.label}{_rows_text(goal)}",
        f"{goal.must:.2f} of {_AGAINST[goal.against]}" if goal.must else _AGAINST[goal.against],
        _reached(goal, found),
        f"{met} of {len(found)}" if goal.must else "",
        f"{far.shape}, {far.rows} rows: `{far.pick}` {far.us:.1f}, {far.rival} {far.rival_us:.1f}",
        f"{min(beside):.2f} to {max(beside):.2f}" if beside else "",
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per goal, the worst shape per number of rows, bold where it is met."""
    head = ["class", "asked for", "reached by rows, worst shape", "met", "farthest (us)", "of bf16"]
    lines = [head, ["---"] * len(head), *(_line(goal, records) for goal in GOALS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines if cells)
