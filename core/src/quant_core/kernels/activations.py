"""Quantized activations in plain torch: x to codes and back, written to be read.

    q = clamp(x / s + z, lowest, highest), rounded      x^ = (q - z) * s

Rows of x are tokens. The finest scale has the grain TENSOR, CHANNEL (one per token) or (1, g) (per
token and g features; a last short group is allowed). It is stored with the layer (static), or
computed from x on every call, within ``least`` and ``most`` of its spec (0 = no bound):

    symmetric    s = max|x| / peak          peak 0 = the largest value of the element
    zero code    s = (max - min) / (highest - lowest),  z = round(clamp(lowest - min / s)),
                 where min and max include 0
    small float  s rounded to its element, e.g. fp8_e4m3
    e8m0         a power of two by the spec's rule (``numerics.mx``)
    s = 0        becomes the epsilon of its type, so that zeros stay zeros

Two scales are a small float per group under one float factor g: stored (static, or its inverse
G = 1/g), or computed: g = max|x| of the tensor or token / (peak * largest value of the small
float). The small one is made under it, s = round(max|x| / (peak * g)) or
round(G * (max|x| / peak)), and x is divided by s * g or s / G.

A float scale of a tensor, token or group under a stored factor f (a clip ratio) is
max|x| / peak * f.

All arithmetic is float32 (float64 for a float64 x), whatever the dtype of x; NaN and infinity
are visible as NaN. Codes are never stored: a kernel that multiplies codes must give the same sums.

Source of the run-time rules: compressed-tensors 0.19.0 and 0.20.0
``quantization/utils/helpers.py`` (calculate_qparams, compute_dynamic_scales_and_zp),
``quantization/lifecycle/forward_helpers.py``; bounds: vLLM 0.32 scaled_fp8_quant (scale_ub).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.numerics import (
    FLOAT_ELEMENTS,
    MX_RULES,
    block_scale,
    decode_e8m0,
    decode_scale,
    element_range,
    mx_scale,
    over,
    round_to,
    scale_dtype,
    tensor_scale,
)
from quant_core.numerics.elements import FLOAT8_DTYPES
from quant_core.spec import CHANNEL, TENSOR, OpSpec, QuantSpec, Scale

__all__ = ["fake_quantize", "static_shape", "unsupported_input"]

_WIDE = ("f32", "bf16", "f16")
_SMALL = tuple(FLOAT8_DTYPES)


def _odd_scale(scale: Scale) -> str:
    """What is wrong with the finest scale; "" if nothing is."""
    rows, cols = scale.grain
    if scale.static:
        return "" if rows == 0 else "a static scale of a tensor or of columns"
    if scale.inverse:
        return "a run-time scale that multiplies"
    if rows not in (0, 1) or (rows == 0 and cols):
        return "a run-time scale of a tensor, a token, or a token's groups"
    if scale.element not in (*_WIDE, *_SMALL, "e8m0"):
        return f"a run-time scale in {', '.join((*_WIDE, *_SMALL))} or e8m0"
    if scale.rule and (scale.element != "e8m0" or scale.rule not in MX_RULES):
        return f"no rule, or one of {', '.join(MX_RULES)} for e8m0"
    return ""


def _odd_levels(spec: QuantSpec) -> str:
    fine, *coarse = spec.scales
    if not coarse:
        return ""
    outer = coarse[0]
    if len(coarse) == 1 and fine.element in _WIDE and not fine.static and spec.zero is None:
        plain = outer.static and outer.grain == TENSOR and outer.element in _WIDE
        return "" if plain and not outer.inverse else "a stored factor of the tensor"
    if len(coarse) > 1 or fine.static or fine.element not in _SMALL or fine.grain[0] != 1:
        return "one scale, or two of which the finer is a run-time small float per group"
    if outer.element not in _WIDE or outer.rule or (not outer.static and outer.inverse):
        return "a coarse scale in f32, bf16 or f16"
    if outer.grain != TENSOR and (outer.static or outer.grain != CHANNEL):
        return "a coarse scale of the tensor, or at run time of a token"
    return "no zero" if spec.zero is not None else ""


def unsupported_input(op: OpSpec) -> Rejected | None:
    """Why the operation's "input" operand cannot be computed here; None if it can, or is absent."""
    spec = op.operand("input")
    if spec is None:
        return None

    def reject(have: str, need: str) -> Rejected:
        return Rejected(axis="input", have=have, need=need)

    known = FLOAT_ELEMENTS - {"e8m0"}
    if spec.element.kind not in ("int", "uint") and spec.element.name not in known:
        return reject(spec.element.name, f"an integer, {' or '.join(sorted(known))}")
    if not spec.scales or spec.gather or spec.blocks:
        return reject(spec.label, "one or two scales, columns in order")
    need = _odd_scale(spec.scales[0]) or _odd_levels(spec)
    if not need and spec.scales[0].element == "e8m0" and spec.element.kind != "float":
        need = "a float element under an e8m0 scale"
    if need:
        return reject(spec.label, need)
    if spec.zero is not None and (spec.zero.kind != "code" or spec.element.kind == "float"):
        return reject(spec.label, "no zero, or a zero code of an integer")
    return None


def _static(spec: QuantSpec) -> Scale | None:
    return next((s for s in spec.scales if s.static), None)


