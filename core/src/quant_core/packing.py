"""Codes in and out of packed words: one algorithm for every ``Packing``.

The bits of one packed row are the business of ``quant_core.packing_bits``; here are sizes, axes and
transposition. Large tensors are repacked in row blocks, so that one byte per code never exists for
a whole layer; common packings go through whole words instead (``quant_core.packing_words``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.packing_bits import pack_rows, pack_stream, unpack_rows, unpack_stream
from quant_core.packing_fields import pack_blocks, unpack_blocks
from quant_core.packing_words import (
    WORD_BITS,
    WORD_DTYPES,
    from_stream,
    has_fast_path,
    to_stream,
)
from quant_core.spec import CANONICAL, Packing

__all__ = [
    "WORD_BITS",
    "WORD_DTYPES",
    "Packed",
    "pack",
    "pack_unit",
    "packed_count",
    "packed_shape",
    "repack",
    "unpack",
    "word_slice",
]

_BLOCK_BYTES = 64 << 20  # bytes of unpacked codes held at once while repacking


def pack_unit(bits: int, packing: Packing) -> int:
    """Codes along the packed axis that fill whole words and whole runs: where words may be cut."""
    if packing.fields:
        return packing.fields[0].count
    word = WORD_BITS[packing.word]
    run = len(packing.order) if packing.order is not None else 1
    if packing.planes:
        return math.lcm(32, run)
    per = word // math.gcd(word, bits) if packing.straddle else word // bits
    return math.lcm(per, run)


def packed_count(count: int, bits: int, packing: Packing) -> int:
    """Words that hold ``count`` codes along the packed axis; a last short run is filled up."""
    if packing.fields:
        return -(-count // packing.fields[0].count) * packing.block
    word = WORD_BITS[packing.word]
    if packing.order is not None:
        count += -count % len(packing.order)
    if packing.planes:
        return -(-count // 32) * 32 * bits // word
    if packing.straddle:
        return -(-count * bits // word)
    return -(-count // (word // bits))


def packed_shape(shape: tuple[int, int], bits: int, packing: Packing) -> tuple[int, int]:
    """Shape of the word tensor that holds codes of logical ``shape`` (N, K)."""
    n, k = shape
    if packing.axis == "in":
        k = packed_count(k, bits, packing)
    else:
        n = packed_count(n, bits, packing)
    return (k, n) if packing.k_major else (n, k)


def _packed_last(words: Tensor, packing: Packing) -> Tensor:
    """Move the packed axis last: [rows, words]. Its own inverse."""
    last = packing.k_major == (packing.axis == "out")
    return words if last else words.transpose(-1, -2)


def _check(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> None:
    expected = packed_shape(shape, bits, packing)
    dtype = WORD_DTYPES[packing.word]
    if tuple(words.shape) != expected or words.dtype != dtype:
        raise LayoutError(
            f"packed codes have shape {tuple(words.shape)} {words.dtype}, expected {expected} "
            f"{dtype} for {bits}-bit codes of shape {shape}. Check bits and the layer's sizes.",
            code="Q-LAYOUT-SHAPE",
            expected=expected,
            actual=tuple(words.shape),
        )


def _check_planes(bits: int, packing: Packing) -> None:
    held = packing.planes or tuple(f.width for f in packing.fields)
    if held and sum(held) != bits:
        what = "bit planes" if packing.planes else "fields"
        raise LayoutError(
            f"{what} {held} hold {sum(held)} bits, expected {bits}. "
            f"Give the {what} of this bit width.",
            code="Q-LAYOUT-ELEMENT",
            expected=bits,
            actual=held,
        )


def _unpack_generic(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    n, k = shape
    by_row, along = _packed_last(words, packing), k if packing.axis == "in" else n
    if packing.fields:
        codes = unpack_blocks(by_row, along, packing)
    else:
        codes = unpack_rows(by_row, bits, along, packing)
    return codes if packing.axis == "in" else codes.transpose(0, 1)


def _pack_generic(codes: Tensor, bits: int, packing: Packing) -> Tensor:
    by_row = (codes if packing.axis == "in" else codes.transpose(0, 1)).contiguous()
    words = pack_blocks(by_row, packing) if packing.fields else pack_rows(by_row, bits, packing)
    return _packed_last(words, packing).contiguous()


def unpack(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    """One code per byte.

    Args:
        words: ``packed_shape(shape, bits, packing)``, dtype of ``packing.word``.
        bits: 1..8.
        shape: logical (N, K).

    Returns:
        uint8 [N, K]; for 8-bit codes it may share memory with ``words``.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if shape or dtype of ``words`` disagree,
            ``Q-LAYOUT-ELEMENT`` if the packing's planes or fields are not of ``bits``.
    """
    _check_planes(bits, packing)
    _check(words, bits, shape, packing)
    if has_fast_path(bits, shape, packing) and not packing.fields:
        return unpack_stream(to_stream(words, bits, shape, packing), bits, shape[1])
    return _unpack_generic(words, bits, shape, packing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Codes that are not unpacked yet: what ``unpack`` takes."""

    words: Tensor
    bits: int
    shape: tuple[int, int]
    packing: Packing

    def codes(self) -> Tensor:
        """As ``unpack``."""
        return unpack(self.words, self.bits, self.shape, self.packing)


