"""Block bytes to canonical tensors and back, bit for bit, by the tables of ``layouts``.

    rows uint8 [N, row_bytes] -> codes: the same rows, as ``BlockLayout.packing`` says
                                 scales: finest first, [N, K / weights per scale]
                                 offset: float16 minima (negated for K-quants), and their codes

Codes stay where they are. Scales are moved as raw bits, NaN payloads survive; where all is to stay
in a mapped file, float16 scales and minima are views of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.packing import repack
from quant_core.packing_fields import bytes_at, put_, take
from quant_core.packing_words import view_as
from quant_core.tensors import QuantizedTensor
from quant_plugin_gguf.layouts import LAYOUTS, BlockLayout, packing_of, spec_of
from quant_plugin_gguf.types import BY_NAME

__all__ = ["check_scales", "dequantize_rows", "join_rows", "split_rows"]

_LARGEST_UE4M3 = 0x7E  # 448; 0x7F is NaN
_SIX, _FOUR, _TOP = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030  # bits of four bytes


# --------------------------------------------------------------------------------- sub-scales


def _take_kquant(data: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes a[4] b[4] c[4] of Q4_K, contiguous: 8 scales and 8 minima of 6 bits, four at once.

    Scale j < 4 is a[j] & 63; scale j >= 4 has its low bits in c & 15 and its top two in a >> 6.
    Minima likewise with b and c >> 4.
    """
    a, b, c = data.view(torch.int32).t()
    scales = torch.stack([a & _SIX, (c & _FOUR) | ((a >> 2) & _TOP)], dim=1)
    minima = torch.stack([b & _SIX, ((c >> 4) & _FOUR) | ((b >> 2) & _TOP)], dim=1)
    return view_as(scales, torch.uint8), view_as(minima, torch.uint8)


def _put_kquant(values: Tensor) -> Tensor:
    scales, minima = values[:, :8], values[:, 8:]
    a = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    b = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    c = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([a, b, c], dim=1)


def _take_sub(blocks: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Finer scales of blocks [B, bytes], and their minima (of no columns where there are none)."""
    at = layout.kquant_scales
    if at is not None:
        return _take_kquant(bytes_at(blocks, at, 12))
    values = take(blocks, layout.sub) - layout.sub_bias  # wraps: two's complement
    return values[:, : layout.subs], values[:, layout.subs :]


def _put_sub_(blocks: Tensor, layout: BlockLayout, values: Tensor) -> None:
    at = layout.kquant_scales
    if at is not None:
        blocks[:, at : at + 12] = _put_kquant(values)
    else:
        put_(blocks, layout.sub, values + layout.sub_bias)


# --------------------------------------------------------------------------------------- rows


def _halves(
    rows: Tensor, layout: BlockLayout, in_place: bool
) -> tuple[Tensor | None, Tensor | None]:
    """float16 scale and minimum of each block of rows [N, row_bytes], raw bits.

    Minima of K-quants have their sign bit flipped. What is copied is taken in one pass over all
    lines of a matrix: both lie side by side.
    """
    d, m, n = layout.d, layout.m, rows.shape[0]
    if d is None:
        return None, None
    if in_place and not layout.sub_mins:
        halves, step = rows.view(torch.float16), layout.nbytes // 2
        return halves[:, d // 2 :: step], None if m is None else halves[:, m // 2 :: step]
    blocks = rows.view(-1, layout.nbytes)
    if m is None:
        return bytes_at(blocks, d, 2).view(torch.float16).view(n, -1), None
    both = bytes_at(blocks, min(d, m), 4).view(torch.int16)
    minima = both[:, int(m > d)]
    if layout.sub_mins:
        minima = minima ^ -0x8000
    scales = both[:, int(d > m)].view(torch.float16)
    return scales.view(n, -1), minima.view(torch.float16).view(n, -1)


def split_rows(rows: Tensor, name: str, *, in_place: bool = False) -> QuantizedTensor:
    """Canonical form of whole rows of blocks.

    Args:
        rows: uint8 [N, row_bytes], as stored.
        name: type name in lower case: "q4_k".
        in_place: float16 scales and minima that are what they stand for are views of the rows.

    Returns:
        ``QuantizedTensor`` of shape (N, K); opaque types keep ``rows`` as their codes.
    """
    ggml, spec = BY_NAME[name], spec_of(name)
    n, per_row = rows.shape[0], rows.shape[1] // ggml.bytes
    shape = (n, per_row * ggml.weights)
    if ggml.kind == "opaque":
        return QuantizedTensor(spec=spec, shape=shape, codes=rows)
    layout = LAYOUTS[name]
    blocks = rows.view(n * per_row, ggml.bytes)
    scales: list[Tensor] = []
    offset: list[Tensor] = []
    if layout.has_sub:
        fine, minima = _take_sub(blocks, layout)
        scales.append(fine.reshape(n, -1))
        if layout.sub_mins:
            offset.append(minima.reshape(n, -1))
    coarse, minimum = _halves(rows, layout, in_place)
    scales += [] if coarse is None else [coarse]
    offset += [] if minimum is None else [minimum]
    codebook: tuple[Tensor, ...] = ()
    if layout.codebook:
        codebook = (torch.tensor(layout.codebook, dtype=torch.float32, device=rows.device),)
    return QuantizedTensor(
        spec=spec,
        shape=shape,
        codes=rows,
        packing=packing_of(name),
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
    if qt.packing == layout.packing:
        words = qt.codes.clone()
    else:
        words = repack(qt.codes, bits, (n, k), qt.packing, layout.packing)
    out = words.view(n, per_row, ggml.bytes)
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
            bits16 = values.contiguous().view(torch.int16)
            bits16 = bits16 ^ -0x8000 if flip else bits16
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
