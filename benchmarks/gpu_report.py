"""The figures of ``benchmarks/gpu.py`` as Markdown and as SVG pictures.

    python benchmarks/gpu_report.py out.json --goals --layer 4096x28672 --markdown out.md
    python benchmarks/gpu_report.py out.json --svg folder --shapes 4096x28672

``--goals`` and ``--layer`` print the tables of docs/performance.md: what was asked for and what was
reached; and of one layer the picks, with humming and bf16 beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpu_goals import BASE, table

__all__ = ["layer", "markdown", "svg"]

_COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8d6a9f", "#b08900", "#3d3d3d", "#4aa3a2", "#a04668")


def _groups(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """(scheme, shape) -> records, each with its ratio to bf16."""
    base = {(r["scheme"], r["shape"], r["rows"]): r["us"] for r in records if r["who"] == BASE}
    out: dict[tuple[str, str], list[Any]] = {}
    for r in records:
        of = base.get((r["scheme"], r["shape"], r["rows"]))
        if of is not None:
            out.setdefault((r["scheme"], r["shape"]), []).append({**r, "ratio": of / r["us"]})
    return out


def markdown(data: Mapping[str, Any]) -> str:
    """The goals, then a table per scheme and shape: microseconds per number of rows."""
    goals = table(data["records"])
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    lines = [f"{data['device']}, {versions}, {data['date']}. Microseconds per call; **bold**: the "
             "plan's choice; (x): time of bf16 over the chosen one's.", "", goals, ""]  # fmt: skip
    for (scheme, shape), records in _groups(data["records"]).items():
        rows = sorted({r["rows"] for r in records})
        names = list(dict.fromkeys(r["who"] for r in records))
        names.sort(key=lambda w: (w != BASE, w))
        lines += [f"### {scheme}, {shape}", "",
                  "| kernel | " + " | ".join(f"M={m}" for m in rows) + " | error |",
                  "|---|" + "---|" * (len(rows) + 1)]  # fmt: skip
        by = {(r["who"], r["rows"]): r for r in records}
        for who in names:
            cells = []
            for m in rows:
                r = by.get((who, m))
                if r is None:
                    cells.append("-")
                    continue
                text = _us(r["us"])
                cells.append(f"**{text}** ({r['ratio']:.2f}x)" if r["chosen"] else text)
            errors = [by[who, m]["error"] for m in rows if by.get((who, m), {}).get("error")]
            cells.append(f"{max(errors):.1e}" if errors else "")
            lines.append(f"| {who} | " + " | ".join(cells) + " |")
        lines.append("")
    hosts: dict[str, list[float]] = {}
    for r in data["records"]:
        if r.get("host_us") and r["rows"] == 1:
            hosts.setdefault(r["who"], []).append(r["host_us"])
    if hosts:
        told = ", ".join(f"{who} {median(us):.0f}" for who, us in hosts.items())
        lines += [f"Host cost of one eager call, M=1, median of layers (us): {told}.", ""]
    for who in dict.fromkeys(r["who"] for r in data["records"]):
        mine = [r["graph"] for r in data["records"] if r["who"] == who]
        if not all(mine):
            lines.append(
                f"- {who}: a graph's replay differs from the eager call at "
                f"{mine.count(False)} of {len(mine)} points"
            )
    for p in data["problems"]:
        lines.append(f"- {p['where']}: {p['error'][:300]}")
    return "\n".join(lines)


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def layer(data: Mapping[str, Any], shape: str) -> str:
    """A table of one layer: per scheme what the plan picks, and humming's time; bf16 once."""
    mine = [r for r in data["records"] if r["shape"] == shape]
    schemes = list(dict.fromkeys(r["scheme"] for r in mine))
    common = set.intersection(*({r["rows"] for r in mine if r["scheme"] == s} for s in schemes))
    rows = sorted(common)
    by = {(r["scheme"], r["who"], r["rows"]): r for r in mine}
    chosen = {(r["scheme"], r["rows"]): r for r in mine if r["chosen"]}

    def line(name: str, found: Sequence[Mapping[str, Any] | None]) -> str:
        cells = [_us(r["us"]) if r else "" for r in found]
        errors = [r["error"] for r in found if r and r["error"]]
        return f"| {name} | {' | '.join(cells)} | {f'{max(errors):.1e}' if errors else ''} |"

    bf16 = [next((r for r in mine if r["who"] == BASE and r["rows"] == m), None) for m in rows]
    out = [f"| {shape} | {' | '.join(f'M={m}' for m in rows)} | error |",
           "|---|" + "---|" * (len(rows) + 1),
           line("bf16", [r and {**r, "error": None} for r in bf16])]  # fmt: skip
    for s in schemes:
        picks = [chosen.get((s, m)) for m in rows]
        names = dict.fromkeys(r["who"] for r in picks if r)
        out.append(line(f"**{s}**: {', '.join(f'`{n}`' for n in names)}", picks))
        for who in ("humming", "humming experts"):
            found = [by.get((s, who, m)) for m in rows]
            if any(found):
                out.append(line(who, found))
    return "\n".join(out)


