"""Stored small-float codes and scales to canonical ones and back: no byte is changed.

    fp8        one byte each
    fp6, fp4   one stream of bits per row, from the low end of each byte: the canonical order

Scales are viewed as matrices of their grid; those of small floats as bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.floatspec import scale_grid
from quant_core.intspec import cannot_hold
from quant_core.packing import repack
from quant_core.spec import CANONICAL, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    from quant_core.floatspec import FloatScheme

__all__ = ["canonicalize", "check_positive", "read_codes", "serialize", "write_codes"]


def check_positive(tensor: str, scale: Tensor, *, plugin: str) -> None:
    """A scale of one value, or several, that is used as a factor or divisor.

    Raises:
        LayoutError: ``Q-VALUE-SCALE``.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        found = scale.flatten()[0].item()
        raise LayoutError(
            f"{tensor}: has value {found}, expected a finite positive scale. "
            "Calibrate and quantize again.",
            code="Q-VALUE-SCALE",
            tensor=tensor,
            expected="a finite positive scale",
            actual=found,
            plugin=plugin,
        )


def read_codes(codes: Tensor) -> Tensor:
    """Codes as bytes, as stored: uint8 (packed), or float8_e4m3fn."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)


def write_codes(codes: Tensor, bits: int, shape: tuple[int, int], packing: Packing) -> Tensor:
    """Inverse of ``read_codes``; codes may come in any packing."""
    raw = repack(codes, bits, shape, packing, CANONICAL)
    return raw if bits < 8 else raw.view(torch.float8_e4m3fn)


def canonicalize(scheme: FloatScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        LayoutError: ``Q-VALUE-SCALE``.
    """
    scales = []
    for stored, scale in zip(scheme.scales, scheme.weight.scales, strict=True):
        value = tensors[stored.name]
        if scale.inverse:
            check_positive(f"{where}.{stored.name}", value, plugin=scheme.plugin)
        if value.element_size() == 1:
            value = value.view(torch.uint8)
        scales.append(value.reshape(scale_grid(scheme.shape, scale.grain)))
    qt = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=read_codes(tensors[scheme.codes]),
        scales=tuple(scales),
    )
    input_scale = None
    if scheme.input_scale is not None:
        input_scale = tensors[scheme.input_scale.name].reshape(1)
        check_positive(f"{where}.{scheme.input_scale.name}", input_scale, plugin=scheme.plugin)
    return LayerTensors(operands={"weight": qt}, bias=tensors.get("bias"), input_scale=input_scale)


def _check_representable(scheme: FloatScheme, where: str, lt: LayerTensors) -> None:
    extras = [n for n in ("acc_bias", "out_scale", "input_zero") if getattr(lt, n) is not None]
    extras += ["transforms"] if lt.transforms else []
    if (lt.input_scale is None) != (scheme.input_scale is None):
        extras.append("another kind of input scale")
    found = ", ".join(extras)
    if not extras and (lt.weight.spec != scheme.weight or lt.weight.shape != scheme.shape):
        found = f"{lt.weight.spec.label} {lt.weight.shape}"
    if found:
        expected = f"{scheme.weight.label} {scheme.shape}"
        raise cannot_hold(where, found, scheme.name, expected, plugin=scheme.plugin)


def serialize(scheme: FloatScheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    _check_representable(scheme, where, lt)
    qt = lt.weight
    out = {scheme.codes: write_codes(qt.codes, qt.spec.element.bits, scheme.shape, qt.packing)}
    for stored, value in zip(scheme.scales, qt.scales, strict=True):
        out[stored.name] = value.contiguous().view(getattr(torch, stored.dtype)).reshape(
            stored.shape
        )  # fmt: skip
    if scheme.input_scale is not None and lt.input_scale is not None:
        out[scheme.input_scale.name] = lt.input_scale.reshape(scheme.input_scale.shape)
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out
