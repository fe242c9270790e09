"""Cutting, joining and reordering codes: on packed words where the cut allows, else in row blocks.

Words may be cut along the axis they are not packed along anywhere, along the packed axis at
multiples of ``pack_unit``. Any other cut unpacks rows a block at a time. The packing stays what it
was. Results may share memory with their inputs; inputs are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quant_core import packing as pk
from quant_core.rewrites.refuse import check_scalar, refuse
from quant_core.spec import CANONICAL, Packing
from quant_core.tensors import QuantizedTensor

__all__ = ["concat_rows", "repack", "slice_columns", "slice_rows", "take_columns"]

_BLOCK_BYTES = 16 << 20  # bytes of unpacked codes held at once


def _per_expert(qt: QuantizedTensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if len(qt.shape) == 2:
        return change(qt.codes)
    return torch.stack([change(codes) for codes in qt.codes])


def _map_rows(
    words: Tensor,
    bits: int,
    shape: tuple[int, int],
    packing: Packing,
    change: Callable[[Tensor], Tensor],
    *,
    block_bytes: int = _BLOCK_BYTES,
) -> Tensor:
    """Words of ``change(codes)`` where ``change`` maps uint8 [rows, K] to [rows, K']."""
    n, k = shape
    rows = words
    if packing.axis == "out":  # words that span rows cannot be taken row by row
        rows = pk.repack(words, bits, shape, packing, CANONICAL, block_bytes=block_bytes)
    source = CANONICAL if packing.axis == "out" else packing
    step = max(1, block_bytes // max(k, 1))
    parts = []
    for start in range(0, n, step):
        stop = min(n, start + step)
        part = pk.word_slice(rows, bits, source, "out", start, stop)
        codes = change(pk.unpack(part, bits, (stop - start, k), source))
        parts.append(pk.pack(codes, bits, source))
    out = torch.cat(parts, dim=1 if source.k_major else 0)
    if source == packing:
        return out
    return pk.repack(out, bits, (n, codes.shape[1]), source, packing, block_bytes=block_bytes)


def _slice(
    words: Tensor,
    bits: int,
    shape: tuple[int, int],
    packing: Packing,
    axis: str,
    start: int,
    stop: int,
) -> Tensor:
    size = shape[0] if axis == "out" else shape[1]
    unit = pk.pack_unit(bits, packing) if axis == packing.axis else 1
    if start % unit == 0 and (stop % unit == 0 or stop == size):
        return pk.word_slice(words, bits, packing, axis, start, stop)
    if axis == "in":
        return _map_rows(words, bits, shape, packing, lambda codes: codes[:, start:stop])
    low, high = start // unit * unit, min(size, -(-stop // unit) * unit)
    part = pk.word_slice(words, bits, packing, "out", low, high)
    rows = pk.repack(part, bits, (high - low, shape[1]), packing, CANONICAL)
    return pk.repack(
        rows[start - low : stop - low], bits, (stop - start, shape[1]), CANONICAL, packing
    )


def _block_size(qt: QuantizedTensor) -> int:
    from quant_core.registry import registry

    return registry().block_type(qt.spec.blocks).weights


def slice_rows(qt: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Codes of the output rows [start, stop)."""
    if qt.spec.blocks:
        return qt.codes.narrow(-2, start, stop - start)
    check_scalar(qt, "slice_out")
    shape, bits = (qt.shape[-2], qt.shape[-1]), qt.spec.element.bits
    return _per_expert(qt, lambda c: _slice(c, bits, shape, qt.packing, "out", start, stop))


def slice_columns(qt: QuantizedTensor, start: int, stop: int) -> Tensor:
    """Codes of the stored columns [start, stop).

    Raises:
        LayoutError: ``Q-LAYOUT-TP`` for a cut inside an opaque block.
    """
    shape = (qt.shape[-2], qt.shape[-1])
    if qt.spec.blocks:
        size = _block_size(qt)
        if start % size or (stop % size and stop != shape[1]):
            blocks = -(-shape[1] // size)
            fits = [t for t in (1, 2, 4, 8, 16, 32) if blocks % t == 0]
            raise refuse(
                "TP",
                f"slice_in({start}, {stop}): the cut falls inside an opaque block of {size} "
                f"weights ({qt.spec.blocks}), expected multiples of {size}. in_features="
                f"{shape[1]} can be cut for a tensor-parallel size of {fits}.",
                expected=size,
                actual=(start, stop),
            )
        width = qt.codes.shape[-1] // -(-shape[1] // size)
        low, high = start // size * width, -(-stop // size) * width
        return qt.codes.narrow(-1, low, high - low)
    check_scalar(qt, "slice_in")
    bits = qt.spec.element.bits
    return _per_expert(qt, lambda c: _slice(c, bits, shape, qt.packing, "in", start, stop))


def take_columns(qt: QuantizedTensor, index: Tensor, *, block_bytes: int = _BLOCK_BYTES) -> Tensor:
    """Codes with stored column j taken from ``index[j]``; code 0 where it is -1.

    Args:
        index: int64 [K'] (for a stack also [E, K']).
    """
    check_scalar(qt, "take_columns")
    if qt.spec.blocks:
        raise refuse(
            "REPRESENT",
            f"take_columns: columns of opaque blocks ({qt.spec.blocks}) cannot be reordered. "
            "Keep the input order, or convert the layer to a format with plain codes.",
            actual=qt.spec.blocks,
        )
    shape, bits = (qt.shape[-2], qt.shape[-1]), qt.spec.element.bits

    def take(words: Tensor, columns: Tensor) -> Tensor:
        padding = (columns < 0).nonzero().flatten()

        def change(codes: Tensor) -> Tensor:
            out = codes.index_select(1, columns.clamp(min=0))
            return out.index_fill_(1, padding, 0)

        return _map_rows(words, bits, shape, qt.packing, change, block_bytes=block_bytes)

    if len(qt.shape) == 2:
        return take(qt.codes, index)
    indices = index if index.dim() == 2 else index.expand(qt.shape[0], -1)
    return torch.stack([take(c, i) for c, i in zip(qt.codes, indices, strict=True)])


def concat_rows(parts: Sequence[QuantizedTensor]) -> Tensor:
    """Codes of ``parts`` one below the other; all of one packing, bit width and K."""
    first = parts[0]
    if first.spec.blocks:
        return torch.cat([p.codes for p in parts], dim=-2)
    check_scalar(first, "concat_out")
    bits, packing = first.spec.element.bits, first.packing
    dim = -1 if packing.k_major else -2
    unit = pk.pack_unit(bits, packing) if packing.axis == "out" else 1
    if all(p.shape[-2] % unit == 0 for p in parts[:-1]):
        return torch.cat([p.codes for p in parts], dim=dim)
    joined = torch.cat([repack(p, CANONICAL).codes for p in parts], dim=-2)
    shape = (sum(p.shape[-2] for p in parts), first.shape[-1])
    whole = replace(first, shape=(*first.shape[:-2], *shape), codes=joined, packing=CANONICAL)
    return repack(whole, packing).codes


def repack(qt: QuantizedTensor, packing: Packing) -> QuantizedTensor:
    """The same weights in another physical order. Exact for every pair of packings.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for opaque blocks and vector codes, which have none.
    """
    if qt.packing == packing:
        return qt
    check_scalar(qt, "repack")
    if qt.spec.blocks:
        raise refuse(
            "REPRESENT",
            f"repack: opaque blocks ({qt.spec.blocks}) have no other packing. "
            "Use a kernel that reads these blocks.",
            actual=qt.spec.blocks,
        )
    shape, bits = (qt.shape[-2], qt.shape[-1]), qt.spec.element.bits
    codes = _per_expert(qt, lambda c: pk.repack(c, bits, shape, qt.packing, packing))
    return replace(qt, codes=codes, packing=packing)
