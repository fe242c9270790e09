"""Which bytes a partial read needs: the leading contiguous run that covers an index."""

from __future__ import annotations

import math

from quant_core.checkpoint.base import Index
from quant_core.errors import LayoutError, printable

__all__ = ["contiguous_part"]


def contiguous_part(
    name: str, shape: tuple[int, ...], index: Index
) -> tuple[int, tuple[int, ...], tuple[int | slice, ...]]:
    """Split ``index`` of a tensor of ``shape`` into one contiguous read and a cut in memory.

    Integers and the first slice lie in one run of bytes; a step and later axes do not.

    Returns:
        (first element of the run, shape of the run, index to apply to it or ()).

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if the index leaves the tensor; it never wraps or clips.
    """
    if len(index) > len(shape):
        raise _bad_index(name, shape, index)
    cuts: list[int | slice] = []
    for dim, cut in zip(shape, index):
        if isinstance(cut, int):
            fits = 0 <= cut < dim
            cuts.append(cut)
        else:
            start, stop, step = (*cut, 1)[:3] if isinstance(cut, tuple) else (-1, -1, 1)
            fits = 0 <= start <= stop <= dim and step >= 1
            cuts.append(slice(start, stop, step))
        if not fits:  # a negative or too large index would wrap or clip in silence
            raise _bad_index(name, shape, index)
    first = 0
    for axis, taken in enumerate(cuts):
        stride = math.prod(shape[axis + 1 :])
        if isinstance(taken, int):
            first += taken * stride
            continue
        first += taken.start * stride
        part = (taken.stop - taken.start, *shape[axis + 1 :])
        rest = (slice(None, None, taken.step), *cuts[axis + 1 :])
        return first, part, rest if len(rest) > 1 or taken.step > 1 else ()
    return first, shape[len(cuts) :], ()


def _bad_index(name: str, shape: tuple[int, ...], index: Index) -> LayoutError:
    return LayoutError(
        f"tensor {printable(name)!r}: index {index!r} does not fit shape {shape}, expected "
        "integers and (start, stop[, step]) inside it. Cut along the tensor's own axes.",
        code="Q-LAYOUT-SHAPE",
        tensor=name,
        expected=shape,
        actual=index,
    )
