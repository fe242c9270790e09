"""PTX that makes 8-bit operands of weights of 4 or 8 bits; ``mixed_parts`` says of which bytes."""

from __future__ import annotations

__all__ = ["ASM", "POWER"]

ASM = {
    "fp8": """{ .reg .b32 a, b, s, mid, none; mov.b32 mid, 0x08080808; mov.b32 none, 0;
and.b32 a, $2, 0x0F0F0F0F; shr.u32 b, $2, 4; and.b32 b, b, 0x0F0F0F0F;
vabsdiff4.u32.u32.u32 a, a, mid, none; vabsdiff4.u32.u32.u32 b, b, mid, none;
shl.b32 s, $2, 4;
lop3.b32 $0, a, s, 0x80808080, 0xF2; lop3.b32 $1, b, $2, 0x80808080, 0xF2; }""",
    "fp4": """{ .reg .b32 a, b, s;
shl.b32 a, $2, 2; and.b32 a, a, 0x1C1C1C1C; shr.u32 b, $2, 2; and.b32 b, b, 0x1C1C1C1C;
shl.b32 s, $2, 4;
lop3.b32 $0, a, s, 0x80808080, 0xF8; lop3.b32 $1, b, $2, 0x80808080, 0xF8; }""",
    "int8": """{ .reg .b32 s;
shl.b32 s, $2, 4;
lop3.b32 $0, s, 0xF0F0F0F0, 0x80808080, 0x6A; lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }""",
    "bytes": "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
}
"""Four bytes of two codes each, or eight of one, to four weights of row g and four of row g + 8."""

POWER = {"fp8": 512.0, "fp4": 64.0, "int8": 0.0625, "bytes": 1.0}
"""What makes up for the power of two that the weights are multiplied by."""
