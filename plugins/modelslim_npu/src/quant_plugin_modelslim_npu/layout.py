"""Stored ModelSlim tensors to canonical ones and back, exactly.

4-bit codes are two's complement, two rows a byte (even row low) or one a byte:

    W = [[1, 2], [-3, 4]]  ->  bytes [[0xD1, 0x42]]         canonical code = value + 8
                                                            in a byte of two: byte ^ 0x88
The static form keeps its sums exact: ``quant_bias`` is added to the integer sum and ``deq_scale``
multiplies it. The weight scale, which the file does not hold, is deq_scale / input_scale.
``deq_scale`` of a float16 model is an int64 whose low 32 bits are the bits of the float32.

Left out by rule: ``scale_bias``, which corrects for hardware that splits int8 into two halves.

Source: ModelSlim 26.1.0 ``core/quant_service/modelslim_v1/save/ascendv1.py``, facts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.convert.steps import row_blocks
from quant_core.errors import LayoutError
from quant_core.packing import pack, repack, unpack
from quant_core.rewrites.cut import slice_rows_of
from quant_core.spec import CANONICAL, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_modelslim_npu.scheme import FLAT, ROW_PAIRS, WORDS

if TYPE_CHECKING:
    from quant_plugin_modelslim_npu.scheme import MsScheme

__all__ = ["canonicalize", "serialize"]


def _bad(code: str, tensor: str, found: str, expected: str, fix: str) -> LayoutError:
    return LayoutError(
        f"{tensor}: {found}, expected {expected}. {fix}",
        code=code,
        tensor=tensor,
        expected=expected,
        actual=found,
        plugin="modelslim_npu",
    )


# ------------------------------------------------------------------------------------------ codes


def _read_codes(scheme: MsScheme, where: str, stored: Tensor) -> tuple[Tensor, Packing]:
    """Codes and their order.

    Raises:
        LayoutError: ``Q-VALUE-CODE`` for values outside 4 bits.
    """
    store = scheme.kind.store
    if store == "int4_words":
        return stored, WORDS
    if scheme.row_pairs:
        return stored.view(torch.uint8) ^ 0x88, ROW_PAIRS
    if store == "int4":
        low, high = (int(v) for v in stored.aminmax()) if stored.numel() else (0, 0)
        if low < -8 or high > 7:
            found, fix = f"values from {low} to {high}", "The type is wrong, or the tensor damaged."
            raise _bad("Q-VALUE-CODE", f"{where}.weight", found, "-8 to 7 for 4 bits", fix)
        return pack((stored + 8).view(torch.uint8), 4, CANONICAL), CANONICAL
    return stored.view(torch.uint8), CANONICAL


def _write_codes(scheme: MsScheme, qt: QuantizedTensor) -> Tensor:
    """Inverse of ``_read_codes``; codes may come in any packing."""
    store = scheme.kind.store
    if store == "int4" and not scheme.row_pairs:
        codes = unpack(qt.codes, 4, scheme.shape, qt.packing)
        return codes.contiguous().view(torch.int8) - 8
    want = WORDS if store == "int4_words" else ROW_PAIRS if scheme.row_pairs else CANONICAL
    codes = repack(qt.codes, qt.spec.element.bits, scheme.shape, qt.packing, want).contiguous()
    if scheme.row_pairs:
        return (codes ^ 0x88).view(torch.int8)
    dtypes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    return codes.view(dtypes[store]) if store in dtypes else codes


# --------------------------------------------------------------------------------- static scales


def _read_deq(where: str, stored: Tensor) -> Tensor:
    """float32 of either form.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` for an int64 that holds no float32, or NaN or infinity.
    """
    scale = stored
    if stored.dtype == torch.int64:
        if bool(((stored < 0) | (stored >> 32 != 0)).any()):
            found, fix = "int64 values beyond 32 bits", "Export the checkpoint again."
            raise _bad("Q-VALUE-SCALE", f"{where}.deq_scale", found, "bits of a float32", fix)
        scale = stored.to(torch.int32).view(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        count = int((~torch.isfinite(scale)).sum())
        fix = "The quantization overflowed; quantize again."
        raise _bad(
            "Q-VALUE-SCALE", f"{where}.deq_scale", f"{count} NaN or infinite values", "finite", fix
        )
    return scale


def _write_deq(scheme: MsScheme, scale: Tensor) -> Tensor:
    if scheme.dtype("deq_scale", "float32") == "float32":
        return scale
    return scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _check_input_scale(where: str, leaf: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        found = f"has value {scale.flatten()[0].item()}"
        fix = "Calibrate and quantize again."
        raise _bad("Q-VALUE-SCALE", f"{where}.{leaf}", found, "a finite positive scale", fix)


def _read_offset(where: str, offset: Tensor) -> Tensor:
    """The zero point of the activations as raw int8 bits."""
    value = offset.float()
    good = (value == value.round()) & (value >= -128) & (value <= 127)
    if not bool(good.all()):
        found, fix = f"has value {value.flatten()[0].item()}", "Calibrate and quantize again."
        raise _bad(
            "Q-VALUE-CODE", f"{where}.input_offset", found, "a whole number from -128 to 127", fix
        )
    return value.to(torch.int8).view(torch.uint8)


def _weight_scale(deq_scale: Tensor, input_scale: Tensor) -> Tensor:
    """The scale [N, 1] of the weights of a static layer."""
    return (deq_scale / input_scale.float()).unsqueeze(1)


# ------------------------------------------------------------------------------------ both ways


def _check_offsets(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Weights must be symmetric: two producers store offsets of opposite sign, and nothing in a
    file tells them apart."""
    for leaf in ("weight_offset", "weight_offset_second"):
        offset = tensors.get(leaf)
        if offset is not None and bool((offset != 0).any()):
            raise _bad(
                "Q-VALUE-OFFSET",
                f"{where}.{leaf}",
                f"{int((offset != 0).sum())} of {offset.numel()} values are not zero",
                "zeros (symmetric weights)",
                "Its sign differs between producers and cannot be told; quantize symmetrically.",
            )


def _check_matrices(where: str, matrices: tuple[Tensor, ...]) -> None:
    for name, matrix in zip(("left_trans", "right_trans"), matrices):
        bad = int((~torch.isfinite(matrix)).sum())
        if bad:
            fix = "Export the checkpoint again."
            found = f"{bad} NaN or infinite values"
            raise _bad("Q-VALUE-WEIGHT", f"{where}.{name}", found, "finite numbers", fix)


def canonicalize(scheme: MsScheme, where: str, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored tensors of one layer to canonical form; shapes and dtypes were checked.

    Raises:
        LayoutError: ``Q-VALUE-CODE``, ``-OFFSET``, ``-SCALE``, ``-WEIGHT``.
    """
    codes, packing = _read_codes(scheme, where, tensors[scheme.codes_name])
    if scheme.static:
        deq = _read_deq(where, tensors["deq_scale"])
        input_scale = tensors["input_scale"]
        _check_input_scale(where, "input_scale", input_scale)
        scales: tuple[Tensor, ...] = (_weight_scale(deq, input_scale),)
    else:
        _check_offsets(where, tensors)
        scales = (tensors["weight_scale"],)
        if scheme.second:
            scales = (tensors["weight_scale_second"], tensors["weight_scale"])
    weight = QuantizedTensor(
        spec=scheme.weight, shape=scheme.shape, codes=codes, packing=packing, scales=scales
    )
    if scheme.flat:
        clip = tensors["clip_ratio"]
        _check_input_scale(where, "clip_ratio", clip)
        matrices = (tensors["left_trans"], tensors["right_trans"])
        _check_matrices(where, matrices)
        return LayerTensors(
            operands={"weight": weight},
            bias=tensors.get("bias"),
            input_scale=clip,
            transforms=((FLAT, matrices),),
        )
    if not scheme.static:
        return LayerTensors(operands={"weight": weight}, bias=tensors.get("bias"))
    return LayerTensors(
        operands={"weight": weight},
        acc_bias=tensors["quant_bias"],
        out_scale=deq,
        input_scale=input_scale,
        input_zero=_read_offset(where, tensors["input_offset"]),
    )


def _check_representable(scheme: MsScheme, where: str, lt: LayerTensors) -> None:
    qt, want = lt.weight, scheme.weight
    same = (
        qt.spec.element == want.element
        and qt.spec.scales == want.scales
        and qt.spec.zero == want.zero
        and not qt.spec.blocks
        and qt.gather is None
        and tuple(qt.shape) == scheme.shape
    )
    needed = ("acc_bias", "out_scale", "input_scale", "input_zero")
    have = [name for name in needed if getattr(lt, name) is not None]
    wanted = list(needed) if scheme.static else ["input_scale"] if scheme.flat else []
    odd = have != wanted or tuple(t for t, _ in lt.transforms) != scheme.transforms
    if not same or odd or (scheme.static and lt.bias is not None):
        with_ = f" with {', '.join(have)}" if have else ""
        raise _bad(
            "Q-LAYOUT-REPRESENT",
            where,
            f"{qt.spec.label} {tuple(qt.shape)}{with_} cannot be stored as {scheme.name}",
            f"{want.label} {scheme.shape}",
            "Write a format that can hold it.",
        )
    if scheme.static and lt.out_scale is not None and lt.input_scale is not None:
        derived = _weight_scale(lt.out_scale, lt.input_scale)
        if not torch.equal(qt.scales[0], derived):
            raise _bad(
                "Q-LAYOUT-REPRESENT",
                where,
                "weight scales that are not out_scale / input_scale cannot be stored",
                "scales that agree",
                "Write a type with run-time activation scales.",
            )


def _scale_bias(scheme: MsScheme, qt: QuantizedTensor) -> Tensor:
    """What hardware adds that splits int8 into halves: 8 * sum over k of W[n, k], in parts of K."""
    n, k = scheme.shape
    sums = []
    for start, stop in row_blocks(n, k):
        weight = slice_rows_of(qt, start, stop).dequantize()
        sums.append(8 * weight.unflatten(1, (scheme.parts, -1)).sum(-1))
    return torch.cat(sums)


def _write_static(scheme: MsScheme, lt: LayerTensors) -> dict[str, Tensor]:
    """What ``_check_representable`` found to be there."""
    held = (lt.acc_bias, lt.out_scale, lt.input_scale, lt.input_zero)
    acc_bias, out_scale, input_scale, input_zero = (t for t in held if t is not None)
    offset_dtype = getattr(torch, scheme.dtype("input_offset", "float32"))
    return {
        "quant_bias": acc_bias,
        "deq_scale": _write_deq(scheme, out_scale),
        "input_scale": input_scale,
        "input_offset": input_zero.view(torch.int8).to(offset_dtype),
    }


def serialize(scheme: MsScheme, where: str, lt: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``; what a rule leaves out is made for new files only.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` naming what this type cannot hold.
    """
    _check_representable(scheme, where, lt)
    qt = lt.weight
    out = {scheme.codes_name: _write_codes(scheme, qt)}
    if scheme.static:
        return out | _write_static(scheme, lt)
    out["weight_scale"] = qt.scales[-1]
    stored = dict(scheme.dtypes)
    if scheme.second:
        out["weight_scale_second"] = qt.scales[0]
    for leaf in ("weight_offset", "weight_offset_second"):
        if leaf in stored:
            like = qt.scales[0] if leaf.endswith("second") else qt.scales[-1]
            out[leaf] = torch.zeros(like.shape, dtype=getattr(torch, stored[leaf]))
    if scheme.anew and "scale_bias" in stored:
        out["scale_bias"] = _scale_bias(scheme, qt)
    if scheme.flat and lt.input_scale is not None:
        [(_, (left, right))] = lt.transforms
        out |= {"left_trans": left, "right_trans": right, "clip_ratio": lt.input_scale}
    if lt.bias is not None:
        out["bias"] = lt.bias
    return out
