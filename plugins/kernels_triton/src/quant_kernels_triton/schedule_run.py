"""Running the kernels of ``schedule``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, aligned, launch

__all__ = [
    "Routing",
    "clear_rows",
    "combined",
    "each_alone",
    "gathered_rows",
    "routed",
    "sorted_blocks",
]

kernels = Jits("schedule")

_CHUNKS = ((128, 4), (1024, 4), (4096, 8), (8192, 16))
"""Rows that ``schedule`` goes over at once, and with how many warps."""

_MANY = 8192  # rows from which ``tally`` and ``place`` are quicker
_PIECE = 256  # rows of one of their programs


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows sorted by expert, in blocks; int32 on the device.

    Attributes:
        order: [T], rows of no expert last.
        expert, bounds: [B] and [B, 2], of each block; -1 where there are no more.
        counts: [E + 1], rows of each expert and of none.
        blocks: [1], how many there are.
    """

    order: Tensor
    expert: Tensor
    bounds: Tensor
    counts: Tensor
    blocks: Tensor


def routed(index: Tensor, count: int, bm: int) -> Routing:
    """The rows of each of ``count`` experts in blocks of ``bm``; in the order of the rows."""
    index, t, device = aligned(index), index.shape[0], index.device
    most = min(t, -(-t // bm) + count)
    sizes = [t, most, 2 * most, count + 1, 1]
    steps = [n + -n % 4 for n in sizes]  # addresses stay multiples of 16 bytes
    held = torch.empty(sum(steps), dtype=torch.int32, device=device).split(steps)
    order, expert, bounds, counts, blocks = (h[:n] for h, n in zip(held, sizes, strict=True))
    bins = 1 << (count + 1).bit_length()  # more than count + 1
    rest = (t, most, count, bm)
    if t > _MANY:
        _placed(index, (order, expert, bounds, counts, blocks), rest, bins)
    else:
        _scheduled(index, (order, expert, bounds, counts, blocks), rest, bins)
    return Routing(order, expert, bounds.view(most, 2), counts, blocks)


def _scheduled(
    index: Tensor, made: tuple[Tensor, ...], sizes: tuple[int, int, int, int], bins: int
) -> None:
    """The lists by one launch."""
    t, most, count, bm = sizes
    device = index.device
    arrived = None if device.type != "cuda" else counters(device.index, 1)
    if arrived is None:
        arrived = torch.zeros(1, dtype=torch.int32, device=device)
    bt, warps = next(b for b in _CHUNKS if t <= b[0] or b is _CHUNKS[-1])
    pdl = dependent(device.index)

    def build() -> Build:
        fixed = {"BINS": bins, "BT": bt, "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, warps, 1))

    args = (index, *made, arrived, t, most, count, bm)
    key = ("schedule", index.dtype, bins, bt)
    launch(kernels.schedule, key, (count + 1, 1), args, device.index, build)


def _placed(
    index: Tensor, made: tuple[Tensor, ...], sizes: tuple[int, int, int, int], bins: int
) -> None:
    """The lists of many rows by two launches, of a program for every piece of them."""
    t, most, count, bm = sizes
    pieces, pdl = -(-t // _PIECE), dependent(index.device.index)
    tallies = torch.empty(2, pieces, bins, dtype=torch.int32, device=index.device)

    def build_tally() -> Build:
        fixed = {"BINS": bins, "BT": _PIECE, "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, 4, 1))

    def build_place() -> Build:
        fixed = {"BINS": bins, "BT": _PIECE, "STEP": max(1, 8192 // bins), "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, 8, 1))

    device, key = index.device.index, (index.dtype, bins)
    launch(kernels.tally, ("tally", *key), (pieces, 1), (index, tallies[0], t, count), device,
           build_tally)  # fmt: skip
    launch(kernels.place, ("place", *key), (pieces + 1, 1),
           (index, *tallies, *made, t, most, count, bm), device, build_place)  # fmt: skip


def gathered_rows(x: Tensor, routing: Routing, top: int = 1) -> Tensor:
    """Rows of ``x`` by expert, ``top`` of each; behind those of some expert nothing is written."""
    x = aligned(x)
    k, experts = x.shape[1], routing.counts.shape[0] - 1
    t = routing.order.shape[0]
    out = x.new_empty(t, k)
    rows, pdl = 1 if t <= 4096 else 4, dependent(x.device.index)
    width = min(1 << (k - 1).bit_length(), 2048)

    def build() -> Build:
        fixed = {"BR": rows, "BK": width, "PDL": pdl}
        return Build(constants=fixed, options=options(pdl, 4, 1))

    args = (x, routing.order, routing.counts, out, t, k, top, experts)
    key = ("gather", x.dtype, k, rows)
    launch(kernels.gather, key, (-(-t // rows), 1), args, x.device.index, build)
    return out


def combined(y: Tensor, weights: Tensor) -> Tensor:
    """[T, N]: of every ``weights.shape[1]`` rows of y the sum, weighted; added in float32."""
    (t, top), n = weights.shape, y.shape[1]
    out, weights, pdl = y.new_empty(t, n), aligned(weights), dependent(y.device.index)
    if t:

        def build() -> Build:
            fixed = {"TOP": top, "BN": 512, "PDL": pdl}
            return Build(constants=fixed, options=options(pdl, 2, 1))

        key = ("combine", y.dtype, weights.dtype, n, top)
        grid = (t, -(-n // 512))
        launch(kernels.combine, key, grid, (aligned(y), weights, out, n), y.device.index, build)
    return out


def sorted_blocks(index: Tensor, count: int, bm: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, experts and bounds of ``routed``.

    The same as ``plain_run.expert_blocks`` up to where blocks too many are, in one launch.
    """
    r = routed(index, count, bm)
    return r.order, r.expert, r.bounds


@functools.lru_cache(maxsize=256)
def _singles(t: int, device: torch.device) -> tuple[Tensor, Tensor]:
    order = torch.arange(t, dtype=torch.int32, device=device)
    return order, torch.stack([order, order + 1], 1).contiguous()


def each_alone(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block for every row: no sorting, for fewer rows than share experts."""
    if torch.cuda.is_current_stream_capturing() if index.is_cuda else False:
        order = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
        bounds = torch.stack([order, order + 1], 1).contiguous()
    else:
        order, bounds = _singles(index.shape[0], index.device)
    known = (index >= 0) & (index < count)
    return order, torch.where(known, index, -1).int(), bounds


def clear_rows(index: Tensor, y: Tensor, count: int) -> None:
    """Zeros in the rows of y whose index is no expert's."""
    index, (t, n) = aligned(index), y.shape

    def build() -> Build:
        return Build(constants={"BT": 16, "BN": 1024}, options={"num_warps": 4})

    key = ("clear", index.dtype, y.dtype, n)
    grid = (-(-t // 16), 1)
    launch(kernels.clear, key, grid, (index, y, t, n, count), y.device.index, build)
