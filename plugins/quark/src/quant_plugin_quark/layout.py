"""Stored Quark tensors to canonical ones and back, exactly.

Stored words are kept as they are, described by a ``Packing``. Eight 4-bit codes a word,

    pack_method "reorder"    bits high to low hold the codes  7 5 3 1 6 4 2 0
    pack_method "order"                                       7 6 5 4 3 2 1 0

which run along the outputs if there is a scale per group (the matrix is stored transposed), else
along the inputs. int4 codes are two's complement in the file; the canonical ones are unsigned, so
each has its top bit flipped:

    W = v * s = (c - 8) * s        c = v + 8 = v xor 8

Source: amd-quark 0.13 ``torch/utils/pack.py``, facts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.packing import pack, repack, unpack
from quant_core.spec import CHANNEL, TENSOR, Grain, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_quark.layout_inputs import (
    read_inputs,
    read_rotation,
    stored_inputs,
    stored_rotation,
)
from quant_plugin_quark.values import bad_tensor, byte_codes, check_finite, check_null

if TYPE_CHECKING:
    from quant_plugin_quark.scheme import QuarkScheme

__all__ = ["canonicalize", "serialize"]

_TOP_BITS = -0x77777778  # 0x88888888 as int32: the top bit of each of eight nibbles


# ------------------------------------------------------------------------------------------ scales


def _grid(values: Tensor, grain: Grain, transposed: bool) -> Tensor:
    """A stored scale or zero point as [ceil(N/r), ceil(K/c)]."""
    if grain == TENSOR:
        return values.reshape(1, 1)
    if grain == CHANNEL:
        return values.reshape(-1, 1)
    return values.t().contiguous() if transposed else values


def _ungrid(values: Tensor, grain: Grain, transposed: bool, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``_grid``."""
    if grain not in (TENSOR, CHANNEL) and transposed:
        values = values.t()
    return values.reshape(shape).contiguous()


