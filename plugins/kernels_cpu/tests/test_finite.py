"""Looking at floats where they lie, against ``torch.isfinite``."""

from __future__ import annotations

import pytest
import torch

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.finite import TorchFinite, all_finite, look_of
from quant_core.registry import registry
from quant_core.spec import OpSpec
from quant_kernels_cpu.finite import CpuFinite

OP = OpSpec(op="finite", operands=())
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ODD = (float("inf"), float("-inf"), float("nan"))


def _places(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """What is looked at, by name: memory with other bits that are no numbers, and views into it."""
    odd = torch.full((6, 70), float("nan"), dtype=dtype)
    return {
        "rows": (odd, [odd[:, 3:38]]),
        "by column": (odd, [odd.t()[2:9]]),
        "whole": (odd, [odd]),
        "turned": (odd, [odd.t()]),
        "in blocks": (odd, [odd[:, 1::10]]),
        "side by side": (odd, [odd[:, 0::10], odd[:, 1::10]]),
        "apart": (odd, [odd[:, 0::10], odd[:, 2::10]]),
        "one number": (odd, [odd[2:3, 5:6]]),
        "no matrix": (odd, [odd[1, 4:9]]),
        "nothing": (odd, [odd[:0]]),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", _places(torch.float32))
@pytest.mark.parametrize("look", [CpuFinite().bind(OP), TorchFinite().bind(OP)], ids=["c", "torch"])
def test_every_odd_value_is_seen_and_nothing_beside(look, place: str, dtype: torch.dtype) -> None:
    _, views = _places(dtype)[place]
    largest = torch.finfo(dtype).max
    for view in views:
        view.copy_(torch.randn(view.shape).clamp(-3, 3))
        if view.numel():
            view[..., 0] = -largest
    assert all(bool(torch.isfinite(v).all()) for v in views)
    assert look([], views) is True
    for view in views:
        for at in range(view.numel()):
            index = torch.unravel_index(torch.tensor(at), view.shape)
            kept, value = view[index].clone(), ODD[at % 3]
            view[index] = value
            assert look([], views) is False, (at, value)
            view[index] = kept
    assert look([], views) is True


def test_large_matrix_is_looked_at_by_all_threads() -> None:
    blocks = torch.zeros(4096, 10 * 128, dtype=torch.float16)
    views = [blocks[:, 0::10], blocks[:, 1::10]]
    run = CpuFinite().bind(OP)
    assert run([], views)
    for row, column in ((0, 0), (1000, 64), (4095, 127)):
        for view in views:
            view[row, column] = float("nan")
            assert not run([], views)
            view[row, column] = 1.0
    blocks[7, 5] = float("nan")  # codes that look like one
    assert run([], views)


@pytest.mark.parametrize("values", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 40, 144], ids="{} bytes".format)
def test_blocks_are_seen_wherever_a_thread_reads(block, dtype, values) -> None:
    """Eight places of 2 x 16 blocks, in turn, and 41 blocks that are left."""
    rows, columns = 27, 11
    size = block // dtype.itemsize
    memory = torch.full((rows, columns * size), float("nan"), dtype=dtype)
    views = [memory[:, i::size] for i in range(values)]
    run = CpuFinite().bind(OP)
    for view in views:
        view.fill_(1.0)
    assert run([], views)
    for view in views:
        for row in range(rows):
            for column in range(columns):
                view[row, column] = ODD[column % 3]
                assert not run([], views), (row, column)
                view[row, column] = 1.0
    assert run([], views)


def test_kernel_is_chosen_and_takes_nothing_else() -> None:
    assert isinstance(CpuFinite().accepts(OP), Accepted)
    other = OpSpec(op="finite", operands=(), device=("cuda", "9.0"))
    assert isinstance(CpuFinite().accepts(other), Rejected)
    assert isinstance(CpuFinite().accepts(OpSpec(op="gated", operands=())), Rejected)
    values = [torch.ones(3, 4, dtype=torch.float16)]
    assert look_of(registry())(values) is all_finite(values) is True
    values[0][2, 3] = float("nan")
    assert look_of(registry())(values) is all_finite(values) is False
