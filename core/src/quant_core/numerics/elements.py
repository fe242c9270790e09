"""Element types: raw bits to float32, once for everybody.

``decode`` is the only place that knows how a small float, a signed code or an exponent byte is
read. All values are exact in float32 (the smallest, e8m0 byte 0, is the subnormal 2**-127).

Sources: OCP MX v1.0 (fp4_e2m1, fp6, e8m0), OCP OFP8 (fp8_e4m3, fp8_e5m2).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.spec import Element

__all__ = [
    "FLOAT_ELEMENTS",
    "FLOAT8_DTYPES",
    "decode",
    "decode_scale",
    "element_table",
    "scale_dtype",
    "table_on",
]

FLOAT8_DTYPES = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3_fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2_fnuz": torch.float8_e5m2fnuz,
}
_WIDE_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_MINI = {"fp4_e2m1": (2, 1), "fp6_e2m3": (2, 3), "fp6_e3m2": (3, 2)}  # exponent, mantissa bits

FLOAT_ELEMENTS = frozenset(FLOAT8_DTYPES) | frozenset(_MINI) | {"e8m0"}


def _mini_float_table(exp_bits: int, man_bits: int) -> Tensor:
    """All values of a sign/exponent/mantissa type without inf and NaN, in code order."""
    bias = 2 ** (exp_bits - 1) - 1
    values = []
    for code in range(2 ** (exp_bits + man_bits)):
        e, m = code >> man_bits, code & (2**man_bits - 1)
        frac = m / 2**man_bits
        values.append(2.0 ** (1 - bias) * frac if e == 0 else 2.0 ** (e - bias) * (1 + frac))
    return torch.tensor(values + [-v for v in values], dtype=torch.float32, device="cpu")


@functools.cache
def element_table(name: str) -> Tensor:
    """float32 values of every code of a float element, indexed by code.

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` if ``name`` is not a float element.
    """
    if name in _MINI:
        return _mini_float_table(*_MINI[name])
    # the device is named: a table first made inside `with torch.device("meta")` is cached
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    if name in FLOAT8_DTYPES:
        return codes.view(FLOAT8_DTYPES[name]).float()
    if name == "e8m0":  # 2**(e - 127), 255 = NaN; ldexp keeps the subnormal 2**-127 exact
        table = torch.ldexp(torch.ones(256, device=codes.device), codes.to(torch.int32) - 127)
        table[255] = float("nan")
        return table
    raise LayoutError(
        f"element type {name!r} is unknown, expected one of {sorted(FLOAT_ELEMENTS)}. "
        "Use an element of quant_core.numerics or kind='lut' with a codebook.",
        code="Q-LAYOUT-ELEMENT",
        actual=name,
    )


@functools.cache
def _table_on(name: str, device: torch.device) -> Tensor:
    """``element_table`` on a CUDA device, copied there once: a CUDA graph cannot hold the copy."""
    return element_table(name).to(device)


def table_on(name: str, device: torch.device) -> Tensor:
    """``element_table`` on a device."""
    return _table_on(name, device) if device.type == "cuda" else element_table(name).to(device)


def _decode_int(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.view(torch.int8).float()
    half = 1 << (bits - 1)
    return (codes.to(torch.int16).bitwise_xor(half) - half).float()


def decode(codes: Tensor, element: Element, codebook: tuple[Tensor, ...] = ()) -> Tensor:
    """Values of raw codes.

    Args:
        codes: uint8, any shape, one code per byte.
        element: how a code is read.
        codebook: for kind "lut": one table, 1-D float, indexed by the code.

    Returns:
        float32 of the shape of ``codes``.

    Raises:
        LayoutError: ``Q-LAYOUT-ELEMENT`` for an element without a scalar reading.
    """
    if element.kind == "uint":
        return codes.float()
    if element.kind == "int":
        return _decode_int(codes, element.bits)
    if element.kind == "lut":
        return codebook[0].float()[codes.long()]
    if element.kind == "float":
        if element.name in FLOAT8_DTYPES and codes.is_contiguous():
            return codes.view(FLOAT8_DTYPES[element.name]).float()
        return table_on(element.name, codes.device)[codes.long()]
    raise LayoutError(
        f"element {element.name!r} of kind {element.kind!r} has no scalar value per code. "
        "Vector codes are read through their codebooks.",
        code="Q-LAYOUT-ELEMENT",
        actual=element.name,
    )


def scale_dtype(element: str) -> torch.dtype:
    """Storage dtype of a scale tensor: its own for f16/bf16/f32, uint8 for everything else."""
    return _WIDE_DTYPES.get(element, torch.uint8)


def decode_scale(values: Tensor, element: str) -> Tensor:
    """float32 values of a stored scale factor.

    Args:
        values: dtype ``scale_dtype(element)``, any shape.
        element: "f16" "bf16" "f32", a float element, or ``uint<b>`` / ``int<b>``.
    """
    expected = scale_dtype(element)
    if values.dtype != expected:
        raise LayoutError(
            f"scale of element {element!r} has dtype {values.dtype}, expected {expected}. "
            "Store small scales as raw bits in uint8.",
            code="Q-LAYOUT-DTYPE",
            expected=str(expected),
            actual=str(values.dtype),
        )
    if element in _WIDE_DTYPES:
        return values.float()
    if element.startswith("uint"):
        return values.float()
    if element.startswith("int"):
        return _decode_int(values.contiguous(), int(element[3:]))
    return table_on(element, values.device)[values.long()]
