"""A rank's part of a layer, for every engine that splits layers over devices.

    columns      output features cut evenly          q, gate, up, vocabularies without padding
    heads        whole heads; fewer heads than ranks: each is held by several
    vocabulary   rows of a table that the engine pads
    (inputs      input features cut evenly: ``even`` again, for ``o_proj`` and ``down_proj``)

Cuts are made on the canonical form (``rewrites.cut``), after reading and before members are fused.
So a format's packing and group size never limit them: a group that is cut is solved there, and only
what has no exact answer is refused (``Q-LAYOUT-TP``). Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.errors import LayoutError
from quant_core.spec import Span

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["cut", "even", "heads", "vocabulary"]


def even(total: int, rank: int, ranks: int) -> Span:
    """Rank ``rank``'s part of ``total`` features.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` unless ``ranks`` divides ``total``.
    """
    if total % ranks:
        fits = [n for n in range(1, ranks) if total % n == 0]
        raise LayoutError(
            f"{total} features over {ranks} ranks: expected a number of ranks that divides them. "
            f"Use one of {fits}.",
            code="Q-LAYOUT-TP",
            expected=fits,
            actual=ranks,
        )
    size = total // ranks
    return Span(start=rank * size, stop=(rank + 1) * size, total=total)


def heads(total: int, count: int, rank: int, ranks: int) -> Span:
    """Rank ``rank``'s part of ``count`` heads that are ``total`` features together.

    Where there are more ranks than heads, ``ranks / count`` neighbours hold the same head.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` unless one of ``count`` and ``ranks`` divides the other.
    """
    if ranks <= count:
        return even(total, rank, ranks) if count % ranks == 0 else even(count, rank, ranks)
    if ranks % count:
        even(ranks, 0, count)
    return even(total, rank // (ranks // count), count)


def vocabulary(total: int, padded: int, rank: int, ranks: int) -> Span:
    """Rank ``rank``'s rows of a table of ``total`` rows that is padded to ``padded`` at its end."""
    part = even(padded, rank, ranks)
    start, stop = min(part.start, total), min(part.stop, total)
    return Span(start=start, stop=stop, total=total, padded=part.size)


def cut(lt: LayerTensors, *, out: Span, inp: Span) -> LayerTensors:
    """A rank's part of one matrix. Exact.

    Rows that only the engine wants are exact zeros. What is added once to the sum over all ranks
    (bias, ``acc_bias``) stays on the rank that holds the first input features.

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` for a cut that has no exact answer, ``Q-LAYOUT-REPRESENT`` for
            padding of blocks that have no zero.
    """
    from quant_core.rewrites.cut import slice_in, slice_out
    from quant_core.rewrites.pad import pad_out

    if (out.start, out.stop) != (0, out.total):
        lt = slice_out(lt, out.start, out.stop)
    if out.padded > out.size:
        lt = pad_out(lt, out.padded)
    if (inp.start, inp.stop) != (0, inp.total):
        lt = slice_in(lt, inp.start, inp.stop)
        if inp.start:
            lt = replace(lt, bias=None, acc_bias=None)
    return lt
