"""What a call costs per bucket of rows: a line per bits and rows, measured, else estimated.

    microseconds = fixed + megabytes of weights * per_megabyte

``h100.json`` holds the two numbers for capability 9.0 as measured by
benchmarks/gpu_kernels_cuda.py; other devices get them scaled by a guess of their bandwidth. More
rows than 16 run in slices of 16.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from quant_kernels_cuda.variant import Variant

__all__ = ["BUCKETS", "bucket_costs"]

BUCKETS = (1, 2, 4, 8, 16)
_SLICED = (32, 64, 128, 256, 1024, 4096)
_SLOWER = {"8.0": 1.7, "8.6": 4.0, "8.9": 3.2, "9.0": 1.0, "10.0": 0.5}  # bandwidth against H100


@functools.cache
def _table() -> dict[str, dict[str, tuple[float, float]]]:
    file = Path(__file__).parent / "h100.json"
    held: dict[str, dict[str, tuple[float, float]]] = json.loads(file.read_text("utf-8"))["lines"]
    return held


def bucket_costs(v: Variant, capability: str) -> tuple[tuple[int, float], ...]:
    """(largest rows of the bucket, microseconds), ascending; see ``Accepted.costs``."""
    lines = _table()[str(v.bits)]
    slower = _SLOWER.get(capability, 3.0)
    megabytes = v.weight_bytes / 1e6
    out = []
    for rows in BUCKETS:
        fixed, per = lines[str(rows)]
        # every row of experts may read an expert of its own
        read = megabytes * (min(rows, v.experts) if v.op == "grouped_linear" else 1)
        us = round(fixed + read * per * slower, 2)
        out.append((rows, max(us, out[-1][1] if out else us)))  # never cheaper with more rows
    whole = out[-1][1]
    if v.op == "grouped_linear":
        fixed, per = lines["1"]
        # re-read from L2 once each expert has been met
        for rows in _SLICED:
            read = megabytes * (min(rows, v.experts) + 0.5 * max(0, rows - v.experts))
            out.append((rows, round(fixed + read * per * slower, 2)))
        return tuple(out)
    return (*out, *((rows, round(whole * rows / 16, 2)) for rows in _SLICED))
