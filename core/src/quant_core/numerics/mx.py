"""The shared exponent of a block: from the block's largest magnitude to an e8m0 byte.

byte = 127 + exponent. emax is the exponent of the element's largest value (2 for fp4_e2m1 and
fp6_e2m3, 4 for fp6_e3m2, 8 for fp8_e4m3, 15 for fp8_e5m2), qmax that value, m its mantissa bits.

    rule         exponent                                  amax can overflow the block?
    floor        floor(log2 amax) - emax                   yes, then it saturates
    ceil         ceil(log2 amax) - emax                    no
    rceil        ceil(log2(amax / qmax)), on the bits      no
    rceil_log2   the same through a float32 logarithm      by one ulp above a power of two
    even         floor of amax rounded at bit m            a little
    even_m1      as even, m = 1 (3 for 6-bit elements)     a little
    even_log2    floor(log2(amax * 8/7 + 9.6e-7)) - emax   a little

A block of zeros gets the smallest byte of its rule, NaN and infinity get 255 (NaN). Which rule a
producer uses cannot be seen in a file: stored bytes are used as stored, never derived again.

Sources: OCP MX v1.0 section 6.3 (floor); torchao 0.18 ``prototype/mx_formats/mx_tensor.py``
(floor, ceil, even, rceil); triton_kernels ``numerics_details/mxfp.py`` (rceil); ModelOpt 0.47
``qtensor/mxfp8_tensor.py`` (rceil_log2); compressed-tensors 0.20
``quantization/utils/mxfp_utils.py`` (even_m1); ModelSlim 26.1 (even_log2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.numerics.casts import element_range, over
from quant_core.numerics.elements import table_on
from quant_core.spec import Element

__all__ = [
    "MX_RULES",
    "decode_e8m0",
    "encode_e8m0",
    "mx_scale",
    "round_up_power_of_two",
]

MX_RULES = ("floor", "ceil", "rceil", "rceil_log2", "even", "even_m1", "even_log2")

_MANTISSA = {"fp4_e2m1": 1, "fp6_e2m3": 3, "fp6_e3m2": 2, "fp8_e4m3": 3, "fp8_e5m2": 2}
_FRACTION = (1 << 23) - 1  # mantissa bits of a float32


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _byte(exponent: Tensor) -> Tensor:
    """Exponent (float, may be -inf) to a byte without NaN, which is the caller's."""
    return (exponent + 127).clamp(0, 254).nan_to_num(0.0).to(torch.int32)


def mx_scale(amax: Tensor, element: Element, rule: str = "rceil", qmax: float = 0.0) -> Tensor:
    """e8m0 bytes of blocks whose largest magnitude is ``amax``.

    Args:
        amax: float >= 0, any shape; read as float32.
        element: what the block's values are rounded to afterwards.
        rule: one of ``MX_RULES``.
        qmax: for the rceil rules; 0 = the element's largest value.

    Returns:
        uint8 of the shape of ``amax``.

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` for an unknown rule, or an element without exponent.
    """
    if rule not in MX_RULES or element.name not in _MANTISSA:
        raise LayoutError(
            f"block scale rule {rule!r} for {element.name!r} is unknown, expected one of "
            f"{MX_RULES} for one of {tuple(_MANTISSA)}. Name the producer's rule.",
            code="Q-LAYOUT-ELEMENT",
            expected=MX_RULES,
            actual=(rule, element.name),
        )
    amax = amax.detach().float()
    highest = element_range(element)[1]
    emax = math.frexp(highest)[1] - 1
    bits = _bits(amax)
    if rule == "rceil":
        byte = (_bits(over(amax, qmax or highest)) + _FRACTION) >> 23
    elif rule == "rceil_log2":
        byte = _byte(torch.log2(over(amax, qmax or highest)).ceil())
    elif rule == "even_log2":
        byte = _byte(torch.log2(over(amax * 8, 7.0) + 9.6e-7).floor() - emax)
    elif rule == "ceil":
        byte = (bits >> 23) + (bits & _FRACTION > 0) - emax
    else:
        if rule != "floor":
            m = _MANTISSA[element.name]
            if rule == "even_m1":
                m = 3 if element.bits == 6 else 1
            bits = bits + (1 << (23 - m - 1))
        byte = (bits >> 23) - emax
    byte = torch.where(torch.isfinite(amax), byte.clamp(0, 254), 255)
    return byte.to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """float32 powers of two of e8m0 bytes: byte 0 is 2**-127, 255 is NaN."""
    return table_on("e8m0", codes.device)[codes.long()]


def encode_e8m0(values: Tensor) -> Tensor:
    """e8m0 bytes of float32 values that ARE powers of two. Exact.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` if any is not a power of two from 2**-127 to 2**127: a scale
            must not be rounded without quantizing its values again.
    """
    values = values.float()
    mantissa, exponent = torch.frexp(values)
    byte = exponent + 126
    bad = (mantissa != 0.5) | (byte < 0) | (byte > 254)
    if bool(bad.any()):
        shown = values[bad].flatten()[0].item()
        raise LayoutError(
            f"scales: {int(bad.sum())} of {bad.numel()} are no powers of two (first {shown!r}), "
            "expected 2**-127 to 2**127. Keep them as floats, or quantize the values again.",
            code="Q-VALUE-SCALE",
            expected="powers of two",
            actual=shown,
        )
    return byte.to(torch.uint8)


def round_up_power_of_two(values: Tensor) -> Tensor:
    """The smallest power of two >= each positive float32 value, on the bits (ue8m0 scales).

    Zero stays zero, NaN stays NaN; a subnormal becomes 2**-126. Source: DeepGEMM
    ``ceil_to_ue8m0``; scales = round_up_power_of_two(amax / 448) with amax at least 1e-4 there.
    """
    values = values.float()
    exponent = (_bits(values) + _FRACTION) >> 23
    rounded = (exponent << 23).view(torch.float32)
    return torch.where(torch.isnan(values), values, rounded)
