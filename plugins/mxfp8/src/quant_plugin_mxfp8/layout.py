"""Stored MXFP8 tensors to canonical ones and back, and dense weights to MXFP8.

    weight  float8_e4m3fn [N, K]                  handed over as bytes
    scale   uint8 or float8_e8m0fnu [N, ceil(K/32)]   likewise; the last block may be short

Quantizing: the byte of a block is 127 + ceil(log2(max|w| / 448)), from the bits, and the code is
w / 2^(byte - 127) rounded half to even. A block of zeros gets byte 0, which is 2^-127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.intspec import cannot_hold
from quant_core.packing import repack
from quant_core.quantize import quantize_weight
from quant_core.spec import CANONICAL
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_mxfp8.scheme import RULE

if TYPE_CHECKING:
    from quant_plugin_mxfp8.scheme import Mxfp8Scheme

__all__ = ["canonicalize", "quantize", "serialize"]


def _bad_weights(where: str, count: int, total: int, what: str, fix: str) -> LayoutError:
    return LayoutError(
        f"{where}: {count} of {total} weights are {what}, expected finite numbers. {fix}",
        code="Q-VALUE-WEIGHT",
        tensor=where,
        expected="finite",
        actual=count,
        plugin="mxfp8",
    )


def canonicalize(scheme: Mxfp8Scheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors to canonical form; shapes and dtypes were checked. NaN is reported by core."""
    codes = tensors["weight"].contiguous().view(torch.uint8)
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=codes,
        scales=(tensors[scheme.scale_name].contiguous().view(torch.uint8),),
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def serialize(scheme: Mxfp8Scheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``; codes may come in any packing.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what MXFP8 cannot hold.
    """
    qt = tensors.weight
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(tensors, name) is not None]
    extras += ["transforms"] if tensors.transforms else []
    same = qt.spec == scheme.weight and tuple(qt.shape) == scheme.shape and qt.gather is None
    if extras or not same:
        found = ", ".join(extras) or f"{qt.spec.label} {tuple(qt.shape)}"
        expected = f"{scheme.weight.label} {scheme.shape}"
        raise cannot_hold(where, found, "MXFP8", expected, plugin="mxfp8")
    codes = repack(qt.codes, 8, scheme.shape, qt.packing, CANONICAL).contiguous()
    out = {
        "weight": codes.view(torch.float8_e4m3fn),
        scheme.scale_name: qt.scales[0].contiguous().view(getattr(torch, scheme.scale_dtype)),
    }
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out


def quantize(scheme: Mxfp8Scheme, where: str, dense: Tensor) -> LayerTensors:
    """Float weight [N, K] to canonical form.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity.
    """
    bad = int((~torch.isfinite(dense)).sum())
    if bad:
        fix = "Repair the source checkpoint."
        raise _bad_weights(where, bad, dense.numel(), "NaN or infinite", fix)
    weight = quantize_weight(where, dense, scheme.weight, rule=RULE)
    return LayerTensors(operands={"weight": weight})
