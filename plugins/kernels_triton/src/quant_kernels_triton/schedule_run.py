"""Running the kernels of ``schedule``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_kernels_triton import schedule as kernels
from quant_kernels_triton.launch import Build, aligned, launch

__all__ = ["clear_rows", "each_alone", "sorted_blocks"]


def sorted_blocks(index: Tensor, count: int, bm: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert, the expert of each block of ``bm`` rows, and its bounds.

    The same as ``plain_run.expert_blocks`` up to where blocks too many are, in one launch.
    """
    index, t = aligned(index), index.shape[0]
    most = min(t, -(-t // bm) + count)
    order = torch.empty(t, dtype=torch.int32, device=index.device)
    expert = torch.empty(most, dtype=torch.int32, device=index.device)
    bounds = torch.empty(most, 2, dtype=torch.int32, device=index.device)
    bins = 1 << (count + 1).bit_length()  # more than count + 1
    bt = 128 if t <= 128 else 1024

    def build() -> Build:
        fixed = {"E": count, "BINS": bins, "BM": bm, "BT": bt}
        return Build(constants=fixed, options={"num_warps": 4})

    args = (index, order, expert, bounds, t, most)
    key = ("schedule", index.dtype, count, bm, bt)
    launch(kernels.schedule, key, (count + 1, 1), args, index.device.index, build)
    return order, expert, bounds


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
