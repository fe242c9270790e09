"""Block bytes to canonical tensors and back, bit for bit, by the tables of ``layouts``.

    rows uint8 [N, row_bytes] -> codes: [N, K * bits / 8], as ``BlockLayout.packing`` says
                                 scales: finest first, [N, K / weights per scale]
                                 offset: float16 minima (negated for K-quants), and their codes

4-bit codes stay in their bytes, whose split-half order is a ``Packing``; codes spread over several
fields become the canonical stream. Rows are taken in blocks that fit the cache; one byte per code
never exists for a whole layer. Scales are moved as raw bits: NaN payloads survive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.memory import empty
from quant_core.packing import pack, packed_shape, repack, unpack
from quant_core.spec import CANONICAL
from quant_core.tensors import QuantizedTensor
from quant_plugin_gguf.layouts import LAYOUTS, BlockLayout, Field, spec_of
from quant_plugin_gguf.types import BY_NAME

__all__ = ["check_scales", "dequantize_rows", "join_rows", "split_rows"]

_LARGEST_UE4M3 = 0x7E  # 448; 0x7F is NaN
_CHUNK_CODES = 1 << 20  # codes held unpacked at once: 1 MiB stays in the cache


# ---------------------------------------------------------------------------------- one field


def _shifts(field: Field, like: Tensor) -> Tensor:
    steps = torch.arange(0, 8, field.width, dtype=torch.uint8, device=like.device)
    return steps.view(1, 1, -1, 1)


def _take(blocks: Tensor, field: Field) -> Tensor:
    """Values of one field: uint8 [B, block bytes] -> uint8 [B, count]."""
    data = blocks[:, field.at : field.at + field.nbytes]
    if field.width == 8:
        return data
    runs = data.reshape(len(blocks), -1, 1, field.stride)
    return ((runs >> _shifts(field, blocks)) & ((1 << field.width) - 1)).flatten(1)


def _put_(blocks: Tensor, field: Field, values: Tensor) -> None:
    """Write values of one field into ``blocks``; bits above ``width`` are dropped."""
    if field.width < 8:
        per = 8 // field.width
        runs = values.reshape(len(blocks), -1, per, field.stride) & ((1 << field.width) - 1)
        values = (runs << _shifts(field, blocks)).sum(2, dtype=torch.uint8).flatten(1)
    blocks[:, field.at : field.at + field.nbytes] = values


def _take_all(blocks: Tensor, fields: tuple[Field, ...]) -> Tensor:
    """Values whose bits are spread over several fields, low field first."""
    values, width = _take(blocks, fields[0]), fields[0].width
    for field in fields[1:]:
        values = values | (_take(blocks, field) << width)
        width += field.width
    return values


def _put_all_(blocks: Tensor, fields: tuple[Field, ...], values: Tensor) -> None:
    shift = 0
    for field in fields:
        _put_(blocks, field, values >> shift)
        shift += field.width


# --------------------------------------------------------------------------------- sub-scales


def _take_kquant(data: Tensor) -> Tensor:
    """The 12 bytes a[4] b[4] c[4] of Q4_K: 8 scales, then 8 minima, of 6 bits.

    Scale j < 4 is a[j] & 63; scale j >= 4 has its low bits in c & 15 and its top two in a >> 6.
    Minima likewise with b and c >> 4.
    """
    a, b, c = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], dim=1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], dim=1)
    return torch.cat([scales, minima], dim=1)


def _put_kquant(values: Tensor) -> Tensor:
    scales, minima = values[:, :8], values[:, 8:]
    a = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    b = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    c = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([a, b, c], dim=1)


def _take_sub(blocks: Tensor, layout: BlockLayout) -> Tensor:
    at = layout.kquant_scales
    if at is not None:
        return _take_kquant(blocks[:, at : at + 12])
    return _take_all(blocks, layout.sub) - layout.sub_bias  # wraps: two's complement


def _put_sub_(blocks: Tensor, layout: BlockLayout, values: Tensor) -> None:
    at = layout.kquant_scales
    if at is not None:
        blocks[:, at : at + 12] = _put_kquant(values)
    else:
        _put_all_(blocks, layout.sub, values + layout.sub_bias)


# --------------------------------------------------------------------------------------- rows


def _half(blocks: Tensor, at: int, *, negate: bool) -> Tensor:
    """float16 at byte ``at`` of each block, raw bits, the sign bit flipped if ``negate``."""
    bits = blocks[..., at : at + 2].contiguous().view(torch.int16)[..., 0]
    return _flip_sign(bits, negate).contiguous().view(torch.float16)


def _flip_sign(bits: Tensor, flip: bool) -> Tensor:
    return bits ^ -0x8000 if flip else bits


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_CODES // columns)
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def split_rows(rows: Tensor, name: str) -> QuantizedTensor:
    """Canonical form of whole rows of blocks.

    Args:
        rows: uint8 [N, row_bytes], as stored.
        name: type name in lower case: "q4_k".

    Returns:
        ``QuantizedTensor`` of shape (N, K); opaque types keep ``rows`` as their codes.
    """
    ggml, spec = BY_NAME[name], spec_of(name)
    n, per_row = rows.shape[0], rows.shape[1] // ggml.bytes
    shape = (n, per_row * ggml.weights)
    if ggml.kind == "opaque":
        return QuantizedTensor(spec=spec, shape=shape, codes=rows)
    layout = LAYOUTS[name]
    blocks = rows.view(n, per_row, ggml.bytes)
    bits = spec.element.bits
    codes = empty(packed_shape(shape, bits, layout.packing), torch.uint8, str(rows.device))
    first = layout.codes[0]
    if len(layout.codes) == 1 and bits in (4, 8):  # whole bytes, one after another
        stored = blocks[..., first.at : first.at + first.nbytes]
        codes.view(n, per_row, first.nbytes).copy_(stored)
    else:
        for start, stop in _chunks(n, shape[1]):
            part = blocks[start:stop].flatten(0, 1)
            unpacked = _take_all(part, layout.codes).reshape(stop - start, shape[1])
            codes[start:stop] = pack(unpacked, bits, CANONICAL)
    scales: list[Tensor] = []
    offset: list[Tensor] = []
    if layout.has_sub:
        sub = _take_sub(blocks.flatten(0, 1), layout).view(n, per_row, -1)
        scales.append(sub[..., : layout.subs].reshape(n, -1))
        if layout.sub_mins:
            offset.append(sub[..., layout.subs :].reshape(n, -1))
    if layout.d is not None:
        scales.append(_half(blocks, layout.d, negate=False))
    if layout.m is not None:
        offset.append(_half(blocks, layout.m, negate=layout.sub_mins))
    codebook: tuple[Tensor, ...] = ()
    if layout.codebook:
        codebook = (torch.tensor(layout.codebook, dtype=torch.float32, device=rows.device),)
    return QuantizedTensor(
        spec=spec,
        shape=shape,
        codes=codes,
        packing=layout.packing,
        scales=tuple(scales),
        offset=tuple(offset),
        codebook=codebook,
    )


def join_rows(qt: QuantizedTensor, name: str) -> Tensor:
    """Exact inverse of ``split_rows``: uint8 [N, row_bytes]. ``qt`` has the spec of ``name``."""
    ggml = BY_NAME[name]
    if ggml.kind == "opaque":
        return qt.codes
    layout, (n, k) = LAYOUTS[name], qt.shape
    per_row, bits = k // ggml.weights, qt.spec.element.bits
    words = repack(qt.codes, bits, (n, k), qt.packing, CANONICAL)
    out = torch.zeros(n, per_row, ggml.bytes, dtype=torch.uint8, device=words.device)
    for start, stop in _chunks(n, k):
        codes = unpack(words[start:stop], bits, (stop - start, k), CANONICAL)
        part = out[start:stop].view(-1, ggml.bytes)
        _put_all_(part, layout.codes, codes.reshape(-1, ggml.weights))
    if layout.has_sub:
        sub = qt.scales[0].reshape(n * per_row, -1)
        if layout.sub_mins:
            sub = torch.cat([sub, qt.offset[0].reshape(n * per_row, -1)], dim=1)
        _put_sub_(out.view(-1, ggml.bytes), layout, sub)
    for at, values, flip in (
        (layout.d, qt.scales[-1], False),
        (layout.m, qt.offset[-1] if qt.offset else None, layout.sub_mins),
    ):
        if at is not None and values is not None:
            bits16 = _flip_sign(values.contiguous().view(torch.int16), flip)
            out[..., at : at + 2] = bits16.unsqueeze(-1).contiguous().view(torch.uint8)
    return out.view(n, -1)


def check_scales(qt: QuantizedTensor, name: str) -> None:
    """NVFP4's scales are unsigned e4m3: a sign bit has no meaning that two readers share.

    Scales that are infinite or NaN are found by core, for every format.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` with the count and the first place.
    """
    if qt.spec.scales[0].element != "fp8_e4m3":
        return
    bad = qt.scales[0] > _LARGEST_UE4M3
    if count := int(bad.sum()):
        row, column = (int(i) for i in bad.nonzero()[0])
        found = int(qt.scales[0][row, column])
        raise LayoutError(
            f"tensor {name!r}: {count} scale byte(s) are no unsigned e4m3 numbers, the first at "
            f"row {row}, group {column}: {found:#04x}; expected at most {_LARGEST_UE4M3:#04x}. "
            "The file is damaged or was quantized from a broken model.",
            code="Q-VALUE-SCALE",
            tensor=name,
            expected=_LARGEST_UE4M3,
            actual=found,
        )


def dequantize_rows(rows: Tensor, name: str) -> Tensor:
    """float32 [N, K] of whole rows of blocks."""
    return split_rows(rows, name).dequantize()
