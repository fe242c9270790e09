"""TorchAO tensors to canonical ones and back, exactly.

    _weight_qdata       int8 [N, K], whatever the bits; float8 [N, K]
    _weight_scale       float, one value a block: [N / rows, K / columns]
    _weight_zero_point  int8 or float, shape of the scale

8-bit codes are kept. Narrower integers are packed on loading, code v + 2**(bits - 1), and zeros
move along; with float zeros they stay signed. Integer zeros that are all 0, as symmetric recipes
write them, become a constant and are written back as zeros.

Source: torchao 0.18.0 ``quantization/quant_primitives.py`` (dequantize_affine).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.flat import shrink_grid
from quant_core.intspec import SCALE_ELEMENTS, cannot_hold
from quant_core.packing import pack, repack, unpack
from quant_core.rewrites.grains import with_grains
from quant_core.spec import CANONICAL, TENSOR, QuantSpec, Zero
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_torchao.scheme import TorchaoScheme

__all__ = ["canonicalize", "serialize"]


def _range_error(where: str, name: str, found: int, bits: int) -> LayoutError:
    half = 1 << (bits - 1)
    return LayoutError(
        f"{where}.{name}: holds {found}, expected {-half} to {half - 1} for int{bits}. "
        "The header names another type; export the checkpoint again.",
        code="Q-VALUE-CODE",
        tensor=f"{where}.{name}",
        expected=(-half, half - 1),
        actual=found,
        plugin="torchao",
    )


def _check_range(where: str, name: str, values: Tensor, bits: int) -> None:
    half = 1 << (bits - 1)
    low, high = (int(v) for v in torch.aminmax(values))
    if low < -half or high >= half:
        raise _range_error(where, name, low if low < -half else high, bits)


def _grid(t: Tensor) -> Tensor:
    """Stored scales or zeros as a matrix; a scalar is one value for the whole weight."""
    return t.reshape(1, 1) if t.dim() < 2 else t


def _check_finite(where: str, zeros: Tensor) -> Tensor:
    if not bool(torch.isfinite(zeros).all()):
        raise LayoutError(
            f"{where}._weight_zero_point: holds NaN or infinity, expected finite zero points. "
            "The quantization overflowed; quantize again.",
            code="Q-VALUE-SCALE",
            tensor=f"{where}._weight_zero_point",
            plugin="torchao",
        )
    return zeros


def _zeros(
    scheme: TorchaoScheme, where: str, stored: Tensor | None
) -> tuple[Zero | None, Tensor | None]:
    """The zero's meaning and its codes."""
    constant = scheme.weight.zero
    if stored is None:
        return constant, None
    if scheme.zero_dtype in SCALE_ELEMENTS:
        return constant, _check_finite(where, _grid(stored))
    if not bool(stored.any()):
        return constant, None
    bits = scheme.entry.bits
    _check_range(where, "_weight_zero_point", stored, bits)
    codes = (_grid(stored).to(torch.int16) + scheme.half).to(torch.uint8)
    if not scheme.half:
        codes = _grid(stored).view(torch.uint8)
    return Zero(kind="code", element=scheme.weight.element.name), codes


def canonicalize(scheme: TorchaoScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors to canonical form.

    Raises:
        LayoutError: ``Q-VALUE-CODE`` for integers beyond their type, ``Q-VALUE-SCALE`` for zeros
            that are not finite.
    """
    codes, bits = tensors["_weight_qdata"], scheme.entry.bits
    if bits < 8:
        _check_range(where, "_weight_qdata", codes, bits)
        raw = (codes + scheme.half).view(torch.uint8) & ((1 << bits) - 1)
        words = pack(raw, bits, CANONICAL)
    else:
        words = codes.view(torch.uint8)
    zero, zeros = _zeros(scheme, where, tensors.get("_weight_zero_point"))
    weight = QuantizedTensor(
        spec=replace(scheme.weight, zero=zero),
        shape=scheme.shape,
        codes=words,
        scales=(_grid(tensors["_weight_scale"]),),
        zeros=zeros,
    )
    return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))


def _checked(lt: LayerTensors, scheme: TorchaoScheme, where: str) -> QuantizedTensor:
    """The weight, if nothing but grains and the kind of its integer zeros differs."""
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    extras = [name for name in names if getattr(lt, name) is not None]
    extras += ["transforms"] if lt.transforms else []
    extras += sorted(lt.operands.keys() - {"weight"})
    if extras:
        expected = "a weight and a bias only"
        raise cannot_hold(where, ", ".join(extras), "TorchAO", expected, plugin="torchao")
    qt = lt.weight

    def whole(spec: QuantSpec) -> QuantSpec:
        return with_grains(spec, lambda s: TENSOR)

    zero = qt.spec.zero
    as_codes = Zero(kind="code", element=scheme.weight.element.name)
    allowed = [scheme.weight.zero]
    if scheme.zero_dtype and scheme.zero_dtype not in SCALE_ELEMENTS:
        allowed.append(as_codes)
    same = whole(replace(qt.spec, zero=scheme.weight.zero)) == whole(scheme.weight)
    if not same or zero not in allowed or tuple(qt.shape) != scheme.shape:
        found = f"{qt.spec.label} of shape {tuple(qt.shape)}"
        want = f"{scheme.weight.label} of {scheme.shape}"
        raise cannot_hold(where, found, "this TorchAO weight", want, plugin="torchao")
    return qt


def _stored_zeros(scheme: TorchaoScheme, qt: QuantizedTensor, where: str) -> Tensor:
    dtype = getattr(torch, scheme.zero_dtype)
    if qt.zeros is None:
        return torch.zeros(scheme.scale_shape, dtype=dtype, device=qt.codes.device)
    want, have = scheme.weight.scales[0].grain, qt.spec.scales[0].grain
    zeros = shrink_grid(qt.zeros, have, want, scheme.shape, where)
    if scheme.half:
        zeros = (zeros.to(torch.int16) - scheme.half).to(dtype)
    return zeros.view(dtype).view(scheme.scale_shape)


def serialize(scheme: TorchaoScheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for another meaning, or scales finer than the blocks.
    """
    qt, bits = _checked(lt, scheme, where), scheme.entry.bits
    if bits < 8:
        raw = unpack(qt.codes, bits, scheme.shape, qt.packing).to(torch.int16)
        sign = 1 << (bits - 1)
        values = raw - scheme.half if scheme.half else (raw ^ sign) - sign
        codes = values.to(torch.int8)
    else:
        codes = repack(qt.codes, 8, scheme.shape, qt.packing, CANONICAL)
        codes = codes.view(getattr(torch, scheme.code_dtype))
    want, have = scheme.weight.scales[0].grain, qt.spec.scales[0].grain
    scales = shrink_grid(qt.scales[0], have, want, scheme.shape, where)
    out = {"_weight_qdata": codes, "_weight_scale": scales.view(scheme.scale_shape)}
    if scheme.zero_dtype:
        out["_weight_zero_point"] = _stored_zeros(scheme, qt, where)
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out
