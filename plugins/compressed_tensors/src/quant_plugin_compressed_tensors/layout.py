"""Stored compressed-tensors tensors to canonical ones and back, exactly.

Packed words are kept as they are, described by a ``Packing``: 3-bit codes of a row, K = 32,

    dense    word 0 = k0 .. k9 and 2 bits of k10, word 1 = the last bit of k10, k11 .. , 3 words
    padded   word 0 = k0 .. k9, 00,               word 1 = k10 .. k19, 00, ...           4 words

The code of a signed value v is v + 2**(b-1), for weights and zero points, so

    W = (v - vz) * s = (c - z) * s

int8 weights of 8 bits keep their two's complement bytes. Activation order (``weight_g_idx``) sorts
columns by group; ``quant_core.rewrites`` does it and undoes it.

Source: compressed-tensors 0.19.0 and 0.9.4 ``compressors``, facts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.floatpack import check_positive, read_codes, write_codes
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.packing import pack, repack, unpack
from quant_core.rewrites import from_gather, to_gather
from quant_core.spec import CANONICAL, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_compressed_tensors.layout_rotations import read_rotations, stored_rotations

if TYPE_CHECKING:
    from quant_plugin_compressed_tensors.floats import FloatScheme
    from quant_plugin_compressed_tensors.packed import PackedScheme
    from quant_plugin_compressed_tensors.plain import PlainScheme
    from quant_plugin_compressed_tensors.scheme import CtScheme

__all__ = [
    "canonicalize",
    "read_float",
    "read_packed",
    "read_plain",
    "serialize",
    "write_float",
    "write_packed",
    "write_plain",
]


def _bad(code: str, tensor: str, found: str, expected: str, fix: str) -> LayoutError:
    return LayoutError(
        f"{tensor}: {found}, expected {expected}. {fix}",
        code=code,
        tensor=tensor,
        expected=expected,
        actual=found,
        plugin="compressed_tensors",
    )


def _grid(scheme: CtScheme, values: Tensor) -> Tensor:
    """A stored scale or zero point as a matrix; one value for all becomes [1, 1]."""
    return values.reshape(1, 1) if scheme.weights.strategy == "tensor" else values


def _ungrid(scheme: CtScheme, values: Tensor) -> Tensor:
    return values.reshape(1) if scheme.weights.strategy == "tensor" else values.contiguous()


def _scales(scheme: CtScheme, where: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The factors of the weight, finest first; small floats as bytes.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` for a factor of 0 that divides.
    """
    scale = _grid(scheme, tensors["weight_scale"])
    if scale.element_size() == 1:
        scale = scale.view(torch.uint8)
    if len(scheme.weight.scales) == 1:
        return (scale,)
    factor = tensors["weight_global_scale"]
    check_positive(f"{where}.weight_global_scale", factor, plugin="compressed_tensors")
    return (scale, factor.reshape(1, 1))


