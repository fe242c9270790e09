"""HQQ tensors to canonical ones and back, exactly.

The matrix is reshaped to rows of one group each, [R, group_size], and packed along those rows: the
rows are cut into equal parts, and one word takes the code of the same place in every part, the
first part in the highest bits. For 4 bits, R = 6:

    W_q row 0    row 0 << 4 | row 3
    W_q row 1    row 1 << 4 | row 4
    W_q row 2    row 2 << 4 | row 5

    parts    4 bits: 2, 2 bits: 4, 1 bit: 8 in a uint8;  3 bits: 10 in an int32 (bits 27..29 first,
             rows filled up with zeros);  5 to 8 bits: one code a byte

No ``Packing`` spans rows so far apart, so codes are packed again on loading; words and padding come
back from them exactly.

Source: hqq 0.2.8.post1 ``core/bitpack.py``, ``core/quantize.py`` (Quantizer.dequantize).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.flat import flat_to_grid, grid_to_flat
from quant_core.intspec import cannot_hold
from quant_core.packing import pack, unpack
from quant_core.rewrites.grains import with_grains
from quant_core.spec import CANONICAL, TENSOR, QuantSpec
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_hqq.meta import Meta
from quant_plugin_hqq.scheme import HqqScheme

__all__ = ["canonicalize", "codes_of", "pack_words", "serialize", "unpack_words"]

_PIECE = 1 << 17  # pairs of words in work at once


def _code_error(where: str, found: str, expected: str) -> LayoutError:
    return LayoutError(
        f"{where}.W_q: {found}, expected {expected}. The checkpoint is damaged; export it again.",
        code="Q-VALUE-CODE",
        tensor=f"{where}.W_q",
        expected=expected,
        actual=found,
        plugin="hqq",
    )


def unpack_words(words: Tensor, meta: Meta, where: str) -> Tensor:
    """One code per byte.

    Shapes:  words [word rows, group_size]  ->  uint8 (N, K)
    Raises:  LayoutError for codes beyond the bits, or padding that is not zero.
    """
    shifts = meta.order.shifts
    mask = 255 if len(shifts) == 1 else (1 << meta.bits) - 1
    parts = [((words >> s) & mask).to(torch.uint8) for s in shifts]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    if bool(rows[meta.rows :].any()):
        raise _code_error(where, "codes beyond the last group", "zeros")
    codes = rows[: meta.rows].reshape(meta.shape)
    if meta.bits < 8 and len(shifts) == 1 and int(codes.max()) >> meta.bits:
        found = f"a code of {int(codes.max())}"
        raise _code_error(where, found, f"at most {(1 << meta.bits) - 1} for nbits={meta.bits}")
    return codes


def _canonical_nibbles(words: Tensor, meta: Meta) -> Tensor:
    """Canonical codes of 4-bit words whose parts are whole: uint8 (N, K / 2).

    A word holds a code of the first half of the matrix above one of the second; two neighbours
    make a byte, 16 bits at a time, in pieces that stay in the cache.
    """
    pairs = words.reshape(-1).view(torch.int16)
    out = torch.empty(2, pairs.numel(), dtype=torch.uint8, device=words.device)
    for half, shift in enumerate(meta.order.shifts):
        for start in range(0, pairs.numel(), _PIECE):
            both = (pairs[start : start + _PIECE] >> shift) & 0x0F0F
            out[half, start : start + _PIECE] = both | (both >> 4)  # the low byte
    return out.view(meta.shape[0], -1)


def codes_of(words: Tensor, meta: Meta, where: str) -> Tensor:
    """Canonical codes of ``words``; raises as ``unpack_words``."""
    whole = meta.packing == "4bit_u8" and 2 * meta.word_rows == meta.rows
    whole = whole and meta.shape[1] % 2 == 0
    if whole and words.numel() % 2 == 0 and words.storage_offset() % 2 == 0:
        return _canonical_nibbles(words, meta)
    return pack(unpack_words(words, meta, where), meta.bits, CANONICAL)


def pack_words(codes: Tensor, meta: Meta) -> Tensor:
    """Inverse of ``unpack_words``: uint8 (N, K) to words."""
    shifts, dtype = meta.order.shifts, getattr(torch, meta.order.word)
    rows = codes.reshape(meta.rows, meta.group_size)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, meta.word_rows * len(shifts) - meta.rows))
    out = torch.zeros(meta.word_rows, meta.group_size, dtype=dtype, device=codes.device)
    for part, shift in zip(rows.to(dtype).split(meta.word_rows), shifts, strict=True):
        out |= part << shift
    return out


def _check_meta(scheme: HqqScheme, where: str, tensors: Mapping[str, Tensor]) -> None:
    """An expert of a stack is described as the first one."""
    for name, _, _, raw in scheme.meta.stored:
        tensor = tensors.get(name)
        found = b"" if tensor is None else bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        if found != raw:
            raise LayoutError(
                f"{where}.{name}: holds {found[:32]!r}, expected {raw[:32]!r} as in the rest of "
                "its stack. Quantize all experts alike.",
                code="Q-LAYOUT-FUSED",
                tensor=f"{where}.{name}",
                expected=raw,
                actual=found,
                plugin="hqq",
            )


def _check_zeros(zeros: Tensor, where: str) -> None:
    if not bool(torch.isfinite(zeros).all()):
        raise LayoutError(
            f"{where}.zero: holds NaN or infinity, expected finite zero points. "
            "The quantization overflowed; quantize again.",
            code="Q-VALUE-SCALE",
            tensor=f"{where}.zero",
            plugin="hqq",
        )


def canonicalize(scheme: HqqScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors to canonical form.

    Raises:
        LayoutError: ``Q-VALUE-CODE``, ``Q-VALUE-SCALE`` (zeros), ``Q-LAYOUT-FUSED`` (an expert
            described unlike its stack).
    """
    meta = scheme.meta
    _check_meta(scheme, where, tensors)
    _check_zeros(tensors["zero"], where)
    words = tensors["W_q"].view(getattr(torch, meta.order.word))
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=codes_of(words, meta, where),
        scales=(flat_to_grid(tensors["scale"].reshape(-1), meta.group_size, scheme.shape),),
        zeros=flat_to_grid(tensors["zero"].reshape(-1), meta.group_size, scheme.shape),
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def _checked(lt: LayerTensors, scheme: HqqScheme, where: str) -> tuple[QuantizedTensor, Tensor]:
    """The weight and its zeros, if nothing but grains differs from the scheme's meaning."""
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(lt, name) is not None]
    extras += ["transforms"] if lt.transforms else []
    extras += sorted(lt.operands.keys() - {"weight"})
    if extras:
        expected = "a weight and a bias only"
        raise cannot_hold(where, ", ".join(extras), "HQQ", expected, plugin="hqq")
    qt = lt.weight

    def whole(spec: QuantSpec) -> QuantSpec:
        return with_grains(spec, lambda s: TENSOR)

    if whole(qt.spec) != whole(scheme.weight) or tuple(qt.shape) != scheme.shape:
        found = f"{qt.spec.label} of shape {tuple(qt.shape)}"
        want = f"{scheme.weight.label} of {scheme.shape}"
        raise cannot_hold(where, found, "HQQ", want, plugin="hqq")
    if qt.zeros is None:
        raise cannot_hold(where, "a weight without zeros", "HQQ", "zeros", plugin="hqq")
    return qt, qt.zeros


def serialize(scheme: HqqScheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for another meaning, or scales finer than the groups.
    """
    meta = scheme.meta
    qt, zeros = _checked(lt, scheme, where)
    codes = unpack(qt.codes, meta.bits, scheme.shape, qt.packing)
    grain, group = qt.spec.scales[0].grain, meta.group_size
    out = {
        "W_q": pack_words(codes, meta).view(getattr(torch, scheme.word_dtype)),
        "scale": grid_to_flat(qt.scales[0], grain, group, scheme.shape, where).view(-1, 1),
        "zero": grid_to_flat(zeros, grain, group, scheme.shape, where).view(-1, 1),
    }
    for name, dtype, shape, raw in meta.stored:
        values = torch.tensor(list(raw), dtype=torch.uint8, device=qt.codes.device)
        out[name] = values.view(getattr(torch, dtype)).view(shape)
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out
