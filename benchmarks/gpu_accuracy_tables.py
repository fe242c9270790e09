"""Tables of what ``gpu_accuracy.py`` found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["by_kind", "latest", "show", "table", "told"]

_KERNELS = ("cuda_decode", "gluon_wna16", "triton_wna16", "triton_dense", "torch_dequant")


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of the rows about one kernel and layer."""
    keys = ("part", "kernel", "weight", "inputs", "act", "gather")
    return list({(*(r.get(k) for k in keys), str(r.get("sizes"))): r for r in rows}.values())


def _ran(rows: list[dict[str, Any]]) -> str:
    """Which numbers of rows of x ran; in brackets those that some layers lack."""
    every = sorted({m for r in rows for m in r.get("rows", ())})
    some = {m for m in every if any(m not in r.get("rows", ()) for r in rows)}
    held = [f"({m})" if m in some else str(m) for m in every]
    return f"{held[0]} to {held[-1]}" if len(held) > 2 and not some else " ".join(held)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Per kernel and type of x: cases, worst errors, how many are over the bound, what is wrong."""
    held: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        if "kernel" in r:
            held.setdefault((r["part"], r["kernel"], r.get("act", "")), []).append(r)
    lines = ["| part | kernel | x | kinds | layers | rows | cases | worst | with rounded weights "
             "| over | wrong |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (part, kernel, act), of in sorted(held.items()):
        cases, over = (sum(r.get(key, 0) for r in of) for key in ("cases", "over"))
        worst, likewise = (max(r.get(key, 0.0) for r in of) for key in ("worst", "likewise"))
        wrong = sum(bool(r["bad"]) for r in of)
        kinds = len({(r.get("weight"), r.get("inputs")) for r in of})
        lines.append(f"| {part} | {kernel} | {act} | {kinds} | {len(of)} | {_ran(of)} | {cases} | "
                     f"{worst:.2e} | {likewise:.2e} | {over} | {wrong} |")  # fmt: skip
    return lines


def by_kind(rows: list[dict[str, Any]]) -> list[str]:
    """For every kind of weights each kernel's worst errors: bf16 exact, with rounded weights; fp16.

    "-" is a kernel that refuses the kind, "not run" one that was not asked.
    """
    held: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        if r.get("part") == "float" and r.get("kernel") in _KERNELS:
            held.setdefault((r["weight"], r["kernel"], r["act"]), []).append(r)
    asked = {(w, act) for w, _, act in held}
    lines = [f"| kind | {' | '.join(_KERNELS)} |", "|---" * (len(_KERNELS) + 1) + "|"]
    for kind in dict.fromkeys(w for w, _, _ in held):
        cells = []
        for kernel in _KERNELS:
            texts = []
            for act in ("bfloat16", "float16"):
                of = held.get((kind, kernel, act))
                if of is None:
                    texts.append("-" if (kind, act) in asked else "not run")
                    continue
                keys = ("worst", "likewise") if act == "bfloat16" else ("worst",)
                texts.append(", ".join(f"{max(r[k] for r in of) * 1e3:.2f}" for k in keys))
            cells.append("-" if set(texts) == {"-"} else "; ".join(texts))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def show(rows: list[dict[str, Any]], kinds: bool = False) -> None:
    """Print the table, and what is wrong; with ``kinds`` also the table of kinds, in 1e-3."""
    print("\n".join([*table(rows), *(["", *by_kind(rows)] if kinds else [])]))
    for r in rows:
        if r.get("bad"):
            told(r)


def told(row: dict[str, Any]) -> None:
    """Print a row that is wrong."""
    where = {k: v for k, v in row.items() if k not in ("bad", "cases", "over", "rows", "refused")}
    print("WRONG", where, row["bad"][:4], flush=True)
