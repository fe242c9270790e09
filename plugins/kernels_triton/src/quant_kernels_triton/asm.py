"""PTX for turning packed codes into pairs of 16-bit floats: one 32-bit word in, pairs out.

Each string is the body of an inline assembly call on two 16-bit words of codes, seen as one of 32
bits. Operands: outputs ``$0 ..``, each the values of columns p = 0, 1, then the word, then per row
h of the pair (g, g + 8): zero, scale, rest of the scale, and rest of the offset, each a pair of
equal halves: ``z0 s0 l0 r0 z1 s1 l1 r1``, and each given twice, once for either 16-bit word.

    uint4, bf16   nibble | 0x4300 is the number 128 + code; subtracting 128 + zero is exact
    uint4, fp16   nibble | 0x6400 is 1024 + code
    uint8         the byte's low 7 bits, less its top bit, after flipping the top bit: code - 128
    uint2, uint3  the same with fields of two bits, and the third bit from its own plane
    e2m1          sign and magnitude moved into place, times a power of two: exact
    e4m3, e5m2    the conversion instruction to fp16 (exact); bf16 through float32

Scales: ``S`` = 0 none, 1 one factor, 2 a factor and its rest (``c * hi + c * lo`` with one
rounding: a float32 scale keeps 16 bits), 3 the same plus an offset.
"""

from __future__ import annotations

import functools

__all__ = ["constraints", "dequant"]

_PARAMS = 8


def constraints(outputs: int) -> str:
    """Register constraints: ``outputs`` results, the word, the eight parameters, and with eight
    results the word of third bits."""
    high = 2 if outputs == 8 else 0
    return ",".join(["=&r"] * outputs + ["r"] * (1 + 2 * _PARAMS + high))


def _scaled(at: int, row: int, outputs: int, act: str, mode: int) -> str:
    first = outputs + 1 + 8 * row
    s, low, rest = (f"${first + 2 * i}" for i in (1, 2, 3))
    out = f"${at}"
    if mode == 0:
        return ""
    if mode == 1:
        return f"mul.{act} {out}, {out}, {s};"
    t = f"mul.{act} t, {out}, {low};" if mode == 2 else f"fma.rn.{act} t, {out}, {low}, {rest};"
    return f"{t} fma.rn.{act} {out}, {out}, {s}, t;"


def _shift(amount: int) -> str:
    return f"shl.b32 u, w, {amount};" if amount > 0 else f"shr.u32 u, w, {-amount};"


def _uint_field(bits: int, at: int, act: str, zero: str) -> list[str]:
    """The code at bit ``at`` of either 16-bit half less its zero."""
    mask, magic = (1 << bits) - 1, 0x4300 if act == "bf16x2" else 0x6400
    move = f"shr.u32 u, w, {at};" if at else "mov.b32 u, w;"
    return [
        move,
        f"lop3.b32 $OUT, u, {mask * 0x10001:#010x}, {magic * 0x10001:#010x}, 0xEA;",
        f"sub.{act} $OUT, $OUT, {zero};",
    ]


def _third(i: int) -> list[str]:
    """Bit ``i`` of the word of third bits, in the place of bit 2 of ``$OUT``."""
    move = f"shl.b32 u, $25, {2 - i};" if i < 2 else f"shr.u32 u, $25, {i - 2};"
    return [move, "lop3.b32 $OUT, u, 0x00040004, $OUT, 0xEA;"]


def _fp4(at: int, act: str) -> list[str]:
    bf = act == "bf16x2"
    place, mask = (6, 0x01C0) if bf else (9, 0x0E00)
    power = 0x7E80 if bf else 0x7400  # 2^126, 2^14
    return [
        _shift(place - at),
        f"and.b32 $OUT, u, {mask * 0x10001:#010x};",
        _shift(12 - at) if at != 12 else "mov.b32 u, w;",
        "lop3.b32 $OUT, u, 0x80008000, $OUT, 0xEA;",
        f"mov.b32 t, {power * 0x10001:#010x}; mul.{act} $OUT, $OUT, t;",
    ]


def _byte_int(row: int, act: str, zero: str, signed: bool) -> list[str]:
    spread = f"prmt.b32 u, w, 0, {'0x4140' if row == 0 else '0x4342'};"
    flip = 0 if signed else 0x00800080
    out = [spread, f"xor.b32 u, u, {flip:#010x};" if flip else ""]
    if act == "bf16x2":
        out += [
            "lop3.b32 $OUT, u, 0x007F007F, 0x43004300, 0xEA;",
            "lop3.b32 t, u, 0x00800080, 0x43004300, 0xEA;",
            "sub.bf16x2 $OUT, $OUT, t;",
        ]
    else:
        out += [
            "xor.b32 u, u, 0x64806480;",
            "mov.b32 t, 0x64806480; sub.f16x2 $OUT, u, t;",
        ]
    return [*out, f"sub.{act} $OUT, $OUT, {zero};" if zero else ""]


def _byte_float(row: int, act: str, element: str) -> list[str]:
    out = [
        "mov.b32 {ha, hb}, w;",
        f"cvt.rn.f16x2.{element}x2 $OUT, {'ha' if row == 0 else 'hb'};",
    ]
    if act == "bf16x2":
        out += [
            "mov.b32 {ha, hb}, $OUT; cvt.f32.f16 fa, ha; cvt.f32.f16 fb, hb;",
            "cvt.rn.bf16x2.f32 $OUT, fb, fa;",
        ]
    return out


@functools.cache
def dequant(element: str, act: str, mode: int, zero: int | None) -> str:
    """The assembly of one word.

    Args:
        element: "uint2", "uint3", "uint4", "uint8", "int8", "e2m1", "e4m3" or "e5m2".
        act: "bf16" or "fp16", the type of the pairs.
        mode: how the scale is applied, see the module's docstring.
        zero: a constant zero of an integer element; None: from the parameter registers.
    """
    pair = {"bf16": "bf16x2", "fp16": "f16x2"}[act]
    few = element in ("uint2", "uint3")
    count = 8 if few else 4 if element in ("uint4", "e2m1") else 2
    lines = ["{ .reg .b32 w, u, t, z; .reg .b16 ha, hb; .reg .f32 fa, fb;", f"mov.b32 w, ${count};"]
    for i in range(count):
        row = i & 1
        held = f"${count + 1 + 8 * row}"
        if element in ("uint2", "uint3", "uint4"):
            base = 0x4300 if act == "bf16" else 0x6400
            if zero is not None:
                lines.append(f"mov.b32 z, {(base | zero) * 0x10001:#010x};")
            width = 2 if few else 4
            part = _uint_field(width, width * i, pair, held if zero is None else "z")
            if element == "uint3":
                part[2:2] = _third(i)
        elif element == "e2m1":
            part = _fp4(4 * i, pair)
        elif element in ("uint8", "int8"):
            signed = element == "int8"
            rest = None if zero is None else (zero if signed else zero - 128)
            if rest:
                lines.append(f"mov.b32 z, {_bits16(rest, act) * 0x10001:#010x};")
            part = _byte_int(row, pair, held if zero is None else "z" if rest else "", signed)
        else:
            part = _byte_float(row, pair, element)
        lines += [line.replace("$OUT", f"${i}") for line in part if line]
        lines.append(_scaled(i, row, count, pair, mode))
    return "\n".join([*(line for line in lines if line), "}"])


def _bits16(value: int, act: str) -> int:
    """``value`` (of at most 8 significant bits) as the bits of a 16-bit float."""
    import struct

    if act == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", float(value)))[0])
    return int(struct.unpack("<I", struct.pack("<f", float(value)))[0] >> 16)
