"""Activation order: columns sorted by group, and back.

``g_idx`` gives the group of each input feature, in any order. The canonical form wants a group to
be a run of group_size columns, so columns are sorted by group (stable) and ``gather`` names the
input feature of each:

    g_idx   1 0 1 0 0        group_size 2, two groups of 3 and 2 columns
    gather  1 3 | 4 -1 | 0 2     group 0 was over-full: two canonical groups, the second padded
    owner    0      0      1     stored group of each canonical group

A last short group needs no padding. Source of the meaning of g_idx: GPTQModel 7.7.0
``quantization/gptq.py``, ``nn_modules/qlinear/__init__.py`` (dequantize_weight).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.intspec import cannot_hold
from quant_core.packing import pack, packed_shape, repack, unpack
from quant_core.spec import Packing

__all__ = ["cannot", "g_idx_of", "gather_of", "reorder"]

_BLOCK_BYTES = 64 << 20  # bytes of unpacked codes held at once


def cannot(where: str, found: str, expected: str) -> LayoutError:
    """The error of everything that GPTQ has no way to store."""
    return cannot_hold(where, found, "GPTQ", expected, plugin="gptq")


def _bad_g_idx(where: str, found: str, expected: str, actual: object) -> LayoutError:
    return LayoutError(
        f"{where}: g_idx {found}, expected {expected}. "
        "The tensor is damaged or belongs to another layer; export the checkpoint again.",
        code="Q-VALUE-GIDX",
        tensor=f"{where}.g_idx",
        expected=expected,
        actual=actual,
        plugin="gptq",
    )


@functools.lru_cache(maxsize=64)
def _in_order(k: int, group_size: int) -> Tensor:
    """The g_idx of columns in order."""
    return torch.arange(k, dtype=torch.int32, device="cpu") // group_size


def in_order(g_idx: Tensor, group_size: int, groups: int) -> bool:
    """Whether column k is of group k // group_size, of which there are enough."""
    k = g_idx.numel()
    return groups >= -(-k // group_size) and torch.equal(g_idx, _in_order(k, group_size))


def gather_of(
    g_idx: Tensor, group_size: int, groups: int, *, ordered: bool, where: str
) -> tuple[Tensor, Tensor] | None:
    """Column order that makes groups contiguous; None if they already are.

    Args:
        g_idx: int32 (K,), group of each input feature.
        groups: number of stored groups G.
        ordered: the config says that columns are in order; anything else is an error then.

    Returns:
        gather int32 (K',): input feature of each column, -1 = padding; and the stored group of
        each canonical group, int64 (ceil(K' / group_size),).

    Raises:
        LayoutError: ``Q-VALUE-GIDX`` if a value is no group, a group has no column, or columns
            are out of order where they must not be; ``Q-LAYOUT-GROUP`` for another group size.
    """
    k = g_idx.numel()
    if in_order(g_idx, group_size, groups):
        return None
    index = g_idx.to(torch.int64)
    bad = ((index < 0) | (index >= groups)).nonzero().flatten()
    if bad.numel():
        at = int(bad[0])
        found = f"has {bad.numel()} values out of range (index {at}: {int(index[at])})"
        raise _bad_g_idx(where, found, f"0..{groups - 1}", int(index[at]))
    positions = torch.arange(k)
    if ordered:
        if k % groups == 0 and torch.equal(index, positions // (k // groups)):
            raise LayoutError(
                f"{where}: g_idx has groups of {k // groups} columns, expected "
                f"group_size={group_size} for in_features={k}. Correct group_size in the config.",
                code="Q-LAYOUT-GROUP",
                tensor=f"{where}.g_idx",
                expected=group_size,
                actual=k // groups,
                plugin="gptq",
            )
        at = int((index != positions // group_size).nonzero()[0])
        found = f"puts column {at} in group {int(index[at])} although desc_act is false"
        raise _bad_g_idx(where, found, f"k // {group_size}", int(index[at]))
    counts = torch.bincount(index, minlength=groups)
    if empty := int((counts == 0).sum()):
        raise _bad_g_idx(where, f"leaves {empty} groups without a column", "all groups used", empty)
    order = torch.argsort(index, stable=True)
    parts = -(-counts // group_size)  # canonical groups per stored group
    owner = torch.repeat_interleave(torch.arange(groups), parts)
    before = torch.cumsum(counts, 0) - counts
    start = (torch.cumsum(parts, 0) - parts) * group_size
    sorted_groups = index[order]
    slot = start[sorted_groups] + positions - before[sorted_groups]
    if torch.equal(slot, positions):  # full groups, perhaps a short last one: no padding
        return order.to(torch.int32), owner
    gather = torch.full((len(owner) * group_size,), -1, dtype=torch.int32)
    gather[slot] = order.to(torch.int32)
    return gather, owner


def g_idx_of(
    gather: Tensor | None, group_size: int, same: Tensor, k: int, groups: int, where: str
) -> Tensor:
    """Inverse of ``gather_of``.

    Args:
        same: bool (canonical groups,): the group has the scales and zeros of the one before.
        k: input features.
        groups: stored groups wanted.

    Returns:
        int32 (K,). The parts of a split group are joined again: a part starts above the last
        column of a full part with the same scales and zeros.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if features are missing or the groups do not join.
    """
    if gather is None:
        return torch.arange(k, dtype=torch.int32) // group_size
    padded = torch.nn.functional.pad(
        gather.to(torch.int64), (0, -len(gather) % group_size), value=-1
    )
    runs = padded.view(-1, group_size)
    owner = torch.arange(len(runs))
    if len(runs) != groups:
        full_before = (runs[:-1] >= 0).all(dim=1)
        joined = same[1:] & full_before & (runs[1:, 0] > runs[:-1, -1])
        owner[1:] = torch.cumsum(~joined, 0)
    keep = runs >= 0
    features = runs[keep]
    complete = torch.equal(features.sort().values, torch.arange(k))
    if not complete or int(owner[-1]) + 1 != groups:
        raise cannot(
            where,
            f"{int(owner[-1]) + 1} groups over {len(features)} columns",
            f"{groups} groups that cover {k} input features once",
        )
    out = torch.empty(k, dtype=torch.int32)
    out[features] = owner[:, None].expand_as(runs)[keep].to(torch.int32)
    return out


def reorder(
    words: Tensor,
    bits: int,
    shape: tuple[int, int],
    old: Packing,
    columns: Tensor,
    new: Packing,
) -> Tensor:
    """Words with other columns: column j of the result is column ``columns[j]``, -1 = code 0.

    Shapes:  words of (N, K) in ``old``  ->  words of (N, len(columns)) in ``new``, a packing along
        K that is k_major; unpacked in row blocks of at most 64 MiB.
    """
    n, k = shape
    out = torch.empty(packed_shape((n, len(columns)), bits, new), dtype=torch.int32)
    words = repack(words, bits, shape, old, new)
    keep = columns >= 0
    index = columns.clamp(min=0).to(torch.int64)
    step = max(1, _BLOCK_BYTES // max(k, len(columns), 1))
    for start in range(0, n, step):
        stop = min(n, start + step)
        codes = unpack(words[:, start:stop], bits, (stop - start, k), new)[:, index] * keep
        out[:, start:stop] = pack(codes, bits, new)
    return out
