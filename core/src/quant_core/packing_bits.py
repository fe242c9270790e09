"""Bit-level codecs of one packed axis: streams, padded words, bit planes and orders.

A stream of b-bit slots, LSB first, in little-endian words is the same stream in bytes, and eight
slots always fill exactly b bytes. So packing works on runs of eight slots, b bytes each:

    slot s of a run occupies bits [s*b, s*b+b) of the run, at most two bytes
    b = 3:  byte 0 = s0 s0 s0 s1 s1 s1 s2 s2 | byte 1 = s2 s3 s3 s3 s4 s4 s4 s5 | ...

All functions take the packed axis last and are vectorised over runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.intspec import INTERLEAVE
from quant_core.packing_words import WORD_BITS, WORD_DTYPES, view_as
from quant_core.spec import Packing

_CHUNK_SLOTS = 1 << 20  # packed at once: what is made of them stays in the cache

__all__ = ["pack_rows", "pack_stream", "unpack_rows", "unpack_stream"]


def unpack_stream(data: Tensor, bits: int, count: int) -> Tensor:
    """First ``count`` slots of an LSB-first bit stream. data: uint8 [R, B] -> uint8 [R, count]."""
    if bits == 8:
        return data[:, :count]
    if bits == 4:  # spread a byte over two: 0xBA -> 0x0B0A, little-endian A then B
        v = data[:, : -(-count // 2)].to(torch.int16)
        return view_as((v | (v << 4)).bitwise_and_(0x0F0F), torch.uint8)[:, :count]
    if bits == 2:
        w = data[:, : -(-count // 4)].to(torch.int32)
        w = (w | (w << 12)).bitwise_and_(0x000F000F)
        return view_as((w | (w << 6)).bitwise_and_(0x03030303), torch.uint8)[:, :count]
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


def pack_stream(slots: Tensor, bits: int) -> Tensor:
    """Inverse of ``unpack_stream``: uint8 [R, S] -> uint8 [R, ceil(S*bits/8)]."""
    if bits == 8:
        return slots.contiguous()
    rows, count = slots.shape
    if slots.numel() > _CHUNK_SLOTS and rows > 1:
        step = max(1, _CHUNK_SLOTS // count)
        return torch.cat([pack_stream(part, bits) for part in slots.split(step)])
    runs = -(-count // 8)
    if count % 8:
        slots = torch.nn.functional.pad(slots, (0, runs * 8 - count))
    width = -(-count * bits // 8)
    if bits == 4:
        v = view_as(slots, torch.int16)
        return (v | (v >> 4)).to(torch.uint8)[:, :width]
    if bits == 2:
        w = view_as(slots, torch.int32)
        w = (w | (w >> 6)).bitwise_and_(0x000F000F)
        return (w | (w >> 12)).to(torch.uint8)[:, :width]
    slots = slots.reshape(rows, runs, 8)
    out = torch.zeros(rows, runs, bits, dtype=torch.uint8, device=slots.device)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        out[..., byte] |= slots[..., slot] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= slots[..., slot] >> (8 - shift)
    return out.flatten(-2)[:, :width]


def _slots(words: Tensor, bits: int, count: int, packing: Packing) -> Tensor:
    """Slots in stored order: [R, W] words -> uint8 [R, count]."""
    if packing.planes:
        return _unpack_planes(view_as(words, torch.uint8), packing.planes, count)
    if packing.straddle:
        return unpack_stream(view_as(words, torch.uint8), bits, count)
    per = WORD_BITS[packing.word] // bits
    mask = (1 << bits) - 1
    parts = [((words >> (bits * i)) & mask).to(torch.uint8) for i in range(per)]
    return torch.stack(parts, dim=-1).flatten(-2)[:, :count]


def _unpack_planes(data: Tensor, planes: tuple[int, ...], count: int) -> Tensor:
    bits, rows = sum(planes), data.shape[0]
    runs = -(-count // 32)
    run = data.reshape(rows, runs, 4 * bits)  # 32 codes of b bits
    out = torch.zeros(rows, runs, 32, dtype=torch.uint8, device=data.device)
    at = offset = 0
    for width in planes:
        part = run[..., at : at + 4 * width].reshape(rows * runs, 4 * width)
        out |= unpack_stream(part, width, 32).view(rows, runs, 32) << offset
        at, offset = at + 4 * width, offset + width
    return out.flatten(-2)[:, :count]


def _pack_planes(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    rows, count = codes.shape
    runs = -(-count // 32)
    codes = torch.nn.functional.pad(codes, (0, runs * 32 - count)).view(rows * runs, 32)
    parts, offset = [], 0
    for width in planes:
        parts.append(pack_stream((codes >> offset) & ((1 << width) - 1), width))
        offset += width
    return torch.cat(parts, dim=1).view(rows, -1)


def _order(codes: Tensor, order: tuple[int, ...], *, inverse: bool) -> Tensor:
    """Codes to slots (``inverse=False``: slot[order[i]] = code[i]) or back, in whole runs."""
    index = torch.tensor(order, device=codes.device)
    if not inverse:
        index = torch.argsort(index)
    runs = codes.reshape(codes.shape[0], codes.shape[1] // len(order), len(order))
    return runs[..., index].flatten(-2)


def _unpack_interleaved(words: Tensor, count: int) -> Tensor:
    """Nibbles 0 to 3 are columns 0 2 4 6, nibbles 4 to 7 columns 1 3 5 7: [R, W] -> [R, count].

    0 2 4 6 1 3 5 7  ->  0 2 1 3 4 6 5 7  ->  0 1 2 3 4 5 6 7: the middle bytes change places,
    then the middle nibbles of both halves.
    """
    stream = words.clone()
    for shift, middle in ((8, 0x0000FF00), (4, 0x00F000F0)):
        other = (stream >> shift).bitwise_xor_(stream).bitwise_and_(middle)
        stream ^= other
        stream ^= other.bitwise_left_shift_(shift)
    return unpack_stream(view_as(stream, torch.uint8), 4, count)


def unpack_rows(words: Tensor, bits: int, count: int, packing: Packing) -> Tensor:
    """Codes of rows whose packed axis is last: [R, W] words -> uint8 [R, count]."""
    if packing.order is None:
        return _slots(words, bits, count, packing)
    if packing.order == INTERLEAVE and bits == 4 and packing.word == "int32" and not packing.planes:
        return _unpack_interleaved(words, count)
    slots = _slots(words, bits, count + -count % len(packing.order), packing)
    return _order(slots, packing.order, inverse=True)[:, :count]


def pack_rows(codes: Tensor, bits: int, packing: Packing) -> Tensor:
    """Inverse of ``unpack_rows``: uint8 [R, count] -> words [R, W]; padding bits are zero."""
    if packing.order is not None:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % len(packing.order)))
        codes = _order(codes, packing.order, inverse=False)
    word = WORD_BITS[packing.word]
    if packing.planes:
        data = _pack_planes(codes, packing.planes)
    elif packing.straddle:
        data = pack_stream(codes, bits)
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % (word // 8)))
    else:
        per = word // bits
        slots = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per))
        slots = slots.view(slots.shape[0], -1, per).to(torch.int64)
        value = torch.zeros(slots.shape[:2], dtype=torch.int64, device=slots.device)
        for i in range(per):
            value |= slots[..., i] << (bits * i)
        data = view_as(value, torch.uint8).view(*value.shape, 8)[..., : word // 8].flatten(-2)
    return view_as(data, WORD_DTYPES[packing.word])
