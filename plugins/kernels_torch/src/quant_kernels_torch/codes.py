"""Activations to codes and scales in plain torch: the rule of ``quant_core.kernels.activations``.

The reference rounds to codes and back; here the codes stay, for a product of codes:
``codes.float() * scale`` equals ``fake_quantize`` of finite x bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.numerics import decode_scale, element_range
from quant_core.spec import CHANNEL, QuantSpec

__all__ = ["group_codes", "row_codes"]


def _run_time_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    fine = spec.scales[0]
    s = amax / (fine.peak or element_range(spec.element)[1])
    if fine.least or fine.most:
        s = s.clamp(min=fine.least, max=fine.most or None)
    return torch.where(s == 0, torch.finfo(s.dtype).eps, s)


def _to_codes(q: Tensor, spec: QuantSpec) -> Tensor:
    lowest, highest = element_range(spec.element)
    if spec.element.kind == "float":
        # infinity would be clamped to the largest value
        return torch.where(q.isinf(), torch.nan, q.clamp(lowest, highest)).to(torch.float8_e4m3fn)
    return q.round().clamp(lowest, highest).nan_to_num(0.0).to(torch.int8)


def row_codes(
    x: Tensor, spec: QuantSpec, input_scale: Tensor | None, input_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x [T, K] and float32 scales, [T, 1] per token or [1, 1] of the tensor.

    A token with NaN or infinity has a scale of NaN (with a scale of the tensor, fp8 codes carry
    it; of int8 the caller asks ``isfinite``).
    """
    work, fine = x.float(), spec.scales[0]
    if fine.static:
        assert input_scale is not None, "accepted only with a stored scale"
        s = decode_scale(input_scale, fine.element).reshape(1, 1)
        q = work / s
        if spec.zero is not None and input_zero is not None:
            q = q + decode_scale(input_zero, spec.zero.element)
        return _to_codes(q, spec), s
    token = fine.grain == CHANNEL
    amax = work.abs().amax(dim=-1, keepdim=True) if token else work.abs().amax().reshape(1, 1)
    s = _run_time_scale(amax, spec)
    s = torch.where(s.isfinite(), s, torch.nan)
    return _to_codes(work / s, spec), s


def group_codes(x: Tensor, spec: QuantSpec, size: int) -> tuple[Tensor, Tensor]:
    """fp8 codes of x [T, K] and float32 scales [T, K / size]."""
    groups = x.float().unflatten(-1, (-1, size))
    s = _run_time_scale(groups.abs().amax(dim=-1, keepdim=True), spec)
    s = torch.where(s.isfinite(), s, torch.nan)
    return _to_codes(groups / s, spec).flatten(-2), s.squeeze(-1)
