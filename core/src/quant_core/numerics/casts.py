"""Float to code: round to the values of an element, with every tie rule in use.

Values beyond the element's largest saturate, infinities too: the clamp is explicit because casts
differ between types and devices (torch 2.13 on CPU: 500 becomes 448 in fp8_e4m3, NaN in
fp8_e4m3_fnuz, and 60000 becomes infinity in fp8_e5m2).

A tie is a value halfway between two neighbours. ``ties`` says where it goes, by magnitude:

    "even"          to the neighbour whose code is even (hardware; most producers)
    "down"          towards zero
    "up" | "away"   away from zero; one rule under the two names producers give it

Every other value goes to the nearest. A negative value that rounds to zero gives -0 where the
element has one; exact zero gives the code 0.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.numerics.elements import FLOAT8_DTYPES, element_table, table_on
from quant_core.spec import Element

__all__ = ["TIES", "element_range", "encode", "fn_to_fnuz", "fnuz_to_fn", "over", "round_to"]

TIES = ("even", "down", "up", "away")


def _check_ties(ties: str) -> None:
    if ties not in TIES:
        raise LayoutError(
            f"ties rule {ties!r} is unknown, expected one of {TIES}. Use 'even' for the IEEE rule.",
            code="Q-LAYOUT-ELEMENT",
            expected=TIES,
            actual=ties,
        )


def element_range(element: Element) -> tuple[float, float]:
    """Lowest and highest finite value of an int, uint or float element.

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` for an element without values of its own.
    """
    if element.kind == "int":
        return -float(1 << (element.bits - 1)), float((1 << (element.bits - 1)) - 1)
    if element.kind == "uint":
        return 0.0, float((1 << element.bits) - 1)
    highest = _magnitudes(element.name)[-1]
    return -highest, highest


def over(values: Tensor, divisor: float) -> Tensor:
    """``values / divisor``, rounded once on every device.

    torch multiplies by the inverse of a Python number on CUDA (2.11, BinaryDivTrueKernel.cu), which
    rounds twice.
    """
    return values / values.new_full((), divisor) if values.is_cuda else values / divisor


@functools.cache
def _magnitudes(name: str) -> tuple[float, ...]:
    """Finite values >= 0 of a float element, ascending; the position of each is its code."""
    table = element_table(name)
    if name == "e8m0":
        raise LayoutError(
            "element 'e8m0' is an exponent, expected an element with a mantissa. Make it with "
            "mx_scale or encode_e8m0.",
            code="Q-LAYOUT-ELEMENT",
            actual=name,
        )
    half = table[: len(table) // 2]
    return tuple(half[torch.isfinite(half)].tolist())


def _middles(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints of neighbouring magnitudes; exact: every one is a float32."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(_magnitudes(name))]
    return torch.tensor(middles, dtype=dtype, device=device)


_middles_on_cuda = functools.cache(_middles)  # a CUDA graph cannot hold the copy


def _nearest(magnitude: Tensor, name: str, ties: str) -> Tensor:
    """Codes (int64) of finite magnitudes >= 0."""
    values = _magnitudes(name)
    held = _middles_on_cuda if magnitude.device.type == "cuda" else _middles
    middle = held(name, magnitude.dtype, magnitude.device)
    magnitude = magnitude.contiguous()
    if ties != "even":
        return torch.bucketize(magnitude, middle, right=ties != "down")
    low = torch.bucketize(magnitude, middle)
    tied = magnitude == middle[low.clamp(max=len(values) - 2)]
    return low + (tied & (low % 2 == 1))


def _work(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def round_to(values: Tensor, element: Element, ties: str = "even") -> Tensor:
    """Each value replaced by the nearest one of ``element``; saturating, NaN stays NaN.

    Shapes: any, float -> the same shape, float32 (float64 for float64)

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` for an unknown tie rule or element.
    """
    _check_ties(ties)
    x = _work(values)
    lowest, highest = element_range(element)
    x = x.clamp(lowest, highest)
    if element.kind in ("int", "uint"):
        if ties == "even":
            return x.round()
        whole = x.abs().sub(0.5).ceil() if ties == "down" else x.abs().add(0.5).floor()
        # 0.5 - 2**-25 + 0.5 rounds up to 1: what is not a tie is rounded as usual
        whole = torch.where((x - x.trunc()).abs() == 0.5, whole, x.abs().round())
        return torch.copysign(whole, x)
    if element.name in FLOAT8_DTYPES and ties == "even" and x.dtype == torch.float32:
        return x.to(FLOAT8_DTYPES[element.name]).float()
    codes = _nearest(x.abs().nan_to_num(0.0), element.name, ties)
    table = table_on(element.name, x.device).to(x.dtype)
    out = torch.copysign(table[codes], x)
    return torch.where(torch.isnan(x), x, out)


def encode(values: Tensor, element: Element, ties: str = "even") -> Tensor:
    """Raw codes of the nearest values of ``element``: the inverse of ``decode``.

    Shapes: any, float -> the same shape, uint8, one code per byte

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN where the element has no code for it (reads the
            data), ``Q-LAYOUT-ELEMENT`` for an unknown tie rule or element.
    """
    _check_ties(ties)
    if element.kind in ("int", "uint"):
        _refuse_nan(values, element)
        return round_to(values, element, ties).to(torch.int16).bitwise_and(
            (1 << element.bits) - 1
        ).to(torch.uint8)  # fmt: skip
    highest = element_range(element)[1]
    x = _work(values).clamp(-highest, highest)
    dtype = FLOAT8_DTYPES.get(element.name)
    if dtype is not None and ties == "even" and x.dtype == torch.float32:
        return x.to(dtype).contiguous().view(torch.uint8)
    if dtype is None:
        _refuse_nan(values, element)
    half = element_table(element.name).numel() // 2
    codes = _nearest(x.abs().nan_to_num(0.0), element.name, ties)
    negative = torch.signbit(x) & (x != 0)
    if element.name.endswith("_fnuz"):  # its 0x80 is NaN: no negative zero
        negative &= codes != 0
    codes = codes + half * negative
    if dtype is not None:
        nan = half if element.name.endswith("_fnuz") else 2 * half - 1
        codes = torch.where(torch.isnan(x), nan, codes)
    return codes.to(torch.uint8)


def _refuse_nan(values: Tensor, element: Element) -> None:
    bad = torch.isnan(values)
    if bool(bad.any()):
        raise LayoutError(
            f"values to encode hold {int(bad.sum())} NaN, expected numbers: {element.name} has no "
            "code for NaN. Quantize finite weights.",
            code="Q-VALUE-WEIGHT",
            expected="finite",
            actual=int(bad.sum()),
        )


def fn_to_fnuz(codes: Tensor) -> Tensor:
    """fp8_e4m3 codes as fp8_e4m3_fnuz codes of HALF the value: double the scales.

    Only the byte of -0 changes (0x80 is NaN there). Source: vLLM 0.32
    ``normalize_e4m3fn_to_e4m3fnuz``.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN codes, which would turn into numbers.
    """
    nan = int((codes & 0x7F == 0x7F).sum())
    if nan:
        raise _nan_codes(nan, "0x7F or 0xFF")
    return torch.where(codes == 0x80, 0, codes).to(torch.uint8)


def fnuz_to_fn(codes: Tensor) -> Tensor:
    """fp8_e4m3_fnuz codes as fp8_e4m3 codes of TWICE the value: halve the scales.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for the NaN code, and for +-240, which is NaN there.
    """
    nan = int(((codes == 0x80) | (codes & 0x7F == 0x7F)).sum())
    if nan:
        raise _nan_codes(nan, "0x80, 0x7F or 0xFF")
    return codes.clone()


def _nan_codes(count: int, which: str) -> LayoutError:
    return LayoutError(
        f"codes: {count} are {which}, expected codes that both variants of e4m3 have. "
        "Quantize again with the other variant.",
        code="Q-VALUE-WEIGHT",
        actual=count,
    )
