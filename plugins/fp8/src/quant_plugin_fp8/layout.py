"""Stored FP8 tensors to canonical ones and back, bit for bit.

    weight  float8_e4m3fn [N, K]     one byte a weight: sign, 4 exponent bits (bias 7), 3 mantissa
                                     bits; 0x7F and 0xFF are NaN, 0x80 is -0
    scale   [] or [1]  |  [N] or [N, 1]  |  [ceil(N/bn), ceil(K/bk)], float or e8m0
    input   [] or [1] float

Codes and e8m0 scales are handed over as uint8 views of the stored bytes. The last block may be
partial in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.dequantize import combine_factors
from quant_core.errors import LayoutError
from quant_core.intspec import cannot_hold, check_tensors
from quant_core.numerics import decode_scale, encode_scale, round_up_power_of_two
from quant_core.packing import repack
from quant_core.quantize import amax_grid, encode_weight
from quant_core.spec import CANONICAL, LayerDesc
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_fp8.scheme import Fp8Scheme

__all__ = ["canonicalize", "quantize", "serialize"]

_TOP = 448.0  # largest finite value of e4m3


def _grid(scheme: Fp8Scheme) -> tuple[int, int]:
    """Shape of the canonical scale: the grid of its grain over [N, K]."""
    n, k = scheme.shape
    rows, cols = scheme.grain
    return (-(-n // rows) if rows else 1, -(-k // cols) if cols else 1)


def _value_error(where: str, count: int, found: str, expected: str) -> LayoutError:
    return LayoutError(
        f"{where}: {count} value(s) {found}, expected {expected}. Quantize the model again.",
        code="Q-VALUE-SCALE",
        tensor=where,
        expected=expected,
        actual=count,
        plugin="fp8",
    )


def _check_scales(scheme: Fp8Scheme, where: str, qt: QuantizedTensor) -> None:
    """No negative scale; zero only where all weights are zero. NaN and infinity are core's."""
    scale = qt.spec.scales[0]
    values = decode_scale(qt.scales[0], scale.element)
    negative = int((values < 0).sum())
    if negative:
        raise _value_error(where, negative, "are negative", "positive scales")
    if bool((values == 0).any()):
        full = combine_factors(qt.scales, qt.spec.scales, scheme.shape)
        bad = (full == 0) & (qt.codes & 0x7F != 0)
        if bool(bad.any()):
            count = int((values == 0).sum())
            raise _value_error(where, count, "are zero over weights that are not", "no such zero")


def _check_input(where: str, value: Tensor) -> None:
    bad = ~(torch.isfinite(value) & (value > 0))
    if bool(bad.any()):
        raise _value_error(where, int(bad.sum()), f"({value.item()!r})", "a positive input scale")


def canonicalize(
    scheme: Fp8Scheme, layer: LayerDesc, tensors: Mapping[str, Tensor]
) -> LayerTensors:
    """Stored tensors to canonical form.

    Shapes:  see the module's docstring  ->  codes uint8 (N, K), scale on the grid of its grain,
             input_scale (1,)
    Raises:  CheckpointError for what is missing; LayoutError ``Q-LAYOUT-SHAPE``,
             ``Q-LAYOUT-DTYPE``, ``Q-VALUE-SCALE``; NaN codes are core's
    """
    check_tensors(layer, scheme.params(layer), tensors, plugin="fp8")
    codes = tensors["weight"].contiguous().view(torch.uint8)
    scale = tensors[scheme.scale_name].reshape(_grid(scheme))
    if scheme.weight.scales[0].element == "e8m0":
        scale = scale.contiguous().view(torch.uint8)
    weight = QuantizedTensor(spec=scheme.weight, shape=scheme.shape, codes=codes, scales=(scale,))
    _check_scales(scheme, f"{layer.stored}.{scheme.scale_name}", weight)
    input_scale = None
    if scheme.input_name:
        input_scale = tensors[scheme.input_name].reshape(1)
        _check_input(f"{layer.stored}.{scheme.input_name}", input_scale)
    return LayerTensors(
        operands={"weight": weight}, bias=tensors.get("bias"), input_scale=input_scale
    )


def _check_representable(scheme: Fp8Scheme, layer: LayerDesc, tensors: LayerTensors) -> None:
    qt, want = tensors.weight, scheme.weight
    extras = [n for n in ("acc_bias", "out_scale", "input_zero") if getattr(tensors, n) is not None]
    if (tensors.input_scale is not None) != bool(scheme.input_name):
        extras.append("another kind of input scale")
    extras += ["transforms"] if tensors.transforms else []
    extras += sorted(tensors.operands.keys() - {"weight"})
    same = replace(qt.spec, ties=want.ties) == want and tuple(qt.shape) == scheme.shape
    if extras or not same:
        found = ", ".join(extras) or f"{qt.spec.label} {tuple(qt.shape)}"
        expected = f"{want.label} {scheme.shape} alone"
        raise cannot_hold(layer.name, found, scheme.name, expected, plugin="fp8")


def serialize(scheme: Fp8Scheme, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if this scheme cannot hold ``tensors``.
    """
    _check_representable(scheme, layer, tensors)
    qt = tensors.weight
    codes = repack(qt.codes, 8, scheme.shape, qt.packing, CANONICAL).contiguous()
    stored: torch.dtype = getattr(torch, scheme.scale_dtype)
    scale = qt.scales[0].contiguous()
    scale = scale.view(stored) if scale.dtype == torch.uint8 else scale
    out = {
        "weight": codes.view(torch.float8_e4m3fn),
        scheme.scale_name: scale.reshape(scheme.scale_shape),
    }
    if tensors.input_scale is not None:
        out[scheme.input_name] = tensors.input_scale.reshape(scheme.input_shape)
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out


def quantize(
    scheme: Fp8Scheme, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
) -> LayerTensors:
    """Float weight [N, K] to codes: s = max|W| / 448 per block, rounded up for ue8m0.

    Args:
        stats: for a static scheme ``input_amax``, the largest magnitude of the layer's input.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity, ``Q-LAYOUT-REPRESENT`` for a static
            scheme without stats.
    """
    bad = int((~torch.isfinite(dense)).sum())
    if bad:
        raise LayoutError(
            f"{layer.name}: {bad} of {dense.numel()} weights are NaN or infinite, expected finite "
            "numbers. Repair the source checkpoint.",
            code="Q-VALUE-WEIGHT",
            tensor=layer.name,
            actual=bad,
            plugin="fp8",
        )
    input_scale = None
    if scheme.input_name:
        if stats is None or "input_amax" not in stats:
            raise cannot_hold(
                layer.name, "no measured input range", scheme.name, "input_amax", plugin="fp8"
            )
        input_scale = (stats["input_amax"].float().reshape(1) / _TOP).clamp(min=2.0**-126)
        input_scale = input_scale.to(getattr(torch, scheme.input_dtype))
    scale = amax_grid(dense, scheme.grain) / _TOP
    element = scheme.weight.scales[0].element
    if scheme.ue8m0 or element == "e8m0":
        scale = round_up_power_of_two(scale)
    scale = encode_scale(torch.where(scale == 0, 1.0, scale), element)
    codes = encode_weight(dense, scheme.weight, (scale,))
    weight = QuantizedTensor(spec=scheme.weight, shape=scheme.shape, codes=codes, scales=(scale,))
    return LayerTensors(operands={"weight": weight}, input_scale=input_scale)