def static_shape(op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the stored ``input_scale`` and ``input_zero``; empty if there are none."""
    spec = op.operand("input")
    scale = None if spec is None else _static(spec)
    if spec is None or scale is None:
        return {}
    k = op.size("k")
    shape: tuple[int, ...] = (-(-k // scale.grain[1]) if scale.grain[1] else 1,)
    out = {"input_scale": (shape, scale_dtype(scale.element))}
    if spec.zero is not None:
        out["input_zero"] = (shape, scale_dtype(spec.zero.element))
    return out


def _amax(groups: Tensor, scale: Scale, *, whole_token: bool = False) -> Tensor:
    """Largest magnitude of x [T, G, g]: [1, 1, 1] of the tensor, else [T, G, 1] or [T, 1, 1]."""
    dims = (0, 1, 2) if scale.grain[0] == 0 else (1, 2) if whole_token else (2,)
    return groups.abs().amax(dim=dims, keepdim=True)


def _nonzero(s: Tensor, eps: float) -> Tensor:
    return torch.where(s == 0, eps, s)


def _symmetric(groups: Tensor, spec: QuantSpec, factor: Tensor | None) -> Tensor:
    """Run-time scale of each group, the coarse ``factor`` included."""
    scale, amax = spec.scales[0], _amax(groups, spec.scales[0])
    peak = scale.peak or element_range(spec.element)[1]
    if scale.element == "e8m0":
        bounded = amax.clamp(min=scale.least * peak, max=scale.most * peak or None)
        codes = mx_scale(bounded, spec.element, scale.rule or "rceil", peak)
        return decode_e8m0(codes).to(groups.dtype)
    if scale.element in _WIDE:
        s = over(amax, peak) if factor is None else over(amax, peak) * factor
        s = s.clamp(min=scale.least, max=scale.most or None)
        return _nonzero(s, torch.finfo(s.dtype).eps)
    inverse = factor is not None and spec.scales[1].inverse
    codes = block_scale(
        amax,
        torch.ones_like(amax) if factor is None else factor,
        element=spec.element,
        scale=scale.element,
        inverse=inverse,
        qmax=peak,
        least=scale.least,
        most=scale.most,
    )
    s = decode_scale(codes, scale.element).to(groups.dtype)
    s = _nonzero(s, torch.finfo(FLOAT8_DTYPES[scale.element]).eps)
    if factor is None:
        return s
    return s / factor if inverse else s * factor


def _with_zero(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Run-time scale and zero of each group."""
    lowest, highest = element_range(spec.element)
    dims = (0, 1, 2) if spec.scales[0].grain[0] == 0 else (2,)
    low = groups.amin(dim=dims, keepdim=True).clamp(max=0)
    high = groups.amax(dim=dims, keepdim=True).clamp(min=0)
    s = _nonzero(over(high - low, highest - lowest), torch.finfo(low.dtype).eps)
    return s, (lowest - low / s).clamp(lowest, highest).round()


def _coarse(groups: Tensor, spec: QuantSpec, input_scale: Tensor | None) -> Tensor | None:
    """The factor above the groups' own scales, [1, 1, 1] or [T, 1, 1]; None if there is none."""
    if len(spec.scales) == 1:
        return None
    scale = spec.scales[1]
    if scale.static:
        return _stored(input_scale, scale.element, "input_scale", groups.dtype)
    amax = _amax(groups, scale, whole_token=True)
    if scale.peak:
        return _nonzero(over(amax, scale.peak), 1.0)
    return tensor_scale(amax, element=spec.element, scale=spec.scales[0].element).to(groups.dtype)


def _stored(value: Tensor | None, element: str, name: str, dtype: torch.dtype) -> Tensor:
    """A static scale or zero as [1, G, 1]."""
    if value is None:
        raise LayoutError(
            f"activations: {name} is absent, expected a stored value because the scale is static. "
            "Give the tensor, or describe the scale as computed at run time.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
        )
    return decode_scale(value, element).to(dtype).reshape(1, -1, 1)


def fake_quantize(
    x: Tensor, spec: QuantSpec, input_scale: Tensor | None = None, input_zero: Tensor | None = None
) -> Tensor:
    """x rounded to the codes of ``spec`` and back.

    Args:
        x: [T, K] float.
        spec: the "input" operand; see ``unsupported_input`` for what is possible.
        input_scale, input_zero: stored values of a static scale, [1] or one per group of columns,
            dtype ``numerics.scale_dtype`` of their elements.

    Returns:
        Same shape and dtype as ``x``.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE`` if a static value is absent.
    """
    if x.numel() == 0:
        return x
    work = x if x.dtype == torch.float64 else x.float()
    fine, k = spec.scales[0], x.shape[-1]
    size = fine.grain[1] or k
    groups = F.pad(work, (0, -k % size)).unflatten(-1, (-1, size))
    z = None
    if fine.static:
        s = _stored(input_scale, fine.element, "input_scale", work.dtype)
        if spec.zero is not None:
            z = _stored(input_zero, spec.zero.element, "input_zero", work.dtype)
    elif spec.zero is not None:
        s, z = _with_zero(groups, spec)
    else:
        s = _symmetric(groups, spec, _coarse(groups, spec, input_scale))
    q = groups * s if fine.inverse else groups / s
    q = round_to(q if z is None else q + z, spec.element, spec.ties)
    q = q if z is None else q - z
    out = q / s if fine.inverse else q * s
    out = torch.where(torch.isinf(groups), torch.nan, out)  # else a stored scale would clamp it
    return out.flatten(-2)[:, :k].to(x.dtype)
