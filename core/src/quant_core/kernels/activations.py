"""Quantized activations in plain torch: x to codes and back, written to be read.

    q = clamp(x / s + z, lowest, highest), rounded half to even      x^ = (q - z) * s

Rows of x are tokens. The scale s (one factor) has the grain of its spec: TENSOR, CHANNEL (one per
token) or (1, g) (per token and g features; a last short group is allowed). It is stored with the
layer (static), or computed from x on every call:

    symmetric    s = max|x| / peak          peak 0 = the largest value of the element
    zero code    s = (max - min) / (highest - lowest),  z = round(clamp(lowest - min / s)),
                 where min and max include 0
    s = 0        becomes the float epsilon, so that zeros stay zeros

All arithmetic is float32 (float64 for a float64 x), whatever the dtype of x; NaN and infinity
stay visible as NaN. Codes are never stored: a kernel that multiplies codes must give the same sums.

Source of the run-time rules: compressed-tensors 0.19.0 ``quantization/utils/helpers.py``
(calculate_qparams, compute_dynamic_scales_and_zp), ``quantization/lifecycle/forward_helpers.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.base import Rejected
from quant_core.numerics import decode_scale, element_table, scale_dtype
from quant_core.spec import Element, OpSpec, QuantSpec

__all__ = ["fake_quantize", "static_shape", "unsupported_input"]

_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def _range(element: Element) -> tuple[float, float]:
    """Lowest and highest value of an element."""
    if element.kind == "int":
        return -float(1 << (element.bits - 1)), float((1 << (element.bits - 1)) - 1)
    if element.kind == "uint":
        return 0.0, float((1 << element.bits) - 1)
    table = element_table(element.name)
    highest = float(table[torch.isfinite(table)].max())
    return -highest, highest


def unsupported_input(op: OpSpec) -> Rejected | None:
    """Why the operation's "input" operand cannot be computed here; None if it can, or is absent."""
    spec = op.operand("input")
    if spec is None:
        return None

    def reject(have: str, need: str) -> Rejected:
        return Rejected(axis="input", have=have, need=need)

    if spec.element.kind not in ("int", "uint") and spec.element.name not in _FP8:
        return reject(spec.element.name, f"an integer, {' or '.join(sorted(_FP8))}")
    if len(spec.scales) != 1 or spec.scales[0].inverse or spec.gather or spec.blocks:
        return reject(spec.label, "one scale that multiplies")
    scale = spec.scales[0]
    if scale.grain[0] not in (0, 1) or (scale.static and scale.grain[0]):
        return reject(spec.label, "a scale of a tensor, a token, or a token's groups")
    if not scale.static and scale.grain[0] == 0 and scale.grain[1]:
        return reject(spec.label, "a run-time scale of a tensor, a token, or a token's groups")
    if spec.zero is not None and (spec.zero.kind != "code" or spec.element.kind == "float"):
        return reject(spec.label, "no zero, or a zero code of an integer")
    return None


def static_shape(op: OpSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the stored ``input_scale`` and ``input_zero``; empty if there are none."""
    spec = op.operand("input")
    if spec is None or not spec.scales[0].static:
        return {}
    scale, k = spec.scales[0], op.size("k")
    shape: tuple[int, ...] = (-(-k // scale.grain[1]) if scale.grain[1] else 1,)
    out = {"input_scale": (shape, scale_dtype(scale.element))}
    if spec.zero is not None:
        out["input_zero"] = (shape, scale_dtype(spec.zero.element))
    return out


def _run_time(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero computed from x [T, G, g]: [T, G, 1], or [1, 1, 1] for a whole tensor."""
    lowest, highest = _range(spec.element)
    scale = spec.scales[0]
    dims = (0, 1, 2) if scale.grain[0] == 0 else (2,)
    low = groups.amin(dim=dims, keepdim=True).clamp(max=0)
    high = groups.amax(dim=dims, keepdim=True).clamp(min=0)
    if spec.zero is None:
        s = torch.maximum(-low, high) / (scale.peak or highest)
    else:
        s = (high - low) / (highest - lowest)
    s = torch.where(s == 0, torch.finfo(s.dtype).eps, s)
    if spec.zero is None:
        return s, None
    return s, (lowest - low / s).clamp(lowest, highest).round()


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
    scale, k = spec.scales[0], x.shape[-1]
    size = scale.grain[1] or k
    groups = F.pad(work, (0, -k % size)).unflatten(-1, (-1, size))
    if scale.static:
        s = _stored(input_scale, scale.element, "input_scale", work.dtype)
        zero = spec.zero
        z = None if zero is None else _stored(input_zero, zero.element, "input_zero", work.dtype)
    else:
        s, z = _run_time(groups, spec)
    q = groups / s if z is None else groups / s + z
    q = q.clamp(*_range(spec.element))
    q = q.to(_FP8[spec.element.name]).to(work.dtype) if spec.element.kind == "float" else q.round()
    out = (q if z is None else q - z) * s
    return out.flatten(-2)[:, :k].to(x.dtype)
