"""Cuts for tensor parallelism, made on the canonical form.

    slice_out   rows [start, stop): column-parallel layers, kv-head replication, vocabularies
    slice_in    input features [start, stop): row-parallel layers

A cut through a group is solved, not refused: the grid is made finer while the groups stay at least
``min_group`` wide, else the group is completed with padding columns (gather -1, times 0). Bias and
``acc_bias`` belong to the sum over all ranks: ``slice_in`` keeps them, and the caller drops them
(``dataclasses.replace(lt, bias=None, acc_bias=None)``) on all ranks but 0.
Results may share memory with their inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.rewrites.codes import slice_columns, slice_rows
from quant_core.rewrites.columns import runs_of_groups, select_columns
from quant_core.rewrites.grains import cut_grain, levels, map_levels, regrain_axis
from quant_core.rewrites.refuse import check_range, only_weight
from quant_core.rewrites.transforms import cut_transforms
from quant_core.spec import Scale
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["slice_in", "slice_out", "slice_rows_of", "slice_stored"]


def slice_rows_of(qt: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Rows [start, stop) of one operand. Exact; row blocks that are cut get a finer grain."""
    n = qt.shape[-2]
    check_range("slice_out", start, stop, n)
    qt = regrain_axis(qt, 0, lambda r: cut_grain(r, start))

    def rows(t: Tensor, s: Scale) -> Tensor:
        r = s.grain[0]
        return t if r == 0 else t.narrow(-2, start // r, -(-stop // r) - start // r)

    return replace(
        qt,
        shape=(*qt.shape[:-2], stop - start, qt.shape[-1]),
        codes=slice_rows(qt, start, stop),
        **map_levels(qt, rows),  # type: ignore[arg-type]
    )


def slice_out(lt: LayerTensors, start: int, stop: int) -> LayerTensors:
    """Output features [start, stop). Exact.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` for an empty range or a cut through an output transform.
    """
    weight = only_weight(lt, "slice_out")
    n = weight.shape[-2]

    def per_row(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.numel() == 1 else t[..., start:stop]

    return replace(
        lt,
        operands={"weight": slice_rows_of(weight, start, stop)},
        bias=None if lt.bias is None else lt.bias[..., start:stop],
        acc_bias=None if lt.acc_bias is None else lt.acc_bias[..., start:stop],
        out_scale=per_row(lt.out_scale),
        transforms=cut_transforms(lt.transforms, "output", start, stop, n),
    )


def slice_stored(qt: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Stored columns [start, stop). Exact; ``start`` must lie on a line of every level's grid."""

    def columns(t: Tensor, s: Scale) -> Tensor:
        c = s.grain[1]
        return t if c == 0 else t.narrow(-1, start // c, -(-stop // c) - start // c)

    return replace(
        qt,
        shape=(*qt.shape[:-1], stop - start),
        codes=slice_columns(qt, start, stop),
        gather=None if qt.gather is None else qt.gather[..., start:stop],
        **map_levels(qt, columns),  # type: ignore[arg-type]
    )


def _column_grains(qt: QuantizedTensor) -> list[int]:
    return [s.grain[1] for _, _, s in levels(qt.spec) if s.grain[1] > 1]


def _slice_plain(qt: QuantizedTensor, start: int, stop: int, min_group: int) -> QuantizedTensor:
    grains = _column_grains(qt)
    low = start
    if any(math.gcd(c, start) < min(c, min_group) for c in grains):
        finest = min(grains)
        low = start // finest * finest
    out = slice_stored(regrain_axis(qt, 1, lambda c: cut_grain(c, low)), low, stop)
    if low == start:
        return out
    gather = torch.arange(low - start, stop - start, dtype=torch.int32).clamp(min=-1)
    return replace(out, spec=replace(out.spec, gather=True), gather=gather.to(qt.codes.device))


def _cells(qt: QuantizedTensor) -> tuple[Tensor, int]:
    """Cell of every stored column: columns of one cell share the values of every level."""
    k = qt.shape[-1]
    line = torch.zeros(k, dtype=torch.int64)
    for c in _column_grains(qt):
        line[c::c] = 1
    cell = torch.cumsum(line, 0)
    return cell.to(qt.codes.device), int(cell[-1]) + 1


def _run_size(qt: QuantizedTensor, counts: Tensor, min_group: int) -> int:
    """Width of new groups that stores ``counts`` columns per cell in the fewest bits."""
    grains = _column_grains(qt)
    if not grains:
        return 1
    whole = math.gcd(*grains)
    value_bits = sum(
        8 * t.element_size()
        for t, s in [*zip(qt.scales, qt.spec.scales), *_offset_levels(qt)]
        if s.grain[1] > 1
    ) + (0 if qt.zeros is None else 8 * qt.zeros.element_size())
    best, best_cost = whole, math.inf
    for size in range(whole, 0, -1):
        if whole % size or size < min(whole, min_group):
            continue
        runs = int((-(-counts // size)).sum())
        cost = runs * (size * qt.spec.element.bits + value_bits)
        if cost < best_cost:
            best, best_cost = size, cost
    return best


def _offset_levels(qt: QuantizedTensor) -> list[tuple[Tensor, Scale]]:
    zero = qt.spec.zero
    return [] if zero is None else list(zip(qt.offset, zero.levels))


def _slice_gathered(qt: QuantizedTensor, start: int, stop: int, min_group: int) -> QuantizedTensor:
    assert qt.gather is not None
    cell, cells = _cells(qt)
    rows = qt.gather if qt.gather.dim() == 2 else qt.gather.unsqueeze(0)
    kept = [((g >= start) & (g < stop)).nonzero().flatten() for g in rows]
    counts = torch.stack([torch.bincount(cell[k], minlength=cells) for k in kept])
    size = _run_size(qt, counts, min_group)
    indices = []
    for columns in kept:
        order, _ = runs_of_groups(cell[columns], size, cells)
        if not len(order):  # no stored column here: one run of padding keeps the shapes legal
            order = torch.full((size,), -1, dtype=torch.int64, device=columns.device)
        padded = torch.nn.functional.pad(columns, (0, 1), value=-1)  # index -1 finds -1
        indices.append(padded[order])
    width = max(len(i) for i in indices)
    index = torch.stack(
        [torch.nn.functional.pad(i, (0, width - len(i)), value=-1) for i in indices]
    )
    out = select_columns(qt, index if qt.gather.dim() == 2 else index[0], size)
    assert out.gather is not None
    gather = torch.where(out.gather >= 0, out.gather - start, out.gather)
    return replace(out, gather=gather)


def slice_in(lt: LayerTensors, start: int, stop: int, *, min_group: int = 16) -> LayerTensors:
    """Input features [start, stop). Exact; bias and acc_bias are kept, see the module's docstring.

    Args:
        min_group: a group that is cut is split into groups this wide or wider; if the cut does
            not allow that, the group is completed with padding columns and the result has a
            gather. With a gather, groups are regrouped to the width that stores the fewest bits.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` for an empty range, a cut inside an opaque block or through
            an input transform that is not block-diagonal there.
    """
    weight = only_weight(lt, "slice_in")
    size = weight.shape[-1] if weight.gather is None else None
    check_range("slice_in", start, stop, size)

    def per_column(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.numel() == 1 else t[..., start:stop]

    cut = _slice_plain if weight.gather is None else _slice_gathered
    return replace(
        lt,
        operands={"weight": cut(weight, start, stop, min_group)},
        input_scale=per_column(lt.input_scale),
        input_zero=per_column(lt.input_zero),
        transforms=cut_transforms(lt.transforms, "input", start, stop, size),
    )