def pack(codes: Tensor, bits: int, packing: Packing) -> Tensor:
    """Inverse of ``unpack``: uint8 [N, K], one code per byte, to words. Padding bits are zero.

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` for a code that needs more than ``bits`` bits.
    """
    _check_planes(bits, packing)
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise LayoutError(
            f"codes to pack reach {int(codes.max())}, expected at most {(1 << bits) - 1} for "
            f"{bits} bits. Clamp while quantizing, or pack with more bits.",
            code="Q-LAYOUT-ELEMENT",
            expected=(1 << bits) - 1,
            actual=int(codes.max()),
        )
    shape = (codes.shape[0], codes.shape[1])
    if has_fast_path(bits, shape, packing):
        return from_stream(pack_stream(codes, bits), bits, shape, packing)
    return _pack_generic(codes, bits, packing)


def word_slice(
    words: Tensor, bits: int, packing: Packing, axis: str, start: int, stop: int
) -> Tensor:
    """View of the words that hold the codes [start, stop) along ``axis`` ("in" or "out").

    Along the packed axis ``start`` must be a multiple of ``pack_unit``; if ``stop`` is not one,
    the last word holds further codes as well.
    """
    dim = int(packing.k_major == (axis == "out"))
    if axis == packing.axis:
        start, stop = packed_count(start, bits, packing), packed_count(stop, bits, packing)
    return words.narrow(dim, start, stop - start)


def repack(
    words: Tensor,
    bits: int,
    shape: tuple[int, int],
    old: Packing,
    new: Packing = CANONICAL,
    *,
    block_bytes: int = _BLOCK_BYTES,
) -> Tensor:
    """Words of ``old`` as words of ``new``: word by word where that is known, else in row blocks.

    Bit-exact for every pair of packings; padding bits become zero.

    Args:
        block_bytes: most bytes of unpacked codes held at once (a block has at least the rows
            that fill whole words).
    """
    if old == new:
        return words
    _check_planes(bits, old)
    _check_planes(bits, new)
    _check(words, bits, shape, old)
    if has_fast_path(bits, shape, old) and has_fast_path(bits, shape, new):
        return from_stream(to_stream(words, bits, shape, old), bits, shape, new)
    n, k = shape
    unit = math.lcm(*(pack_unit(bits, p) for p in (old, new) if p.axis == "out"))
    step = max(unit, block_bytes // max(k, 1) // unit * unit)
    if n <= step:
        return pack(unpack(words, bits, shape, old), bits, new)
    out = torch.empty(
        packed_shape(shape, bits, new), dtype=WORD_DTYPES[new.word], device=words.device
    )
    for start in range(0, n, step):
        stop = min(n, start + step)
        part = word_slice(words, bits, old, "out", start, stop)
        codes = unpack(part, bits, (stop - start, k), old)
        word_slice(out, bits, new, "out", start, stop).copy_(pack(codes, bits, new))
    return out
