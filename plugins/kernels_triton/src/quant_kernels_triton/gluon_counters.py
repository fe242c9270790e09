"""Zeroed counters for programs that add up each other's sums; a launch leaves them at zero.

Eager calls of one stream follow each other and share the stream's counters. Launches in CUDA graphs
get counters of their own, since graphs may be replayed at the same time on several streams. Nothing
can be zeroed while a graph is captured without becoming a part of it, so they are cut from a supply
that the first eager call makes. A supply that is used up begins again: a launch then shares with
one captured ``_SUPPLY`` counters earlier (some thousand launches).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.kernels.calls import planned

__all__ = ["MOST", "counters"]

MOST = 1 << 16
"""Most counters of a launch."""

_SUPPLY = 1 << 20  # of the graphs of a device: 4 MiB
_ALIGN = 32  # counters: 128 bytes
_streams: dict[tuple[int, int], Tensor] = {}
_supplies: dict[int, Tensor] = {}
_used: dict[int, int] = {}


def _cut(device: int, count: int) -> Tensor | None:
    """The next ``count`` counters of the supply."""
    supply = _supplies.get(device)
    if supply is None:
        return None
    count += -count % _ALIGN
    at = _used.get(device, 0)
    if at + count > supply.numel():
        at = 0
    _used[device] = at + count
    return supply[at : at + count]


def counters(device: int, count: int) -> Tensor | None:
    """At least ``count`` counters for one launch; None if they cannot be had now."""
    found = _counters(device, count)
    if found is not None and told is not None:
        told(found.data_ptr(), count)
    return found


told: Callable[[int, int], None] | None = None
"""Is told the address and the number of counters that are given out."""


def _counters(device: int, count: int) -> Tensor | None:
    if count > MOST:
        return None
    if planned.jobs is not None:
        return torch.empty(count, dtype=torch.int32, device="meta")
    if torch.cuda.is_current_stream_capturing():
        return _cut(device, count)
    stream = torch._C._cuda_getCurrentRawStream(device)
    held = _streams.get((device, stream))
    if held is None:
        held = torch.zeros(MOST, dtype=torch.int32, device=f"cuda:{device}")
        _streams[device, stream] = held
        if device not in _supplies:
            _supplies[device] = torch.zeros(_SUPPLY, dtype=torch.int32, device=f"cuda:{device}")
    return held
