"""Schedules of experts in Triton's interpreter against plain torch ops."""

from __future__ import annotations

import pytest
import torch

from quant_kernels_triton.plain_run import expert_blocks
from quant_kernels_triton.schedule_run import (
    clear_rows,
    combined,
    each_alone,
    gathered_rows,
    routed,
    sorted_blocks,
)


@pytest.mark.parametrize(
    ("rows", "experts", "bm"), [(1, 5, 16), (7, 5, 16), (300, 8, 64), (1500, 128, 32)]
)
def test_schedule_equals_sorting_by_torch(rows, experts, bm):
    index = torch.randint(-1, experts + 1, (rows,))
    order, owner, bounds = sorted_blocks(index, experts, bm)
    known = torch.where((index >= 0) & (index < experts), index, experts)
    assert torch.equal(order.long(), known.argsort(stable=True))
    live = owner >= 0
    covered = torch.cat([torch.arange(a, b) for a, b in bounds[live].tolist()] or [order[:0]])
    assert torch.equal(covered, torch.arange(int((known < experts).sum())))
    for e, (a, b) in zip(owner[live].tolist(), bounds[live].tolist(), strict=True):
        assert 0 < b - a <= bm
        assert (known[order[a:b].long()] == e).all()
    assert not bounds[~live].any()


@pytest.mark.parametrize("rows", [3, 200])
def test_blocks_of_the_plain_kernels_say_the_same(rows):
    index = torch.randint(-1, 6, (rows,))
    for ours, theirs in zip(sorted_blocks(index, 5, 16), expert_blocks(index, 5, 16), strict=True):
        live = ours.any(-1) if ours.dim() == 2 else slice(None)
        assert torch.equal(ours[live], theirs[live])


def test_rows_of_no_expert_are_cleared_and_others_are_not():
    index = torch.tensor([0, -1, 4, 5, 2])
    y = torch.full((5, 40), 7.0)
    clear_rows(index, y, 5)
    assert torch.equal(y.eq(0).all(1), torch.tensor([False, True, False, True, False]))
    assert (y[[0, 2, 4]] == 7).all()


def test_rows_alone_keep_their_places():
    order, owner, bounds = each_alone(torch.tensor([3, 9, 0]), 5)
    assert order.tolist() == [0, 1, 2]
    assert owner.tolist() == [3, -1, 0]
    assert bounds.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_one_expert_for_all_rows_and_none_for_any():
    for value, blocks in ((2, 4), (9, 0)):
        _, owner, _ = sorted_blocks(torch.full((60,), value), 5, 16)
        assert int((owner >= 0).sum()) == blocks


@pytest.mark.parametrize(
    ("rows", "experts", "bm"), [(1, 5, 16), (130, 8, 64), (1500, 128, 32), (9000, 5, 64)]
)
def test_routing_counts_rows_and_blocks(rows, experts, bm):
    index = torch.randint(-1, experts + 1, (rows,))
    r = routed(index, experts, bm)
    known = torch.where((index >= 0) & (index < experts), index, experts)
    counts = torch.bincount(known, minlength=experts + 1)
    assert torch.equal(r.counts.long(), counts)
    assert int(r.blocks) == int((-(-counts[:experts] // bm)).sum()) == int((r.expert >= 0).sum())
    assert all(t.data_ptr() % 16 == 0 for t in (r.order, r.expert, r.bounds, r.counts, r.blocks))


@pytest.mark.parametrize(("top", "k"), [(1, 40), (3, 96)])
def test_rows_are_gathered_by_expert_each_so_often_as_it_is_routed(top, k):
    index = torch.randint(-1, 6, (50, top))
    x = torch.randn(50, k)
    r = routed(index.reshape(-1), 5, 16)
    held = 50 * top - int(r.counts[5])
    want = x.repeat_interleave(top, dim=0)[r.order[:held].long()]
    assert torch.equal(gathered_rows(x, r, top)[:held], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_token_are_weighted_and_added(dtype):
    y, weights = torch.randn(7 * 3, 520).to(dtype), torch.rand(7, 3)
    want = (y.double().view(7, 3, 520) * weights.double()[..., None]).sum(1)
    got = combined(y, weights).double()
    # products and sums of float32, one rounding to the dtype
    assert (got - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    assert combined(y[:0], weights[:0]).shape == (0, 520)