def _stored_scales(scheme: CtScheme, scales: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inverse of ``_scales``."""
    names = ("weight_scale", "weight_global_scale")[: len(scales)]
    out = {"weight_scale": _ungrid(scheme, scales[0].view(getattr(torch, scheme.scale_dtype)))}
    if len(scales) == 2:
        out["weight_global_scale"] = scales[1].reshape(1)
    return {n: out[n].reshape(()) if n in scheme.scalars else out[n] for n in names}


# ---------------------------------------------------------------------- int8 values <-> raw codes


def _to_codes(scheme: CtScheme, values: Tensor, tensor: str) -> Tensor:
    """int8 values to raw codes in uint8: their own bytes (8 bits), or v + 2**(b-1).

    Raises:
        LayoutError: ``Q-VALUE-CODE`` for a value outside the range of ``bits``.
    """
    half = scheme.half
    if scheme.bits == 8:
        return values.view(torch.uint8)
    low, high = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
    if low < -half or high >= half:
        raise _bad(
            "Q-VALUE-CODE",
            tensor,
            f"values from {low} to {high}",
            f"{-half} to {half - 1} for {scheme.bits} bits",
            "num_bits in the config is too small, or the tensor is damaged.",
        )
    return (values + half).view(torch.uint8)


def _from_codes(scheme: CtScheme, codes: Tensor) -> Tensor:
    """Inverse of ``_to_codes``."""
    values = codes.contiguous().view(torch.int8)
    return values if scheme.bits == 8 else values - scheme.half


# --------------------------------------------------------------------------------- pack-quantized


def _float_zeros(scheme: PackedScheme, tensor: str, stored: Tensor) -> Tensor:
    """Zero points of the codes v + 2**(b-1), from those of v.

    Raises:
        LayoutError: ``Q-VALUE-ZERO`` where the sum needs more digits than the type has.
    """
    zeros = stored + scheme.half
    bad = int((zeros - scheme.half != stored).sum())
    if bad:
        found = f"{bad} of {stored.numel()} values lose digits when {scheme.half} is added"
        fix = "Round the zero points to multiples of 2**-20, or store integers."
        raise _bad("Q-VALUE-ZERO", tensor, found, "float zero points that do not", fix)
    return zeros


def read_packed(
    scheme: PackedScheme, where: str, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Packing, Tensor | None]:
    """Words as stored; zero codes uint8 [N, G].

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if ``weight_shape`` says other sizes; ``Q-VALUE-ZERO``.
    """
    n, k = scheme.shape
    said = tuple(int(v) for v in tensors["weight_shape"].tolist())
    if said != (n, k):
        raise _bad(
            "Q-LAYOUT-SHAPE",
            f"{where}.weight_shape",
            f"says {said}",
            f"{(n, k)}, the sizes of the other tensors",
            "The tensor belongs to another layer; export the checkpoint again.",
        )
    zeros = None
    if scheme.zero_dtype == "int32":
        stored = tensors["weight_zero_point"]
        shape = (n, stored.shape[1])
        zeros = unpack(stored, scheme.bits, shape, scheme.zeros_packing).contiguous()
    elif scheme.zero_dtype in SCALE_ELEMENTS:
        zeros = _float_zeros(scheme, f"{where}.weight_zero_point", tensors["weight_zero_point"])
    elif scheme.zero_dtype:
        signed = tensors["weight_zero_point"]
        zeros = _to_codes(scheme, signed, f"{where}.weight_zero_point")
        zeros = _grid(scheme, zeros ^ 128 if scheme.bits == 8 else zeros)
    return tensors["weight_packed"], scheme.packing, zeros


def write_packed(
    scheme: PackedScheme, codes: Tensor, packing: Packing, zeros: Tensor | None
) -> dict[str, Tensor]:
    """Inverse of ``read_packed``; codes may come in any packing."""
    n, k = scheme.shape
    out = {
        "weight_packed": repack(codes, scheme.bits, (n, k), packing, scheme.packing),
        "weight_shape": torch.tensor([n, k], dtype=getattr(torch, scheme.shape_dtype)),
    }
    if scheme.zero_dtype in SCALE_ELEMENTS and zeros is not None:
        stored = (zeros - scheme.half).contiguous()
        if not torch.equal(stored + scheme.half, zeros):
            found, expected = "float zero points", f"those that keep all digits less {scheme.half}"
            fix = "Round them first, or write another format."
            raise _bad("Q-LAYOUT-REPRESENT", "weight_zero_point", found, expected, fix)
        out["weight_zero_point"] = stored
    elif scheme.zero_dtype == "int32" and zeros is not None:
        out["weight_zero_point"] = pack(zeros, scheme.bits, scheme.zeros_packing)
    elif zeros is not None:
        signed = _from_codes(scheme, zeros ^ 128 if scheme.bits == 8 else zeros)
        out["weight_zero_point"] = _ungrid(scheme, signed)
    return out


# ----------------------------------------------------------------------------------- int-quantized


def read_plain(
    scheme: PlainScheme, where: str, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Packing, Tensor | None]:
    """int8 weights to canonical codes; zero codes uint8, shape of the scale."""
    codes = _to_codes(scheme, tensors["weight"], f"{where}.weight")
    if scheme.bits < 8:
        codes = pack(codes, scheme.bits, CANONICAL)
    if not scheme.zero_dtype:
        return codes, CANONICAL, None
    zeros = _to_codes(scheme, tensors["weight_zero_point"], f"{where}.weight_zero_point")
    return codes, CANONICAL, _grid(scheme, zeros)


def write_plain(
    scheme: PlainScheme, codes: Tensor, packing: Packing, zeros: Tensor | None
) -> dict[str, Tensor]:
    """Inverse of ``read_plain``; codes may come in any packing."""
    out = {"weight": _from_codes(scheme, unpack(codes, scheme.bits, scheme.shape, packing))}
    if zeros is not None:
        out["weight_zero_point"] = _ungrid(scheme, _from_codes(scheme, zeros))
    return out


# ---------------------------------------------------------------------------------- small floats


def read_float(
    scheme: FloatScheme, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Packing, Tensor | None]:
    """Codes as stored, as bytes."""
    name = "weight_packed" if scheme.packed else "weight"
    return read_codes(tensors[name]), CANONICAL, None


def write_float(scheme: FloatScheme, codes: Tensor, packing: Packing) -> dict[str, Tensor]:
    """Inverse of ``read_float``; codes may come in any packing."""
    name = "weight_packed" if scheme.packed else "weight"
    return {name: write_codes(codes, scheme.bits, scheme.shape, packing)}


# ------------------------------------------------------------------------------------ all formats


def _check_g_idx(scheme: CtScheme, where: str, g_idx: Tensor, groups: int) -> bool:
    """Whether columns must be sorted.

    Raises:
        LayoutError: ``Q-VALUE-GIDX`` for values out of range, or an order the config denies.
    """
    tensor, size = f"{where}.weight_g_idx", scheme.weights.group_size
    bad = ((g_idx < 0) | (g_idx >= groups)).nonzero().flatten()
    if bad.numel():
        at = int(bad[0])
        found = f"{bad.numel()} values out of range (index {at}: {int(g_idx[at])})"
        fix = "The tensor is damaged; export the checkpoint again."
        raise _bad("Q-VALUE-GIDX", tensor, found, f"0..{groups - 1}", fix)
    plain = torch.arange(g_idx.numel(), dtype=g_idx.dtype) // max(size, 1)
    if not size or torch.equal(g_idx, plain):
        return False
    if scheme.ordered:
        fix = "Set actorder to 'group' if the columns were reordered."
        raise _bad("Q-VALUE-GIDX", tensor, "columns out of order", f"k // {size}", fix)
    return True


def canonicalize(scheme: CtScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-VALUE-CODE``, ``Q-VALUE-GIDX``, ``Q-VALUE-SCALE``,
            ``Q-VALUE-WEIGHT``, ``Q-VALUE-ROTATION``, ``Q-VALUE-ZERO``.
    """
    codes, packing, zeros = scheme.read_codes(where, tensors)
    scales = _scales(scheme, where, tensors)
    qt = QuantizedTensor(
        spec=replace(scheme.weight, gather=False),
        shape=scheme.shape,
        codes=codes,
        packing=packing,
        scales=scales,
        zeros=zeros,
    )
    g_idx = tensors.get("weight_g_idx")
    if g_idx is not None and _check_g_idx(scheme, where, g_idx, scales[0].shape[-1]):
        qt = to_gather(qt, g_idx, scheme.weights.group_size)
    name = scheme.input_scale_name
    input_scale, input_zero = tensors.get(name), tensors.get("input_zero_point")
    if input_scale is not None:
        check_positive(f"{where}.{name}", input_scale, plugin="compressed_tensors")
        input_scale = input_scale.reshape(1)
    return LayerTensors(
        operands={"weight": qt},
        bias=tensors.get("bias"),
        input_scale=input_scale,
        input_zero=None if input_zero is None else input_zero.view(torch.uint8),
        transforms=read_rotations(scheme.rotations, where, tensors),
    )


def _check_representable(scheme: CtScheme, where: str, tensors: LayerTensors) -> None:
    qt, want = tensors.weight, scheme.weight
    constant = qt.spec.zero is not None and qt.spec.zero.kind == "const"
    same_zero = qt.spec.zero == want.zero or (constant and bool(scheme.zero_dtype))
    same = (
        qt.spec.element == want.element
        and qt.spec.scales == want.scales
        and not qt.spec.blocks
        and same_zero
        and (qt.shape == scheme.shape or qt.gather is not None)
        and (qt.gather is None or scheme.has_g_idx)
    )
    static = bool(scheme.input_scale_name)
    extras = [name for name in ("acc_bias", "out_scale") if getattr(tensors, name) is not None]
    same_maps = tuple(t for t, _ in tensors.transforms) == scheme.transforms
    extras += [] if same_maps else ["other transforms"]
    extras += ["input_scale"] if (tensors.input_scale is not None) != static else []
    if extras or not same:
        what = f"a weight with {', '.join(extras)}" if extras else f"{qt.spec.label} {qt.shape}"
        raise _bad(
            "Q-LAYOUT-REPRESENT",
            where,
            f"{what} cannot be stored as {scheme.format}",
            f"{want.label} {scheme.shape}",
            "Write a format, or a config group, that can hold it.",
        )


def _stored_order(
    scheme: CtScheme, where: str, qt: QuantizedTensor
) -> tuple[QuantizedTensor, Tensor]:
    """Columns in input order and the group of each."""
    k, size = scheme.shape[1], scheme.weights.group_size
    if qt.gather is None:
        return qt, torch.arange(k, dtype=torch.int32) // (size or k)
    qt, g_idx = from_gather(qt, k)
    if qt.scales[0].shape[-1] != k // size:
        found = f"{qt.scales[0].shape[-1]} groups in another column order"
        fix = "Undo the reordering, or write another format."
        raise _bad("Q-LAYOUT-REPRESENT", where, found, f"{k // size} groups", fix)
    return qt, g_idx


def serialize(scheme: CtScheme, where: str, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what this layer's format cannot hold.
    """
    _check_representable(scheme, where, tensors)
    qt, g_idx = tensors.weight, None
    if scheme.has_g_idx:
        qt, g_idx = _stored_order(scheme, where, qt)
    zeros, spec_zero = qt.zeros, qt.spec.zero
    if zeros is None and scheme.zero_dtype and spec_zero is not None:
        zeros = torch.full(qt.scales[0].shape, spec_zero.value, dtype=torch.uint8)
    out = scheme.write_codes(qt.codes, qt.packing, zeros)
    out |= _stored_scales(scheme, qt.scales)
    if g_idx is not None:
        out["weight_g_idx"] = g_idx
    if tensors.input_scale is not None:
        name = scheme.input_scale_name
        out[name] = tensors.input_scale.reshape(() if name in scheme.scalars else (1,))
    if tensors.input_zero is not None:
        out["input_zero_point"] = tensors.input_zero.view(torch.int8)
    out |= stored_rotations(scheme.rotations, tensors.transforms)
    if tensors.bias is not None:
        out["bias"] = tensors.bias
    return out
