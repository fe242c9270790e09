"""Reordered and padded columns: ``gather`` makes any assignment of columns to groups plain.

A gather lists, for every stored column, the input feature it multiplies (-1 = none: padding).
With it the columns of one group always lie together, whatever the order of the input:

    group of column    1 0 0 1 0 1 1 0          (act-order: columns stay, groups are scattered)
    stored columns     1 2 4 7 | 0 3 5 6        gather; scales stay one per run of 4
    ragged             1 2 4 - | 0 3 5 6        a short group is filled up with -1
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.rewrites.codes import take_columns
from quant_core.rewrites.grains import map_levels, with_grains
from quant_core.rewrites.refuse import refuse
from quant_core.spec import Scale
from quant_core.tensors import QuantizedTensor

__all__ = ["drop_gather", "from_gather", "runs_of_groups", "select_columns", "to_gather"]


def runs_of_groups(
    group_of_column: Tensor, size: int, groups: int, *, keep_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Columns sorted stably by group, each group filled up to whole runs of ``size``.

    Returns:
        column int64 [K'] (-1 = padding; none at the very end, where a short run needs none) and
        the group of each run int64 [ceil(K' / size)]. A group without columns has no run, or
        with ``keep_empty`` one of padding.
    """
    device = group_of_column.device
    counts = torch.bincount(group_of_column, minlength=groups)
    runs = -(-counts // size)
    if keep_empty:
        runs = runs.clamp(min=1)
    order = torch.argsort(group_of_column, stable=True)
    sorted_groups = group_of_column[order]
    first = torch.cumsum(counts, 0) - counts  # of each group, among the sorted columns
    first_slot = (torch.cumsum(runs, 0) - runs) * size
    within = torch.arange(len(order), device=device) - first[sorted_groups]
    column = torch.full((int(runs.sum()) * size,), -1, dtype=torch.int64, device=device)
    column[first_slot[sorted_groups] + within] = order
    last = int((column[-size:] >= 0).sum())
    if last:
        column = column[: len(column) - size + last]
    return column, torch.repeat_interleave(torch.arange(groups, device=device), runs)


def select_columns(qt: QuantizedTensor, index: Tensor, size: int) -> QuantizedTensor:
    """Stored column j of the result is column ``index[j]`` of ``qt`` (-1: padding). Exact.

    Every run of ``size`` new columns must come from one group of each level; levels with a column
    grain get the grain ``size`` (a level per column keeps 1). Gather and shape follow.

    Args:
        index: int64 [K'], for a stack also [E, K']; the last run may be short.
    """
    k_new = index.shape[-1]
    filled = torch.nn.functional.pad(index, (0, -k_new % size), value=-1)
    group_column = filled.unflatten(-1, (-1, size)).amax(dim=-1).clamp(min=0)

    def columns_of(t: Tensor, old: Scale) -> Tensor:
        c = old.grain[1]
        if c == 0:
            return t
        if c == 1:
            return _take(t, index.clamp(min=0))
        return _take(t, group_column // c)

    spec = with_grains(qt.spec, lambda s: (s.grain[0], size if s.grain[1] > 1 else s.grain[1]))
    gather = index.to(torch.int32) if qt.gather is None else _gather_of(qt.gather, index)
    return replace(
        qt,
        spec=replace(spec, gather=True),
        shape=(*qt.shape[:-1], k_new),
        codes=take_columns(qt, index),
        gather=gather,
        **map_levels(qt, columns_of),  # type: ignore[arg-type]
    )


def _take(t: Tensor, at: Tensor) -> Tensor:
    """Columns ``at`` of a grid [.., R, C]; ``at`` may have an expert axis of its own."""
    if at.dim() == 1:
        return t.index_select(-1, at)
    return t.gather(-1, at.unsqueeze(-2).expand(*t.shape[:-1], at.shape[-1]))


def _gather_of(gather: Tensor, index: Tensor) -> Tensor:
    """Input feature of every new column: gather[index], -1 where index is -1."""
    if index.dim() > gather.dim():
        gather = gather.expand(index.shape[0], -1)
    elif gather.dim() > index.dim():
        index = index.expand(gather.shape[0], -1)
    return gather.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1)


def _check_plain(qt: QuantizedTensor, what: str, size: int) -> None:
    if qt.spec.blocks or len(qt.shape) != 2:
        raise refuse(
            "REPRESENT",
            f"{what}: needs one matrix of plain codes, found {qt.spec.label!r} of shape "
            f"{qt.shape}. Rewrite each expert before stacking.",
            actual=qt.shape,
        )
    bad = [s.grain for s in qt.spec.scales if s.grain[1] not in (0, size)]
    if qt.spec.zero is not None:
        bad += [s.grain for s in qt.spec.zero.levels if s.grain[1] not in (0, size)]
    if bad:
        raise refuse(
            "GROUP",
            f"{what}: levels have grains {bad}, expected {size} or a whole axis along K. "
            "Groups of several sizes cannot follow one column order.",
            expected=size,
            actual=bad,
        )


def to_gather(qt: QuantizedTensor, group_of_column: Tensor, group_size: int) -> QuantizedTensor:
    """Columns in input order with any group each, as columns sorted by group. Exact.

    The sort is stable; a group of fewer than ``group_size`` columns is filled up with -1, one of
    more is split into several that repeat its scales; a group without columns keeps its scales,
    in a run of padding, so that ``from_gather`` is exact. Use ``drop_gather`` to find out that
    the order was plain.

    Args:
        qt: codes [N, K] in input order, no gather; levels of column grain ``group_size`` hold one
            column per GROUP, [.., G] for any G.
        group_of_column: [K] integer, 0 <= value < G.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` if an index is out of range or levels differ in grain,
            ``Q-LAYOUT-REPRESENT`` for stacks, opaque blocks, or a tensor that has a gather.
    """
    _check_plain(qt, "to_gather", group_size)
    if qt.gather is not None:
        raise refuse(
            "REPRESENT",
            "to_gather: the columns already have a gather, expected them in input order. "
            "Undo it with from_gather first.",
        )
    grouped = [(t, s) for t, s in zip(qt.scales, qt.spec.scales) if s.grain[1]]
    if qt.spec.zero is not None:
        grouped += [(t, s) for t, s in zip(qt.offset, qt.spec.zero.levels) if s.grain[1]]
    groups = {t.shape[-1] for t, _ in grouped}
    at = group_of_column.to(torch.int64)
    low, high = (int(at.min()), int(at.max())) if at.numel() else (0, -1)
    if len(groups) != 1 or at.shape != (qt.shape[-1],) or low < 0 or high >= min(groups):
        raise refuse(
            "GROUP",
            f"to_gather: groups {low}..{high} of {tuple(at.shape)} columns, expected one of "
            f"{sorted(groups)} groups for each of {qt.shape[-1]} columns. "
            "Check g_idx and group_size.",
            expected=(qt.shape[-1], sorted(groups)),
            actual=(tuple(at.shape), low, high),
        )
    column, group_of_run = runs_of_groups(at, group_size, min(groups), keep_empty=True)

    def by_run(t: Tensor, s: Scale) -> Tensor:
        return t.index_select(-1, group_of_run) if s.grain[1] else t

    return replace(
        qt,
        spec=replace(qt.spec, gather=True),
        shape=(qt.shape[0], len(column)),
        codes=take_columns(qt, column),
        gather=column.to(torch.int32),
        **map_levels(qt, by_run),  # type: ignore[arg-type]
    )


def from_gather(qt: QuantizedTensor, in_features: int) -> tuple[QuantizedTensor, Tensor]:
    """Codes in input order and the group of each column; inverse of ``to_gather``. Exact.

    Levels keep one column per run of stored columns; runs are numbered as they lie.

    Returns:
        A tensor without gather whose levels are indexed by the second value, int32
        [in_features]. Only if that is ``arange(K) // group_size`` may it be read as it is.

    Raises:
        LayoutError: ``Q-LAYOUT-GROUP`` for levels of several grains along K,
            ``Q-LAYOUT-REPRESENT`` unless every input feature has exactly one stored column.
    """
    grains = {s.grain[1] for s in qt.spec.scales} - {0}
    size = max(grains, default=0)
    _check_plain(qt, "from_gather", size)
    gather = torch.arange(qt.shape[-1]) if qt.gather is None else qt.gather.long()
    used = (gather >= 0).nonzero().flatten()
    features = gather[used]
    if not torch.equal(features.sort().values, torch.arange(in_features)):
        raise refuse(
            "REPRESENT",
            f"from_gather: {len(used)} stored columns do not hold each of {in_features} input "
            "features once. Give the in_features of the layer.",
            expected=in_features,
            actual=len(used),
        )
    column = torch.empty(in_features, dtype=torch.int64)
    column[features] = used
    out = replace(
        qt,
        spec=replace(qt.spec, gather=False),
        shape=(qt.shape[0], in_features),
        codes=take_columns(qt, column),
        gather=None,
    )
    return out, (column // max(size, 1)).to(torch.int32)


def drop_gather(qt: QuantizedTensor) -> QuantizedTensor:
    """Without its gather where that is the identity, else ``qt`` itself. Exact.

    Padding behind the last input feature is cut off: a short last group needs none.
    """
    if qt.gather is None:
        return qt
    rows = qt.gather if qt.gather.dim() == 2 else qt.gather.unsqueeze(0)
    k = int((rows[0] >= 0).sum())
    plain = torch.arange(k, dtype=rows.dtype, device=rows.device)
    if not bool((rows[:, :k] == plain).all()) or bool((rows[:, k:] >= 0).any()):
        return qt
    from quant_core.rewrites.cut import slice_stored

    spec = replace(qt.spec, gather=False)
    return replace(slice_stored(qt, 0, k), spec=spec, gather=None)
