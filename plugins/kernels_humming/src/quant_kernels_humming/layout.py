"""What humming-kernels calls the parts of a layer, and how it stores them.

    weight         int32 [N, K * bits / 32], one bit stream along K, low bits first: the canonical
                   order of quant-core read as words. Integers are offset binary: int8 code c is
                   c + 128.
    weight_scale   [N, K / g] or [N, 1] in the dtype of x; blocks float32 [N / 128, K / 128]
                   (16-bit ones are widened, which is exact); MXFP4 e8m0, NVFP4 e4m3
    weight_scale_2 float32 [1]: NVFP4's factor of the tensor
    zero_point     int32 [N * bits / 32, K / g], one bit stream along N
    bias           [N] in the dtype of x

Source: humming-kernels 0.1.19 ``schema/humming.py`` (get_tensors_attrs), ``utils/weight.py``
(quantize_weight), ``include/humming/kernel/pack_weight.cuh``; rounded scales: ``transform.py``
(process_int_weight_scale).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import QuantizedTensor

__all__ = ["configs", "tensors_of"]

_WIDE = {"bfloat16": "bf16", "float16": "f16"}
_FP8 = "fp8_e4m3"
_BLOCK = (128, 128)
_NARROW = ("uint2", "uint3", "uint4")  # exact in fp8_e4m3 and int8, also less a zero code


def _reject(axis: str, have: str, need: str) -> Rejected:
    return Rejected(axis=axis, have=have, need=need)


def _weight(op: OpSpec) -> dict[str, Any] | Rejected:
    spec, k = op.weight, op.size("k")
    e, zero, scales = spec.element, spec.zero, spec.scales
    if spec.blocks or spec.gather or not scales or any(s.inverse or s.add for s in scales):
        return _reject("weight", spec.label, "plain codes under multipliers, columns in order")
    grain, element = scales[0].grain, scales[0].element
    row = grain == CHANNEL or (grain[0] == 1 and grain[1] >= k)
    group = 0 if row else grain[1]
    if e.name == "fp4_e2m1" and zero is None:
        pair = [(s.element, s.grain) for s in scales]
        if pair == [("e8m0", (1, 32))]:
            return {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}
        if pair == [(_FP8, (1, 16)), ("f32", TENSOR)]:
            out = {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3"}
            return {**out, "scale_2_type": "tensor"}
        return _reject("scales", spec.label, "MXFP4 or NVFP4 scales")
    if len(scales) != 1:
        return _reject("scales", spec.label, "one factor")
    if e.name == _FP8 and zero is None and grain == _BLOCK and element in ("f32", "bf16", "f16"):
        return {"dtype": "float8e4m3", "group_size": 128, "group_size_n": 128}
    if not row and grain[0] != 1:
        return _reject("scales", spec.label, "a scale per row or group of a row")
    if group and (group % 32 or k % group):
        return _reject("group", str(group), "a multiple of 32 that divides in_features")
    if element != _WIDE.get(op.act_dtype):
        return _reject("scales", element, f"scales stored in the activations' {op.act_dtype}")
    if e.name == _FP8 and zero is None:
        return {"dtype": "float8e4m3", "group_size": group}
    if e.kind == "int" and e.bits == 8 and zero is None:
        return {"dtype": "uint8", "group_size": group}
    if e.kind != "uint" or not 2 <= e.bits <= 8 or zero is None or zero.kind == "offset":
        return _reject("element", spec.label, "unsigned codes with a zero, int8, fp8 or fp4")
    out = {"dtype": e.name, "group_size": group}
    if zero.kind == "const":
        if zero.value != 1 << (e.bits - 1):
            return _reject("zero", str(zero.value), str(1 << (e.bits - 1)))
        return out
    if zero.element != e.name:
        return _reject("zero", zero.element, f"zero codes of {e.name}")
    return {**out, "has_zero_point": True}


def _input(op: OpSpec, weight: dict[str, Any]) -> dict[str, Any] | Rejected | None:
    acts = op.operand("input")
    if acts is None:
        return None
    plain = len(acts.scales) == 1 and acts.zero is None and acts.ties == "even"
    if not plain or acts.scales[0].static or acts.scales[0].peak or acts.scales[0].least:
        return _reject("input", acts.label, "a symmetric run-time scale without bounds")
    s = acts.scales[0]
    if s.most or s.rule or s.element not in ("f32", "bf16", "f16"):
        return _reject("input", acts.label, "a float scale without bounds")
    blocked = weight.get("group_size_n") == 128
    if acts.element.name == _FP8 and weight["dtype"] == "float8e4m3":
        if blocked and s.grain == (1, 128):
            return {"dtype": "float8e4m3", "group_size": 128}
        if not blocked and s.grain == CHANNEL:
            return {"dtype": "float8e4m3"}
    if acts.element.name == "int8" and weight["dtype"] == "uint8" and s.grain == CHANNEL:
        return {"dtype": "int8"}
    if acts.element.name == _FP8 and weight["dtype"] in _NARROW and s.grain == CHANNEL:
        return {"dtype": "float8e4m3"}
    if acts.element.name == "int8" and weight["dtype"] in _NARROW and s.grain == CHANNEL:
        if not weight["group_size"]:
            return {"dtype": "int8"}
        need = "a scale per row: it rounds scales of groups to 1/1024 of the largest for int8"
        return _reject("input", acts.label, need)
    need = "fp8 with fp8 or 2 to 4 bit weights, int8 with int8 or 2 to 4 bit weights, per token"
    return _reject("input", acts.label, need)


def configs(op: OpSpec) -> tuple[dict[str, Any], dict[str, Any] | None] | Rejected:
    """(weight_config, input_config) of ``HummingLayer`` for a layer or a stack, or why not."""
    if op.op not in ("linear", "grouped_linear"):  # others have other sizes
        return _reject("op", op.op, "linear or grouped_linear")
    n, k = op.size("n"), op.size("k")
    if op.act_dtype not in _WIDE:
        return _reject("act_dtype", op.act_dtype, " or ".join(_WIDE))
    if op.packing != CANONICAL:
        return _reject("packing", str(op.packing), "the canonical packing")
    known = ("bias", f"bias:{op.act_dtype}")
    if extra := sorted(f for f in op.features if f not in known and not f.startswith("tied")):
        return _reject("features", ", ".join(extra), f"a bias in {op.act_dtype}")
    if n % 64 or k % 128:
        return _reject("sizes", f"{n} x {k}", "multiples of 64 and 128")
    weight = _weight(op)
    if isinstance(weight, Rejected):
        return weight
    acts = _input(op, weight)
    return acts if isinstance(acts, Rejected) else (weight, acts)


def tensors_of(qt: QuantizedTensor, bias: Tensor | None) -> dict[str, Tensor]:
    """The canonical tensors under humming's names, in its order before its own repacking."""
    import torch

    from quant_core.packing import pack

    (n, k), spec = qt.shape, qt.spec
    codes = qt.codes
    if spec.element.kind == "int":
        codes = codes ^ 0x80
    out = {"weight": codes.contiguous().view(torch.int32).view(n, k * spec.element.bits // 32)}
    small = {"e8m0": torch.float8_e8m0fnu, _FP8: torch.float8_e4m3fn}
    scales = qt.scales[0].float() if spec.scales[0].grain == _BLOCK else qt.scales[0]
    out["weight_scale"] = scales.view(small.get(spec.scales[0].element, scales.dtype)).contiguous()
    if len(qt.scales) > 1:
        out["weight_scale_2"] = qt.scales[1].reshape(1)
    if qt.zeros is not None:
        rows = pack(qt.zeros.t().contiguous(), spec.element.bits, CANONICAL)
        out["zero_point"] = rows.contiguous().view(torch.int32).t().contiguous()
    if bias is not None:
        out["bias"] = bias
    return out
