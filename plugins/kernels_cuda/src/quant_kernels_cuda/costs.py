"""What a call costs per bucket of rows: the chosen cut's estimate, times a measured factor.

The estimate (schedule.py) knows the shape, so layers that nobody measured are ranked too. What it
does not know, how much arithmetic a kind of weight takes, is the factor: ``h100.json`` holds it per
kind and rows, the geometric mean over the measured layers. Other devices get the same numbers,
slowed by a guess of their bandwidth.

A row of experts may read an expert of its own. There

    microseconds = fixed + megabytes of weights * per_megabyte

within 16 % of what was measured of int4 at 1, 4 and 16 tokens, 8 x 4096 x 14336 (two experts each)
and 128 x 2048 x 1536 (eight): benchmarks/results/gpu-h100-2026-11-22.md.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from quant_kernels_cuda.schedule import BUCKETS, MAX_ROWS, best
from quant_kernels_cuda.variant import Variant

__all__ = ["bucket_costs"]

_SLICED = (32, 64, 128, 256, 1024, 4096)
_SLOWER = {"8.0": 1.7, "8.6": 4.0, "8.9": 3.2, "9.0": 1.0, "10.0": 0.5}  # bandwidth against H100
# multiprocessors, shared memory, clusters of 2 to 8 blocks (driver.device_limits)
_HOPPER = (132, 232448, (66, 39, 30, 22, 17, 15, 15))
_AMPERE = (108, 163 << 10, ())
_START_US = 2.5  # of a call, whatever it reads
_ENDS_US, _LONG_US = 1.0, 12.0  # start and end of a short call, which no work hides


@functools.cache
def _table() -> dict[str, Any]:
    held: dict[str, Any] = json.loads((Path(__file__).parent / "h100.json").read_text("utf-8"))
    return held


def _kind(v: Variant) -> str:
    """Kinds of weights that take about the same arithmetic: a key of the table."""
    if v.xsums:
        return "offset" if v.bits != 8 else "8"
    is_float = dict(v.defines)["FLOAT_CODES"] == "1"
    return "fp4" if is_float and v.bits == 4 else str(v.bits)


@functools.lru_cache(maxsize=4096)
def bucket_costs(v: Variant, capability: str) -> tuple[tuple[int, float], ...]:
    """(largest rows of the bucket, microseconds), ascending; see ``Accepted.costs``."""
    if v.op == "grouped_linear":
        return _of_experts(v, _SLOWER.get(capability, 3.0))
    factors, slower = _table()["factors"][_kind(v)], _SLOWER.get(capability, 3.0)
    limits = _HOPPER if capability >= "9" or capability.startswith("1") else _AMPERE
    out: list[tuple[int, float]] = []
    for rows in BUCKETS:
        estimate, s = best(v, rows, *limits)
        us = estimate * factors[str(rows)]
        us += _ENDS_US * max(0.0, 1 - us / _LONG_US)
        us = (us - _START_US) * slower + _START_US
        us *= -(-rows // s.m)
        out.append((rows, max(us, out[-1][1] if out else us)))  # never cheaper with more rows
    whole = out[-1][1]
    out += [(rows, whole * rows / MAX_ROWS) for rows in _SLICED]
    return tuple((rows, round(us, 2)) for rows, us in out)


def _of_experts(v: Variant, slower: float) -> tuple[tuple[int, float], ...]:
    fixed, per = _table()["experts"][str(v.bits)]
    megabytes = v.weight_bytes / 1e6
    out = []
    for rows in (*BUCKETS, *_SLICED):
        # rows meet so many experts if each picks by chance; an expert met again is read from L2
        met = v.experts * (1 - (1 - 1 / v.experts) ** rows)
        read = megabytes * (met + 0.5 * (rows - met))
        out.append((rows, round(fixed + read * per * slower, 2)))
    return tuple(out)
