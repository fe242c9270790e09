"""Which kernels a CUDA graph of a decode step runs, and how much of its time each takes.

Kernels may overlap (programmatic dependent launch), so their own durations add up to more than
the step. What is charged to a kernel is the time by which it moves the end of all work so far;
that adds up to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["charged", "kernels_of", "table"]


def kernels_of(graph: Any, replays: int = 3) -> list[tuple[str, float, float]]:
    """(name, start, end in microseconds) of the kernels of ``replays`` replays, by start."""
    from torch.profiler import ProfilerActivity, profile

    graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = prof.profiler.kineto_results.events()
    found = [
        (e.name(), e.start_ns() / 1e3, (e.start_ns() + e.duration_ns()) / 1e3)
        for e in events
        if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()
    ]
    return sorted(found, key=lambda e: e[1])


def _short(name: str) -> str:
    name = re.sub(r"<.*", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return re.sub(r"\(.*", "", name)[:60]


def charged(
    events: Sequence[tuple[str, float, float]], replays: int, layers: int
) -> list[dict[str, Any]]:
    """A row per kernel: launches a layer, microseconds a layer by which it delays the end."""
    rows: dict[str, list[float]] = {}
    end = events[0][1]
    for name, start, stop in events:
        row = rows.setdefault(_short(name), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += max(0.0, stop - end)
        row[2] += stop - start
        end = max(end, stop)
    per = replays * layers
    made = [
        {"kernel": k, "launches": n / per, "us": moved / per, "own_us": own / n}
        for k, (n, moved, own) in rows.items()
    ]
    return sorted(made, key=lambda r: -r["us"])


def table(rows: Sequence[dict[str, Any]], least: float = 0.05) -> str:
    """Markdown; rows under ``least`` microseconds a layer are left out."""
    lines = ["| kernel | launches a layer | us a layer | us itself |", "|---|---|---|---|"]
    for r in rows:
        if r["us"] >= least:
            numbers = f"{r['launches']:.2f} | {r['us']:.2f} | {r['own_us']:.1f}"
            lines.append(f"| `{r['kernel']}` | {numbers} |")
    lines.append(f"| all | {sum(r['launches'] for r in rows):.1f} "
                 f"| {sum(r['us'] for r in rows):.1f} | |")  # fmt: skip
    return "\n".join(lines)
