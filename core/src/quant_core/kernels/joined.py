"""Layers of one input as one matrix: rows of several behind each other, one launch for all.

    q [4096, K]  k [1024, K]  v [1024, K]   ->   one operation with 6144 rows, then three slices

That holds for storage orders (``JOINABLE``) in which the buffers of n1 + n2 rows are those of n1
and of n2, behind each other along the first axis. ``place_together_`` puts the buffers of layers
there once, after loading; every layer keeps its own, as a part. A call looks if they still lie
so: after a move to another device, say, they do not, and each layer runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, cat

from quant_core.spec import CANONICAL, OpSpec

if TYPE_CHECKING:
    from quant_core.kernels.base import Kernel
    from quant_core.nn import QuantLinear

__all__ = ["JOINABLE", "JoinedRun", "adjacent", "joined_op", "place_together_"]

JOINABLE = frozenset({"rows", "tiles16"})
"""Layouts whose matrices may be joined row by row."""

_ROWS = 64  # rows of a layer are a multiple of this, so that no padding lies between layers


def joined_op(ops: Sequence[OpSpec]) -> OpSpec | None:
    """The operation with the rows of all ``ops``; None if they are not one matrix.

    They must be equal but for the number of rows, and every factor belong to rows: a factor or a
    table of the whole matrix, or its column order, is not that of another.
    """
    first = ops[0]
    spec = first.weight
    zero = spec.zero
    factors = (*spec.scales, *(zero.levels if zero is not None else ()))
    if first.op != "linear" or first.packing != CANONICAL or first.transforms:
        return None
    if spec.gather or spec.blocks or spec.element.kind in ("lut", "vector"):
        return None
    if any(s.element == "lut8" or s.grain[0] == 0 for s in factors):
        return None
    acts = first.operand("input")
    if acts is not None and any(s.static for s in acts.scales):
        return None
    tall = [_ROWS, *(s.grain[0] for s in factors)]
    if any(op.size("n") % rows for op in ops for rows in tall):
        return None

    def with_rows(op: OpSpec, n: int) -> OpSpec:
        sizes = tuple((name, n if name == "n" else size) for name, size in op.sizes)
        return replace(op, sizes=sizes)

    total = sum(op.size("n") for op in ops)
    made = {with_rows(op, total) for op in ops}
    return made.pop() if len(made) == 1 else None


def adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that ``parts`` make behind each other, without a copy; None if they do not."""
    first = parts[0]
    at, where = first.storage_offset(), first.untyped_storage().data_ptr()
    rows = 0
    for part in parts:
        same = part.dtype == first.dtype and part.shape[1:] == first.shape[1:]
        here = part.untyped_storage().data_ptr() == where and part.storage_offset() == at
        if not (same and here and part.is_contiguous()):
            return None
        at += part.numel()
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def place_together_(layers: Sequence[QuantLinear]) -> None:
    """Move the buffers of ``layers``, which ``joined_op`` joins, behind each other.

    Takes one more copy of them while it runs. Values do not change, addresses do: call it before a
    graph is captured.
    """
    for name in layers[0].tensors:
        parts = [layer.tensors[name] for layer in layers]
        if adjacent(parts) is not None:
            continue
        whole, at = cat(parts), 0
        for layer, part in zip(layers, parts, strict=True):
            layer._buffers[name] = whole[at : at + part.shape[0]]
            at += part.shape[0]


class JoinedRun:
    """What ``bind_shared`` gives for layers that are one matrix where they lie together.

    Sums of a joined matrix may be cut otherwise than those of its parts: outputs equal those of
    ``bind`` up to the order of float32 sums.

    Args:
        kernel: runs ``op``, the joined operation.
        alone: what runs each layer that does not lie beside the others.
        rows: output rows of each layer.
    """

    def __init__(
        self, kernel: Kernel, op: OpSpec, alone: Sequence[Callable[..., Tensor]], rows: list[int]
    ) -> None:
        self.kernel, self.op, self.rows = kernel, op, rows
        self.whole, self.alone = kernel.bind(op), tuple(alone)
        self._seen: tuple[int, ...] = ()
        self._held: list[Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        """A copy looks for itself how its layers lie."""
        return {**self.__dict__, "_seen": (), "_held": None}

    def buffers(self, values: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
        """The joint buffers, or None where the layers do not lie together."""
        seen = tuple([t.data_ptr() for mine in values for t in mine])
        if seen != self._seen:
            found = [adjacent(parts) for parts in zip(*values, strict=True)]
            whole = [t for t in found if t is not None]
            self._held = whole if len(whole) == len(found) else None
            self._seen = seen
        return self._held

    def __call__(self, values: list[list[Tensor]], x: Tensor) -> list[Tensor]:
        held = self.buffers(values)
        if held is None:
            return [run(mine, x) for run, mine in zip(self.alone, values, strict=True)]
        return [y.contiguous() for y in self.whole(held, x).split(self.rows, dim=-1)]
