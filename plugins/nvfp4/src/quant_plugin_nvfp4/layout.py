"""Stored ModelOpt tensors to canonical ones and back, exactly.

    fp4    two columns of a row in a byte, the even one low: the canonical order, kept as it is
    fp8    one byte each, kept as it is
    int4   two rows of a column in a byte, the even one low, two's complement:

               byte [r, k] = W[2r, k] & 15 | W[2r+1, k] << 4

           kept in that order; flipping the top bit of each half gives codes v + 8
    int8   one byte each, two's complement, kept as it is

Scales are used as they are stored, never derived again; small floats are views of their bytes.

Source: ModelOpt 0.47.0 ``quantization/qtensor/nvfp4_tensor.py``, ``fp8_tensor.py``,
``mxfp8_tensor.py``; ``export/quant_utils.py`` (pack_int4_in_uint8, to_quantized_weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.packing import repack
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_nvfp4.scheme import SMOOTH

if TYPE_CHECKING:
    from quant_plugin_nvfp4.scheme import ModelOptScheme

__all__ = ["canonicalize", "serialize"]

_SIGNS = 0x88  # the top bit of both halves of a byte


def _bad(code: str, tensor: str, found: str, expected: str, fix: str) -> LayoutError:
    return LayoutError(
        f"{tensor}: {found}, expected {expected}. {fix}",
        code=code,
        tensor=tensor,
        expected=expected,
        actual=found,
        plugin="nvfp4",
    )


def _check_positive(tensor: str, scale: Tensor) -> None:
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        found = f"{int(bad.sum())} of {bad.numel()} values are not positive and finite"
        found += f" (first: {scale[bad][0].item()})"
        fix = "Calibrate and quantize again."
        raise _bad("Q-VALUE-SCALE", tensor, found, "finite positive scales", fix)


def _codes(scheme: ModelOptScheme, weight: Tensor) -> Tensor:
    """Raw codes in the order of ``Algo.packing``."""
    return weight ^ _SIGNS if scheme.algo.weight == "int4" else weight.view(torch.uint8)


def _scales(
    scheme: ModelOptScheme, where: str, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The factors of the weight, finest first; a grid [rows, columns] each."""
    fine = tensors["weight_scale"]
    fine = fine.view(torch.uint8) if fine.element_size() == 1 else fine
    if fine.dim() == 4:
        fine = fine[:, 0, :, 0]
    elif fine.dim() < 2:
        fine = fine.reshape(-1, 1)
    if not scheme.algo.second:
        return (fine,)
    second = tensors["weight_scale_2"]
    _check_positive(f"{where}.weight_scale_2", second)
    second = second.reshape(1, 1)
    return (fine, *(second for _ in scheme.weight.scales[1:]))


def canonicalize(scheme: ModelOptScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        LayoutError: ``Q-VALUE-SCALE``, ``Q-VALUE-WEIGHT``.
    """
    weight = QuantizedTensor(
        spec=scheme.weight,
        shape=scheme.shape,
        codes=_codes(scheme, tensors["weight"]),
        packing=scheme.algo.packing,
        scales=_scales(scheme, where, tensors),
    )
    for name in ("input_scale", "pre_quant_scale"):
        if name in tensors:
            _check_positive(f"{where}.{name}", tensors[name])
    static = tensors.get("input_scale")
    smooth = tensors.get("pre_quant_scale")
    return LayerTensors(
        operands={"weight": weight},
        bias=tensors.get("bias"),
        input_scale=None if static is None else static.reshape(1),
        transforms=() if smooth is None else ((SMOOTH, (smooth,)),),
    )


# --------------------------------------------------------------------------------------- writing


def _check_representable(scheme: ModelOptScheme, where: str, tensors: LayerTensors) -> None:
    qt, want = tensors.weight, scheme.weight
    extras = [n for n in ("acc_bias", "out_scale", "input_zero") if getattr(tensors, n) is not None]
    extras += ["input_scale"] if (tensors.input_scale is None) == scheme.algo.static_input else []
    maps = tuple(t for t, _ in tensors.transforms)
    extras += ["transforms"] if maps != ((SMOOTH,) if scheme.smoothed else ()) else []
    extras += sorted(tensors.operands.keys() - {"weight"})
    if extras or qt.spec != want or tuple(qt.shape) != scheme.shape or qt.gather is not None:
        what = f"a weight, with or without {', '.join(extras)}," if extras else qt.spec.label
        raise _bad(
            "Q-LAYOUT-REPRESENT",
            where,
            f"{what} of shape {tuple(qt.shape)} cannot be stored as {scheme.algo.name}",
            f"{want.label} {scheme.shape}",
            "Write a format that can hold it.",
        )


def _stored_codes(scheme: ModelOptScheme, qt: QuantizedTensor) -> Tensor:
    algo = scheme.algo
    codes = repack(qt.codes, algo.element.bits, scheme.shape, qt.packing, algo.packing)
    if algo.weight == "int4":
        return codes ^ _SIGNS
    return codes.view(getattr(torch, algo.stored[0]))


def serialize(scheme: ModelOptScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what this layer's algorithm cannot hold.
    """
    _check_representable(scheme, where, tensors)
    qt = tensors.weight
    fine, *second = qt.scales
    stored = fine.contiguous().view(getattr(torch, scheme.scale_dtype))
    out = {
        "weight": _stored_codes(scheme, qt),
        "weight_scale": stored.reshape(scheme.scale_shape),
    }
    if second:
        if any(not torch.equal(second[0], other) for other in second[1:]):
            found = "two fp8 scales that do not cancel"
            fix = "Write a format that can hold it."
            raise _bad("Q-LAYOUT-REPRESENT", where, found, "one weight_scale_2", fix)
        out["weight_scale_2"] = second[0].reshape(scheme.one_value("weight_scale_2"))
    if tensors.input_scale is not None:
        out["input_scale"] = tensors.input_scale.reshape(scheme.one_value("input_scale"))
    for _, (smooth,) in tensors.transforms:
        out["pre_quant_scale"] = smooth
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
