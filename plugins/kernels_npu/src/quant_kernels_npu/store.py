"""Buffers of a layer: codes as the operators read them, everything else as it came.

    weight    by ``Form.weight``; stacks of experts int8 [E, K, N], as npu_grouped_matmul reads them
    scales_0  as stored: [N, 1], [N, G]; e8m0 bytes [N, K/32]
    zeros     uint8 [N, G]
    bias, acc_bias, out_scale, input_scale, input_zero

Codes are made signed by a flip of their top bit, so ``restore`` gives back every bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.calls import copy_exactly_
from quant_core.numerics import scale_dtype
from quant_core.packing import repack
from quant_core.spec import CANONICAL, OpSpec, Packing
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_npu.support import Form

__all__ = ["WORDS", "allocate", "load_", "restore"]

WORDS = Packing(word="int32")
"""Eight codes a word along K, the first in the lowest bits."""

_SIDES = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
_TOP = {"int8": 0x80, "int4": 0x88}


def _weight_shape(form: Form) -> tuple[tuple[int, ...], torch.dtype]:
    if form.weight == "int4":
        return (form.n, form.k // 8), torch.int32
    if form.weight == "fp8":
        return (form.n, form.k), torch.float8_e4m3fn
    if form.experts:
        return (form.experts, form.k, form.n), torch.int8
    return (form.n, form.k), torch.int8


def allocate(form: Form, op: OpSpec, device: str) -> dict[str, Tensor]:
    """Empty buffers, in the order that ``run`` expects."""
    lead = (form.experts,) if form.experts else ()
    groups = -(-form.k // form.group) if form.group else 1
    element = scale_dtype(op.weight.scales[0].element)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": _weight_shape(form),
        "scales_0": ((*lead, form.n, groups), element),
    }
    if form.zeros:
        shapes["zeros"] = ((form.n, groups), torch.uint8)
    if form.bias:
        shapes["bias"] = ((form.n,), getattr(torch, form.bias))
    if form.acts == "static":
        spec = op.operand("input")
        assert spec is not None
        assert spec.zero is not None
        shapes |= {
            "acc_bias": ((form.n,), torch.int32),
            "out_scale": ((form.n,), torch.float32),
            "input_scale": ((1,), scale_dtype(spec.scales[0].element)),
            "input_zero": ((1,), scale_dtype(spec.zero.element)),
        }
    return {name: torch.empty(shape, dtype=d, device=device) for name, (shape, d) in shapes.items()}


def _signed(form: Form, op: OpSpec, codes: Tensor, rows: int) -> Tensor:
    """Canonical bytes [rows, ...] to the operators' codes [rows, ...]."""
    if form.weight == "fp8":
        return codes.view(torch.float8_e4m3fn)
    bits = op.weight.element.bits
    if form.weight == "int4":
        flipped = codes ^ _TOP["int4"] if form.signed else codes
        words: Tensor = repack(flipped, bits, (rows, form.k), CANONICAL, WORDS)
        return words
    if bits == 4:  # one code a byte
        wide = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[:, : form.k]
        return wide.view(torch.int8) - form.signed
    return (codes ^ _TOP["int8"] if form.signed else codes).view(torch.int8)


def _canonical(form: Form, op: OpSpec, weight: Tensor) -> Tensor:
    """Inverse of ``_signed`` for [rows, ...]."""
    if form.weight == "fp8":
        return weight.view(torch.uint8)
    bits, rows = op.weight.element.bits, weight.shape[0]
    if form.weight == "int4":
        codes: Tensor = repack(weight, bits, (rows, form.k), WORDS, CANONICAL)
        return codes ^ _TOP["int4"] if form.signed else codes
    if bits == 4:
        wide = (weight + form.signed).view(torch.uint8)
        if form.k % 2:
            wide = torch.nn.functional.pad(wide, (0, 1))
        low, high = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return low | high << 4
    codes = weight.contiguous().view(torch.uint8)
    return codes ^ _TOP["int8"] if form.signed else codes


def load_(
    form: Form,
    buffers: dict[str, Tensor],
    op: OpSpec,
    part: LayerTensors,
    at: Mapping[str, int],
) -> None:
    """Write the rows of ``part`` (or an expert's) into ``buffers``.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED`` for other tensors than the operation has,
            ``Q-LAYOUT-SHAPE`` for other sizes.
    """
    qt, row, expert = part.weight, at.get("row", 0), at.get("expert")
    rows = qt.shape[0]
    tensors = {k: v for k, v in qt.tensors().items() if k != "codes"}
    tensors |= {name: v for name in _SIDES if (v := getattr(part, name)) is not None}
    if set(tensors) | {"weight"} != set(buffers):
        raise LayoutError(
            f"part carries {sorted(tensors)}, buffers hold {sorted(buffers)}; expected the same "
            "names. The part has another spec than the operation.",
            code="Q-LAYOUT-FUSED",
            expected=sorted(buffers),
            actual=sorted(tensors),
        )
    codes = _signed(form, op, qt.codes, rows)
    if expert is None:
        copy_exactly_("weight", buffers["weight"][row : row + rows], codes)
    else:
        copy_exactly_("weight", buffers["weight"][expert, :, row : row + rows], codes.t())
    for name, value in tensors.items():
        target = buffers[name] if expert is None else buffers[name][expert]
        whole = name in ("input_scale", "input_zero")
        copy_exactly_(name, target if whole else target[row : row + rows], value)


def restore(form: Form, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
    """The canonical tensors, bit for bit."""
    weight = buffers["weight"]
    if form.experts:
        parts = [_canonical(form, op, w.t().contiguous()) for w in weight]
        codes = torch.stack(parts)
    else:
        codes = _canonical(form, op, weight)
    shape = (form.experts, form.n, form.k) if form.experts else (form.n, form.k)
    qt = QuantizedTensor(
        spec=op.weight, shape=shape, codes=codes, packing=CANONICAL,
        scales=(buffers["scales_0"],), zeros=buffers.get("zeros"),
    )  # fmt: skip
    sides = {name: buffers.get(name) for name in _SIDES}
    return LayerTensors(operands={"weight": qt}, **sides)  # type: ignore[arg-type]
