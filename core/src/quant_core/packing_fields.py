"""Codes that lie in blocks of bytes beside other things, their bits in one field or in several.

    uint8 [B, bytes of a block]  ->  uint8 [B, codes of a block]      ``quant_core.spec.Field``

    one field of 4 bits, stride 16:    byte i holds code i and code 16 + i
    two fields, 4 and 1 bits:          the same, and the fifth bits of 32 codes in 4 more bytes

Bytes outside the fields are not read, and written as zeros. Blocks are taken in pieces that stay in
the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quant_core.packing_bits import unpack_stream
from quant_core.spec import Field, Packing

__all__ = ["bytes_at", "pack_blocks", "put_", "take", "unpack_blocks"]

_CHUNK_CODES = 1 << 20  # codes in work at once: 1 MiB
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def bytes_at(blocks: Tensor, at: int, nbytes: int) -> Tensor:
    """``nbytes`` bytes from byte ``at`` of each block, as memory of their own.

    Shapes:  blocks uint8 (B, bytes)  ->  uint8 (B, nbytes)

    numpy copies them as one value each: torch, byte by byte, takes 2 to 14 times as long.
    """
    if blocks.device.type != "cpu" or not blocks.is_contiguous() or not blocks.numel():
        return blocks[:, at : at + nbytes].contiguous()
    kind = np.dtype(
        {"names": ["held"], "formats": [f"V{nbytes}"], "offsets": [at], "itemsize": blocks.shape[1]}
    )
    held = np.ascontiguousarray(blocks.numpy().reshape(-1).view(kind)["held"])
    return torch.from_numpy(held.view(np.uint8).reshape(len(blocks), nbytes))


def _take(blocks: Tensor, field: Field) -> Tensor:
    data = bytes_at(blocks, field.at, field.nbytes)
    if field.width == 8:
        return data
    if field.stride == 1:
        return unpack_stream(data, field.width, field.count)
    size, word = next((s, d) for s, d in _WORDS if field.stride % s == field.nbytes % s == 0)
    mask = int.from_bytes(bytes([(1 << field.width) - 1]) * size, "little")
    words = data.view(word).view(len(data), -1, field.stride // size)
    parts = [(words >> bit) & mask for bit in range(0, 8, field.width)]
    return torch.stack(parts, dim=2).view(len(data), -1).view(torch.uint8)


def _shifts(field: Field, like: Tensor) -> Tensor:
    steps = torch.arange(0, 8, field.width, dtype=torch.uint8, device=like.device)
    return steps.view(1, 1, -1, 1)


def _put_(blocks: Tensor, field: Field, values: Tensor) -> None:
    if field.width < 8:
        per = 8 // field.width
        runs = values.reshape(len(blocks), -1, per, field.stride) & ((1 << field.width) - 1)
        values = (runs << _shifts(field, blocks)).sum(2, dtype=torch.uint8).flatten(1)
    blocks[:, field.at : field.at + field.nbytes] = values


def take(blocks: Tensor, fields: Sequence[Field]) -> Tensor:
    """Values whose bits are spread over ``fields``, low field first.

    Shapes:  blocks uint8 (B, bytes)  ->  uint8 (B, values of a block)
    """
    values, width = _take(blocks, fields[0]), fields[0].width
    for field in fields[1:]:
        values = values | (_take(blocks, field) << width)
        width += field.width
    return values


def put_(blocks: Tensor, fields: Sequence[Field], values: Tensor) -> None:
    """Inverse of ``take``: write into ``blocks``; bits above the fields' are dropped."""
    shift = 0
    for field in fields:
        _put_(blocks, field, values >> shift)
        shift += field.width


def unpack_blocks(words: Tensor, count: int, packing: Packing) -> Tensor:
    """Codes of rows of whole blocks: uint8 [R, W] -> uint8 [R, count]."""
    per = packing.fields[0].count
    rows = words.shape[0]
    if rows * count <= _CHUNK_CODES:
        return take(words.reshape(-1, packing.block), packing.fields).reshape(rows, -1)[:, :count]
    out = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    step = max(1, _CHUNK_CODES // max(count, per))
    for start in range(0, rows, step):
        part = words[start : start + step].reshape(-1, packing.block)
        codes = take(part, packing.fields).reshape(-1, words.shape[1] // packing.block * per)
        out[start : start + step] = codes[:, :count]
    return out


def pack_blocks(codes: Tensor, packing: Packing) -> Tensor:
    """Inverse of ``unpack_blocks``; a last short block is filled up with zeros."""
    per = packing.fields[0].count
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per))
    rows, blocks = codes.shape[0], codes.shape[1] // per
    out = torch.zeros(rows, blocks, packing.block, dtype=torch.uint8, device=codes.device)
    step = max(1, _CHUNK_CODES // max(codes.shape[1], 1))
    for start in range(0, rows, step):
        part = codes[start : start + step].reshape(-1, per)
        put_(out[start : start + step].view(-1, packing.block), packing.fields, part)
    return out.view(rows, -1)