def _scales(scheme: QuarkScheme, where: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    out = []
    for name, level in zip(scheme.scale_names, scheme.weight.scales, strict=True):
        scale = tensors[name]
        if level.element == "e8m0":
            scale = scale.view(torch.uint8)
        check_finite(f"{where}.{name}", scale)
        if scale.element_size() == 1:
            scale = scale.view(torch.uint8)
        out.append(_grid(scale, level.grain, scheme.transposed))
    return tuple(out)


def _stored_scales(scheme: QuarkScheme, scales: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inverse of ``_scales``."""
    out = {}
    for name, level, scale in zip(scheme.scale_names, scheme.weight.scales, scales, strict=True):
        param = scheme.stored(name)
        values = _ungrid(scale, level.grain, scheme.transposed, param.shape)
        out[name] = values.view(getattr(torch, param.dtypes[0]))
    return out


# ------------------------------------------------------------------------------------- zero points


def _zeros(scheme: QuarkScheme, where: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Zero points on the grid of the finest scale; None if the spec has none of its own."""
    if not scheme.zero_name:
        return None
    stored, grain = tensors[scheme.zero_name], scheme.weight.scales[0].grain
    tensor = f"{where}.{scheme.zero_name}"
    if scheme.zeros == "null":
        check_null(scheme, tensor, stored)
        return None
    if scheme.zeros == "float":
        check_finite(tensor, stored)
        return _grid(stored, grain, scheme.transposed)
    if scheme.zero_packing is not None:
        rows = stored.shape[0] if scheme.transposed else 1
        words = stored.reshape(rows, -1)
        codes = unpack(words, scheme.bits, (rows, scheme.shape[0]), scheme.zero_packing)
    elif scheme.bits < 8:  # one 4-bit value for all, not packed
        codes = (stored & ((1 << scheme.bits) - 1)).to(torch.uint8)
    else:
        codes = byte_codes(stored, tensor, scheme.weight.element.name)
    codes = codes ^ 8 if scheme.signed else codes
    return _grid(codes, grain, scheme.transposed)


def _stored_zeros(scheme: QuarkScheme, zeros: Tensor | None) -> dict[str, Tensor]:
    """Inverse of ``_zeros``."""
    if not scheme.zero_name:
        return {}
    param = scheme.stored(scheme.zero_name)
    dtype = getattr(torch, param.dtypes[0])
    if zeros is None:
        return {param.name: torch.zeros(param.shape, dtype=dtype)}
    grain = scheme.weight.scales[0].grain
    if scheme.zeros == "float":
        return {param.name: _ungrid(zeros, grain, scheme.transposed, param.shape)}
    codes = zeros ^ 8 if scheme.signed else zeros
    if scheme.zero_packing is not None:
        rows = codes.t().contiguous()  # [G, N], or [1, N] for a scale per channel
        return {param.name: pack(rows, scheme.bits, scheme.zero_packing).reshape(param.shape)}
    if scheme.bits < 8:
        value = codes.to(torch.int32)
        value = (value ^ 8) - 8 if scheme.signed else value
        return {param.name: value.reshape(param.shape)}
    signed = scheme.weight.element.kind == "int"
    values = codes.contiguous().view(torch.int8 if signed else torch.uint8)
    values = values if values.dtype == dtype else values.to(dtype)
    return {param.name: _ungrid(values, grain, scheme.transposed, param.shape)}


# ------------------------------------------------------------------------------------------- codes


def _codes(scheme: QuarkScheme, stored: Tensor) -> Tensor:
    """Words as stored; floats and int8 as bytes."""
    if scheme.signed:
        return stored ^ _TOP_BITS
    if stored.dtype == torch.int32:
        return stored
    return stored.view(torch.uint8)


def _stored_codes(scheme: QuarkScheme, codes: Tensor, packing: Packing) -> Tensor:
    """Inverse of ``_codes``; codes may come in any packing."""
    words = repack(codes, scheme.bits, scheme.shape, packing, scheme.packing)
    if scheme.signed:
        return _zero_padding(scheme, words ^ _TOP_BITS)
    return words.view(getattr(torch, scheme.stored("weight").dtypes[0]))


def _zero_padding(scheme: QuarkScheme, words: Tensor) -> Tensor:
    """Codes that fill up the last word are 0 in two's complement."""
    axis = 0 if scheme.packing.axis == "out" else 1
    left = scheme.shape[axis] % 8
    if not left:
        return words
    order = scheme.packing.order or tuple(range(8))
    keep = sum(0xF << (4 * order[i]) for i in range(left))
    words = words.clone()
    words[:, -1] &= keep - (1 << 32) if keep >> 31 else keep
    return words


# ------------------------------------------------------------------------------------------- layer


def canonicalize(scheme: QuarkScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        LayoutError: ``Q-VALUE-CODE``, ``Q-VALUE-SCALE``, ``Q-VALUE-WEIGHT``, ``Q-VALUE-ROTATION``.
        ConfigError: ``Q-CFG-CONFLICT`` if the zero points of a symmetric weight are not 0.
    """
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=_codes(scheme, tensors["weight"]),
        packing=scheme.packing,
        scales=_scales(scheme, where, tensors),
        zeros=_zeros(scheme, where, tensors),
    )
    input_scale, input_zero = read_inputs(scheme, where, tensors)
    rotation = scheme.rotation
    values = () if rotation is None else read_rotation(rotation, where, tensors)
    return LayerTensors(
        operands={"weight": weight},
        bias=tensors.get("bias"),
        input_scale=input_scale,
        input_zero=input_zero,
        transforms=tuple(zip(scheme.transforms, values, strict=True)),
    )


def _check_representable(scheme: QuarkScheme, where: str, tensors: LayerTensors) -> None:
    qt = tensors.weight
    same = qt.spec == scheme.weight and tuple(qt.shape) == scheme.shape and qt.gather is None
    extras = [name for name in ("acc_bias", "out_scale") if getattr(tensors, name) is not None]
    same_maps = tuple(t for t, _ in tensors.transforms) == scheme.transforms
    extras += [] if same_maps else ["other transforms"]
    static = bool(scheme.input_scale)
    extras += ["input_scale"] if (tensors.input_scale is not None) != static else []
    if extras or not same:
        what = f"a weight with {', '.join(extras)}" if extras else f"{qt.spec.label} {qt.shape}"
        raise bad_tensor(
            "Q-LAYOUT-REPRESENT",
            where,
            f"{what} cannot be stored as Quark {scheme.name}",
            f"{scheme.weight.label} {scheme.shape}",
            "Write a format that can hold it.",
        )


def serialize(scheme: QuarkScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what this layer's storage cannot hold.
    """
    _check_representable(scheme, where, tensors)
    qt = tensors.weight
    out = {"weight": _stored_codes(scheme, qt.codes, qt.packing)}
    out |= _stored_scales(scheme, qt.scales)
    out |= _stored_zeros(scheme, qt.zeros)
    out |= stored_inputs(scheme, tensors)
    out |= stored_rotation(scheme, tensors)
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