def svg(records: Sequence[Mapping[str, Any]], title: str) -> str:
    """Speed against bf16 over the number of rows, both axes logarithmic, one line per kernel."""
    rows = sorted({r["rows"] for r in records})
    names = sorted({r["who"] for r in records})
    left, top, width, height = 60, 40, 640, 320
    ratios = [r["ratio"] for r in records]
    low, high = min(*ratios, 0.5) * 0.9, max(*ratios, 2.0) * 1.1

    def at(m: int, ratio: float) -> tuple[float, float]:
        x = math.log(m / rows[0]) / max(math.log(rows[-1] / rows[0]), 1e-9)
        y = math.log(ratio / low) / math.log(high / low)
        return left + x * width, top + height - y * height

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 200}" '
           f'height="{top + height + 60}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="22" font-size="15">{title}: over bf16</text>']  # fmt: skip
    for m in rows:
        x, y = at(m, low)
        out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        out.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{m}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + height + 40}">rows of x</text>')
    for ratio in (0.25, 0.5, 1, 2, 3, 4, 6):
        if low <= ratio <= high:
            x, y = at(rows[-1], ratio)
            dark = "#999" if ratio == 1 else "#eee"
            out.append(
                f'<line x1="{left}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{dark}"/>'
            )
            out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{ratio}x</text>')
    for i, who in enumerate(names):
        colour = _COLOURS[i % len(_COLOURS)]
        mine = sorted((r for r in records if r["who"] == who), key=lambda r: r["rows"])
        points = [at(r["rows"], r["ratio"]) for r in mine]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for r, (x, y) in zip(mine, points, strict=True):
            if r["chosen"]:
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        y = top + 14 * i + 10
        out.append(f'<text x="{left + width + 12}" y="{y}" fill="{colour}">{who}</text>')
    return "\n".join([*out, "</svg>"])


def main() -> None:
    """Write the reports of one result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--goals", action="store_true", help="print the table of goals")
    parser.add_argument("--layer", action="append", default=[], metavar="KxN")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--svg", type=Path, help="folder, one picture per scheme and shape")
    parser.add_argument("--shapes", default="", help="pictures of these only")
    args = parser.parse_args()
    data = json.loads(args.json.read_text())
    if args.goals:
        print(table(data["records"]))
    for shape in args.layer:
        print(layer(data, shape), end="\n\n")
    if args.markdown:
        args.markdown.write_text(markdown(data))
    if args.svg:
        args.svg.mkdir(parents=True, exist_ok=True)
        for (scheme, shape), records in _groups(data["records"]).items():
            if args.shapes and shape not in args.shapes.split(","):
                continue
            file = args.svg / f"gpu-{scheme}-{shape}.svg"
            file.write_text(svg(records, f"{scheme}, {shape}"))


if __name__ == "__main__":
    main()
