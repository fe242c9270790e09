"""Canonical tensors into blocks of 32 rows and back.

    codes     of any packing     ->  uint8 [blocks, K / per, 32, 4]     see csrc/qk.h
    a grid    (N, G)             ->  [blocks, G, 32] of its own type
    factors   made of scales that C does not read (support.py): float32 [blocks, G, 32]
    the rest  as it is (bias, gather, a scale per tensor, tables, what factors were made of)

2- and 3-bit codes are widened to 4 bits, 5- to 7-bit codes to 8 (6-bit floats with their sign in
the top bit); values do not change and ``read``
gives the canonical bytes back.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.dequantize import combine_factors
from quant_core.numerics import scale_dtype
from quant_core.packing import WORD_BITS, pack, repack, unpack
from quant_core.spec import CANONICAL, Packing
from quant_core.tensors import QuantizedTensor
from quant_kernels_cpu.library import library
from quant_kernels_cpu.loading import Grid, source_for, source_of
from quant_kernels_cpu.stored import stored_shapes
from quant_kernels_cpu.support import ROWS, ZERO_CODE, ZERO_FLOAT, Layout
from quant_kernels_cpu.support_int8 import Int8Layout

__all__ = [
    "buffer_shapes",
    "clear_padding_",
    "factor_grid",
    "int8_buffer_shapes",
    "read_codes",
    "read_grid",
    "write_codes_",
    "write_grid_",
]


def buffer_shapes(layout: Layout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Buffer name -> (shape without the expert axis, dtype), in the order of the contract."""
    if layout.order:
        return stored_shapes(layout)
    b, k = layout.blocks, layout.k

    def grid(prefix: str, i: int) -> tuple[tuple[int, ...], torch.dtype]:
        f = (layout.scales if prefix == "scales" else layout.offsets)[i]
        shape = (1, 1) if f.single else (b, -(-k // f.group), ROWS)
        return shape, scale_dtype(f.element)

    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((b, k // layout.per, ROWS, 4), torch.uint8)
    }
    for i, s in enumerate(layout.stored):
        shape = (-(-layout.n // s.rows) if s.rows else 1, -(-k // s.columns) if s.columns else 1)
        out[f"scales_{i}"] = (shape, scale_dtype(s.element))
    if layout.stored:
        out["factors"] = grid("scales", 0)
    else:
        out |= {f"scales_{i}": grid("scales", i) for i in range(len(layout.scales))}
    if layout.zero in (ZERO_CODE, ZERO_FLOAT):
        dtype = scale_dtype(layout.zero_element) if layout.zero == ZERO_FLOAT else torch.uint8
        out["zeros"] = ((b, -(-k // layout.scales[0].group), ROWS), dtype)
    out |= {f"offset_{i}": grid("offset", i) for i in range(len(layout.offsets))}
    if layout.gather:
        out["gather"] = ((k,), torch.int32)
    if layout.bias_dtype:
        out["bias"] = ((layout.n,), getattr(torch, layout.bias_dtype))
    for i, size in enumerate(layout.codebooks):
        out[f"codebook_{i}"] = ((size,), torch.float32)
    return out


def factor_grid(weight: QuantizedTensor, group: int) -> Tensor:
    """The product of all scales as float32 (N, G), in the order and rounding of the oracle."""
    n, k = weight.shape
    scales = tuple(
        replace(s, grain=(s.grain[0], s.grain[1] // group if s.grain[1] < k else 0))
        for s in weight.spec.scales
    )
    shape = (n, -(-k // group))
    return combine_factors(weight.scales, scales, shape, weight.codebook).expand(shape)


def int8_buffer_shapes(layout: Int8Layout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The same for a layer with int8 activations; ``sums`` are those of the weight's codes."""
    b, n, groups = layout.blocks, layout.n, -(-layout.k // layout.group)
    codes: tuple[int, ...] = (b, layout.k // layout.per, ROWS, 4)
    grid: tuple[int, ...] = (b, groups, ROWS)
    if layout.stored:
        codes, grid = (n, layout.k), (n, groups)
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": (codes, torch.uint8),
        "scales_0": ((1, 1) if layout.single else grid, scale_dtype(layout.scale)),
    }
    if layout.sums:
        out["sums"] = (grid, torch.int32)
    if layout.bias_dtype:
        out["bias"] = ((n,), getattr(torch, layout.bias_dtype))
    if layout.acc_bias:
        out["acc_bias"] = ((n,), torch.int32)
    if layout.out_scale:
        out["out_scale"] = ((n,), torch.float32)
    if layout.input_scale:
        out["input_scale"] = ((1,), scale_dtype(layout.input_scale))
    if layout.input_zero:
        out["input_zero"] = ((1,), torch.uint8)
    return out


def is_grid(name: str, layout: Layout | Int8Layout) -> bool:
    """Whether a buffer of this name lies in blocks, unless it is one value for the matrix."""
    if name in ("codes", "gather", "bias") or name.startswith("codebook"):
        return False
    kept = isinstance(layout, Layout) and layout.stored and name.startswith("scales")
    return not kept


def clear_padding_(name: str, buffer: Tensor, layout: Layout | Int8Layout) -> None:
    """Zero the rows that fill up the last block: what is kept does not depend on old memory."""
    used = layout.n % ROWS
    if isinstance(layout, Int8Layout) and layout.stored:
        return
    if name == "codes" and used:
        buffer[..., -1, :, used:, :] = 0
    elif used and is_grid(name, layout) and buffer.shape[-1] == ROWS and buffer.dim() > 2:
        buffer[..., -1, :, used:] = 0


def write_grid_(target: Tensor, row: int, values: Tensor) -> None:
    """values (rows, G), of any strides, into target [blocks, G, 32] from output row ``row`` on."""
    size, (rows, groups) = values.element_size(), values.shape
    steps = (stride * size for stride in values.stride())
    grid = Grid(groups, size, *steps)
    library().c.qk_load_grid(target.data_ptr(), values.data_ptr(), row, rows, ctypes.byref(grid))


def read_grid(source: Tensor, n: int) -> Tensor:
    """Inverse of ``write_grid_``: [..., blocks, G, 32] -> (..., N, G)."""
    rows = source.transpose(-1, -2).flatten(-3, -2)
    return rows[..., :n, :].contiguous()


def write_codes_(
    target: Tensor, row: int, codes: Tensor, packing: Packing, layout: Layout | Int8Layout
) -> None:
    """Stored codes of some rows into target [blocks, K / per, 32, 4] from row ``row`` on.

    Shapes:  codes packed_shape((rows, K), bits, packing)
    """
    rows, bits = _row_count(codes, packing, layout), layout.bits
    source = source_for(packing, layout)
    unit = 2 if packing.word == "uint8" else 8  # rows that share words
    cut = packing.axis == "out" and (row % unit or rows % unit or layout.k % unit)
    if source is None or cut:
        codes = repack(codes, bits, (rows, layout.k), packing, CANONICAL)
        if bits != layout.width:
            codes = unpack(codes, bits, (rows, layout.k), CANONICAL)
            codes = codes << layout.up if layout.width == 8 else pack(codes, 4, CANONICAL)
        source = source_of(
            CANONICAL, bits=layout.width, width=layout.width, k=layout.k, bias=layout.bias
        )
        assert source is not None, "a stream of whole codes is always read"
    codes = codes.contiguous()
    library().c.qk_load(target.data_ptr(), codes.data_ptr(), row, rows, ctypes.byref(source))


def _row_count(codes: Tensor, packing: Packing, layout: Layout | Int8Layout) -> int:
    """Rows held by ``codes``, whose shape was checked."""
    size = codes.shape[1] if packing.k_major else codes.shape[0]
    return size * (WORD_BITS[packing.word] // layout.bits) if packing.axis == "out" else size


def read_codes(source: Tensor, layout: Layout | Int8Layout) -> Tensor:
    """Inverse of ``write_codes_``: the canonical bytes of all N rows."""
    stream = torch.empty(layout.n, layout.k * layout.width // 8, dtype=torch.uint8)
    library().c.qk_unload(
        source.data_ptr(), stream.data_ptr(), layout.k // layout.per, layout.n, layout.width,
        layout.bias,
    )  # fmt: skip
    if layout.bits == layout.width:
        return stream
    single = (
        stream >> layout.up
        if layout.width == 8
        else unpack(stream, 4, (layout.n, layout.k), CANONICAL)
    )
    return pack(single, layout.bits, CANONICAL)
