"""Integer sums under one combined scale: what a layer with stored activation scales computes.

    q = clamp(round(x / s + z), lowest, highest)
    y = (sum over k of q[t, k] * c[n, k]  +  acc_bias[n]) * out_scale[n]

The sums are exact: they are formed in float64, where every integer up to 2**53 has its own value
(8-bit codes reach that beyond 2**39 columns). ``acc_bias`` (int32) carries the layer's bias and the
correction for z, which therefore does not appear in the sum; ``out_scale`` is the one product of
input and weight scale that such files store. The result is rounded once, to the dtype of x.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.kernels.base import Rejected
from quant_core.numerics import decode_scale, element_range
from quant_core.spec import TENSOR, OpSpec, QuantSpec
from quant_core.tensors import QuantizedTensor

__all__ = ["combined", "input_codes", "unsupported_sum", "without_scales"]

_FEATURES = frozenset({"acc_bias", "out_scale"})


def unsupported_sum(op: OpSpec) -> Rejected | None:
    """Why the operation's combined scale cannot be applied; None if it can, or there is none."""
    have = sorted(_FEATURES & op.features)
    if not have:
        return None

    def reject(found: str, need: str) -> Rejected:
        return Rejected(axis="features", have=found, need=need)

    weight, acts = op.weight, op.operand("input")
    if "out_scale" not in have:
        return reject("acc_bias alone", "out_scale with it")
    if acts is None or acts.element.kind not in ("int", "uint") or len(acts.scales) != 1:
        found = "float input" if acts is None else f"input {acts.label}"
        return reject(f"{', '.join(have)}, {found}", "integer activations of one scale")
    scale = acts.scales[0]
    if not scale.static or scale.grain != TENSOR or scale.inverse:
        return reject(f"input {acts.label}", "a stored input scale of the tensor")
    constant = weight.zero is None or weight.zero.kind == "const"
    if weight.element.kind not in ("int", "uint") or not constant or weight.gather:
        return reject(f"weight {weight.label}", "integer weights without zero codes, in order")
    return None


def input_codes(
    x: Tensor, spec: QuantSpec, input_scale: Tensor, input_zero: Tensor | None
) -> Tensor:
    """Integer codes of x [T, K] as float64; rounded half to even. NaN and infinity give NaN, as in
    ``activations.fake_quantize``: a stored scale would hide them in the range of the codes.

    Args:
        input_scale, input_zero: stored values of one element each.
    """
    work = x if x.dtype == torch.float64 else x.float()
    q = work / decode_scale(input_scale, spec.scales[0].element).to(work.dtype)
    if spec.zero is not None and input_zero is not None:
        q = q + decode_scale(input_zero, spec.zero.element).to(work.dtype)
    lowest, highest = element_range(spec.element)
    codes = q.round().clamp(lowest, highest).double()
    return torch.where(torch.isinf(work), torch.nan, codes)


def without_scales(qt: QuantizedTensor) -> QuantizedTensor:
    """The same codes with every scale 1: dequantizes to whole numbers."""
    return replace(qt, spec=replace(qt.spec, scales=()), scales=())


def combined(sums: Tensor, acc_bias: Tensor | None, out_scale: Tensor) -> Tensor:
    """(sums + acc_bias) * out_scale in float64.

    Shapes: sums (T, N) float64, acc_bias (N,) int32, out_scale (N,) float32 -> (T, N) float64
    """
    total = sums if acc_bias is None else sums + acc_bias.double()
    return total * out_scale.double()
