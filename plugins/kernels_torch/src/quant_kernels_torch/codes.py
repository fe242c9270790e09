"""Activations to codes and scales in plain torch: the rule of ``quant_core.kernels.activations``.

The reference rounds to codes and back; here the codes stay, for a product of codes:
``codes.float() * scale`` equals ``fake_quantize`` of finite x bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_core.numerics import decode_scale, element_range, over
from quant_core.spec import CHANNEL, QuantSpec

__all__ = ["group_codes", "row_codes"]


def _run_time_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    fine = spec.scales[0]
    s = over(amax, fine.peak or element_range(spec.element)[1])
    if fine.least or fine.most:
        s = s.clamp(min=fine.least, max=fine.most or None)
    return torch.where(s == 0, torch.finfo(s.dtype).eps, s)


def _within(spec: QuantSpec) -> bool:
    """Whether x over its own run-time scale stays within the codes without a clamp."""
    s = spec.scales[0]
    return not (s.static or s.peak or s.least or s.most)


def _to_codes(q: Tensor, spec: QuantSpec) -> Tensor:
    """q is overwritten. Every pass over it is memory traffic, so none is made in vain."""
    lowest, highest = element_range(spec.element)
    if spec.element.kind == "float":
        if not _within(spec):  # infinity would be clamped to the largest value
            q = torch.where(q.isinf(), torch.nan, q.clamp_(lowest, highest))
        return q.to(torch.float8_e4m3fn)
    q = q.round_()
    if not _within(spec):
        q = q.clamp_(lowest, highest).nan_to_num_(0.0)
    return q.to(torch.int8)


def _magnitude(x: Tensor) -> Tensor:
    """Largest |x| of each row, exact in the dtype of x; NaN and infinity show."""
    return torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).float()


def row_codes(
    x: Tensor, spec: QuantSpec, input_scale: Tensor | None, input_zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of x [T, K] and float32 scales, [T, 1] per token or [1, 1] of the tensor.

    A token with NaN or infinity has a scale of NaN (with a scale of the tensor, fp8 codes carry
    it; of int8 the caller asks ``isfinite``).
    """
    fine = spec.scales[0]
    if fine.static:
        assert input_scale is not None, "accepted only with a stored scale"
        s = decode_scale(input_scale, fine.element).reshape(1, 1)
        q = x.float() / s
        if spec.zero is not None and input_zero is not None:
            q = q + decode_scale(input_zero, spec.zero.element)
        return _to_codes(q, spec), s
    token = fine.grain == CHANNEL
    amax = _magnitude(x) if token else _magnitude(x).amax().reshape(1, 1)
    s = _run_time_scale(amax, spec)
    s = torch.where(s.isfinite(), s, torch.nan)
    return _to_codes(torch.div(x, s), spec), s


def group_codes(x: Tensor, spec: QuantSpec, size: int) -> tuple[Tensor, Tensor]:
    """fp8 codes of x [T, K] and float32 scales [T, K / size]."""
    groups = x.unflatten(-1, (-1, size))
    s = _run_time_scale(_magnitude(groups), spec)
    s = torch.where(s.isfinite(), s, torch.nan)
    return _to_codes(torch.div(groups, s), spec).flatten(-2), s.squeeze(-1)
