"""Two-level scales: one small float per block under one float32 per tensor.

    W = code * block_scale * g          g = amax / (6 * 448) for fp4 codes under fp8 block scales

A file holds g, or its inverse G = 6 * 448 / amax. The inverse stays what it is: it is applied by
division, and block scales are made from it by multiplication, because that is how its producers
round:

    g stored:  block_scale = round(clamp(amax_b / (6 * g)))
    G stored:  block_scale = round(clamp(G * (amax_b / 6)))

Sources: ModelOpt 0.47 ``qtensor/nvfp4_tensor.py`` (g, block scales at least 2**-9);
compressed-tensors 0.20 ``quantization/utils/helpers.py`` generate_gparam, calculate_qparams (G, a
block scale of zero becomes 0.125).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.numerics.casts import element_range, encode, over
from quant_core.numerics.elements import scale_dtype
from quant_core.numerics.mx import encode_e8m0
from quant_core.spec import Element

__all__ = ["block_scale", "encode_scale", "tensor_scale"]

_FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
_FP4 = Element(name="fp4_e2m1", bits=4, kind="float")


def encode_scale(values: Tensor, element: str) -> Tensor:
    """Float scales as stored: the dtype of ``scale_dtype``; the inverse of ``decode_scale``.

    Small floats are rounded half to even and saturate; e8m0 takes powers of two only.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` for e8m0 values that are no powers of two.
    """
    if element == "e8m0":
        return encode_e8m0(values)
    dtype = scale_dtype(element)
    if dtype != torch.uint8:
        return values.to(dtype)
    if element.startswith(("uint", "int")):
        kind = "uint" if element.startswith("uint") else "int"
        bits = int(element.removeprefix(kind))
        return encode(values, Element.uint(bits) if kind == "uint" else Element.int(bits))
    return encode(values, Element(name=element, bits=8, kind="float"))


def tensor_scale(
    amax: Tensor, *, element: Element = _FP4, scale: str = "fp8_e4m3", inverse: bool = False
) -> Tensor:
    """The float32 factor of a whole tensor: amax / (qmax * smax), or its inverse.

    Args:
        amax: largest magnitude of the tensor. 0 gives 1, so that zeros stay zeros.
        element, scale: of the codes (qmax) and of the block scales (smax).
    """
    amax = amax.float()
    top = element_range(element)[1] * element_range(Element(name=scale, bits=8, kind="float"))[1]
    value = top / amax if inverse else over(amax, top)
    return torch.where(amax == 0, 1.0, value)


def block_scale(
    amax: Tensor,
    factor: Tensor,
    *,
    element: Element = _FP4,
    scale: str = "fp8_e4m3",
    inverse: bool = False,
    qmax: float = 0.0,
    least: float = 0.0,
    most: float = 0.0,
) -> Tensor:
    """Codes of the block scales under ``factor``: uint8 of the shape of ``amax``.

    Args:
        amax: largest magnitude of each block.
        factor: of ``tensor_scale``, broadcastable over ``amax``.
        qmax: what the block's largest magnitude becomes; 0 = the element's largest value.
        least, most: bounds of the scale before rounding, 0 = none. What rounds to 0 is 0.
    """
    qmax = qmax or element_range(element)[1]
    factor, amax = factor.float(), amax.float()
    value = factor * over(amax, qmax) if inverse else amax / (qmax * factor)
    return encode_scale(value.clamp(min=least, max=most or None), scale)
