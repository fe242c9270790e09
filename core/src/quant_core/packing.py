"""Codes in and out of packed words: one algorithm for every ``Packing``.

A stream of b-bit slots, LSB first, in little-endian words is the same stream in bytes, and eight
slots always fill exactly b bytes. So packing works on runs of eight slots, b bytes each:

    slot s of a run occupies bits [s*b, s*b+b) of the run, at most two bytes
    b = 3:  byte 0 = s0 s0 s0 s1 s1 s1 s2 s2 | byte 1 = s2 s3 s3 s3 s4 s4 s4 s5 | ...

Everything is vectorised over runs. Large tensors are repacked in row blocks, so that one byte per
code never exists for a whole layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.spec import CANONICAL, Packing

__all__ = ["WORD_BITS", "WORD_DTYPES", "pack", "packed_shape", "repack", "unpack"]

WORD_BITS = {"uint8": 8, "int16": 16, "int32": 32}
WORD_DTYPES = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
_BLOCK_BYTES = 64 << 20  # bytes of unpacked codes held at once while repacking


def _words(count: int, bits: int, packing: Packing) -> int:
    """Words that hold ``count`` codes along the packed axis."""
    word = WORD_BITS[packing.word]
    if packing.planes:
        return -(-count // 32) * 32 * bits // word
    if packing.straddle:
        return -(-count * bits // word)
    return -(-count // (word // bits))


def packed_shape(shape: tuple[int, int], bits: int, packing: Packing) -> tuple[int, int]:
    """Shape of the word tensor that holds codes of logical ``shape`` (N, K)."""
    n, k = shape
    if packing.axis == "in":
        k = _words(k, bits, packing)
    else:
        n = _words(n, bits, packing)
    return (k, n) if packing.k_major else (n, k)


def _packed_last(words: Tensor, packing: Packing) -> Tensor:
    """Move the packed axis last: [rows, words]."""
    last = packing.k_major == (packing.axis == "out")
    return words if last else words.transpose(-1, -2)


def _check_shape(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> None:
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


def _unpack_stream(data: Tensor, bits: int, count: int) -> Tensor:
    """First ``count`` slots of an LSB-first bit stream. data: uint8 [R, B] -> uint8 [R, count]."""
    if bits == 8:
        return data[:, :count]
    if bits in (1, 2, 4):
        per = 8 // bits
        used = data[:, : -(-count // per)]
        parts = [(used >> (bits * i)) & ((1 << bits) - 1) for i in range(per)]
        return torch.stack(parts, dim=-1).flatten(-2)[:, :count]
    runs = -(-count // 8)
    if data.shape[1] < runs * bits:
        data = torch.nn.functional.pad(data, (0, runs * bits - data.shape[1]))
    run = data[:, : runs * bits].reshape(data.shape[0], runs, bits)
    out = torch.empty(data.shape[0], runs, 8, dtype=torch.uint8, device=data.device)
    mask = (1 << bits) - 1
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        value = run[..., byte] >> shift
        if shift + bits > 8:
            value = value | (run[..., byte + 1] << (8 - shift))
        out[..., slot] = value & mask
    return out.flatten(-2)[:, :count]


def _pack_stream(slots: Tensor, bits: int) -> Tensor:
    """Inverse of ``_unpack_stream``: uint8 [R, S] -> uint8 [R, ceil(S*bits/8)]."""
    if bits == 8:
        return slots.contiguous()
    rows, count = slots.shape
    runs = -(-count // 8)
    slots = torch.nn.functional.pad(slots, (0, runs * 8 - count)).view(rows, runs, 8)
    out = torch.zeros(rows, runs, bits, dtype=torch.uint8, device=slots.device)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        out[..., byte] |= slots[..., slot] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= slots[..., slot] >> (8 - shift)
    return out.flatten(-2)[:, : -(-count * bits // 8)]


def _as_bytes(words: Tensor) -> Tensor:
    """[R, W] words -> uint8 [R, W * bytes]; little-endian, as every supported machine is."""
    return words.contiguous().view(torch.uint8)


def _slots(words: Tensor, bits: int, count: int, packing: Packing) -> Tensor:
    """Slots in stored order: [R, W] words -> uint8 [R, count]."""
    if packing.planes:
        return _unpack_planes(_as_bytes(words), packing.planes, count)
    if packing.straddle:
        return _unpack_stream(_as_bytes(words), bits, count)
    per = WORD_BITS[packing.word] // bits
    mask = (1 << bits) - 1
    parts = [((words >> (bits * i)) & mask).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, dim=-1).flatten(-2)[:, :count]


def _unpack_planes(data: Tensor, planes: tuple[int, ...], count: int) -> Tensor:
    bits, rows = sum(planes), data.shape[0]
    runs = -(-count // 32)
    run = data.view(rows, runs, 4 * bits)  # 32 codes of b bits
    out = torch.zeros(rows, runs, 32, dtype=torch.uint8, device=data.device)
    at = offset = 0
    for width in planes:
        part = run[..., at : at + 4 * width].reshape(rows * runs, 4 * width)
        out |= _unpack_stream(part, width, 32).view(rows, runs, 32) << offset
        at, offset = at + 4 * width, offset + width
    return out.flatten(-2)[:, :count]


def _pack_planes(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    rows, count = codes.shape
    runs = -(-count // 32)
    codes = torch.nn.functional.pad(codes, (0, runs * 32 - count)).view(rows * runs, 32)
    parts, offset = [], 0
    for width in planes:
        parts.append(_pack_stream((codes >> offset) & ((1 << width) - 1), width))
        offset += width
    return torch.cat(parts, dim=1).view(rows, -1)


def _order(codes: Tensor, order: tuple[int, ...], *, inverse: bool) -> Tensor:
    """Codes to slots (``inverse=False``: slot[order[i]] = code[i]) or back, run by run."""
    rows, count = codes.shape
    run = len(order)
    if count % run:
        raise LayoutError(
            f"{count} codes along the packed axis are no multiple of the order's run of {run}. "
            "This packing needs whole runs.",
            code="Q-LAYOUT-SHAPE",
            expected=run,
            actual=count,
        )
    index = torch.tensor(order, device=codes.device)
    if not inverse:
        index = torch.argsort(index)
    return codes.view(rows, -1, run)[..., index].flatten(-2)


def unpack(words: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    """One code per byte.

    Args:
        words: ``packed_shape(shape, bits, packing)``, dtype of ``packing.word``.
        bits: 1..8.
        shape: logical (N, K).

    Returns:
        uint8 [N, K].

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if shape or dtype of ``words`` disagree.
    """
    _check_shape(words, bits, shape, packing)
    n, k = shape
    count = k if packing.axis == "in" else n
    padded = count
    if packing.order is not None:
        padded = -(-count // len(packing.order)) * len(packing.order)
    codes = _slots(_packed_last(words, packing), bits, padded, packing)
    if packing.order is not None:
        codes = _order(codes.contiguous(), packing.order, inverse=True)[:, :count]
    return codes if packing.axis == "in" else codes.transpose(0, 1)


def pack(codes: Tensor, bits: int, packing: Packing) -> Tensor:
    """Inverse of ``unpack``: uint8 [N, K], one code per byte, to words. Padding bits are zero."""
    by_row = codes if packing.axis == "in" else codes.transpose(0, 1)
    by_row = by_row.contiguous()
    if packing.order is not None:
        run = len(packing.order)
        by_row = torch.nn.functional.pad(by_row, (0, -by_row.shape[1] % run))
        by_row = _order(by_row, packing.order, inverse=False)
    word = WORD_BITS[packing.word]
    if packing.planes:
        data = _pack_planes(by_row, packing.planes)
    elif packing.straddle:
        data = _pack_stream(by_row, bits)
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % (word // 8)))
    else:
        per = word // bits
        slots = torch.nn.functional.pad(by_row, (0, -by_row.shape[1] % per))
        slots = slots.view(slots.shape[0], -1, per).to(torch.int64)
        value = sum(slots[..., i] << (bits * i) for i in range(per))
        assert isinstance(value, Tensor)
        data = value.contiguous().view(torch.uint8).view(*value.shape, 8)[..., : word // 8]
        data = data.flatten(-2)
    words = data.contiguous().view(WORD_DTYPES[packing.word])
    last = packing.k_major == (packing.axis == "out")
    return words if last else words.transpose(0, 1).contiguous()


def _rows(words: Tensor, start: int, stop: int, bits: int, packing: Packing) -> Tensor:
    """Words of the logical rows [start, stop); ``axis`` "out" needs whole words."""
    if packing.axis == "out":
        per = WORD_BITS[packing.word]  # a multiple of 32 codes always ends on a word
        start, stop = start * bits // per, -(-stop * bits // per)
        if packing.k_major:
            return words[:, start:stop]
        return words[start:stop]
    return words[:, start:stop] if packing.k_major else words[start:stop]


def repack(
    words: Tensor, bits: int, shape: tuple[int, int], old: Packing, new: Packing = CANONICAL
) -> Tensor:
    """Words of ``old`` as words of ``new``, in row blocks of at most 64 MiB of unpacked codes.

    Bit-exact for every pair of packings; padding bits become zero.
    """
    if old == new:
        return words
    _check_shape(words, bits, shape, old)
    n, k = shape
    step = max(32, _BLOCK_BYTES // max(k, 1) // 32 * 32)
    whole_words = (
        old.straddle and not old.planes and (old.order is None or 32 % len(old.order) == 0)
    )
    blockable = (old.axis == "in" or whole_words) and new.axis == "in"
    if n <= step or not blockable:
        return pack(unpack(words, bits, shape, old), bits, new)
    out = torch.empty(
        packed_shape(shape, bits, new), dtype=WORD_DTYPES[new.word], device=words.device
    )
    for start in range(0, n, step):
        stop = min(n, start + step)
        part = _rows(words, start, stop, bits, old)
        codes = unpack(part, bits, (stop - start, k), old)
        if new.k_major:
            out[:, start:stop] = pack(codes, bits, new)
        else:
            out[start:stop] = pack(codes, bits, new)
    return out
