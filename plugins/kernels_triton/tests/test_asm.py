"""The PTX that turns codes into pairs of 16-bit floats, run instruction by instruction."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from quant_core.numerics import element_table
from quant_kernels_triton.asm import dequant

WORD = 0xFFFFFFFF


def floats(word: int) -> Tensor:
    """The two bfloat16 of a word, the lower first, as float32."""
    bits = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32) << 16
    return bits.view(torch.float32)


def word_of(values: Tensor) -> int:
    """float32 rounded to two bfloat16 of one word."""
    low, high = (values.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF).tolist()
    return low | high << 16


def permuted(a: int, b: int, selector: int) -> int:
    of = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    assert not selector & 0x8888  # would spread signs
    return int.from_bytes(bytes(of[selector >> 4 * i & 7] for i in range(4)), "little")


MEANING = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & WORD,
    "prmt.b32": permuted,
    "sub.bf16x2": lambda a, b: word_of(floats(a) - floats(b)),
    "mul.bf16x2": lambda a, b: word_of(floats(a) * floats(b)),
}


def run(text: str, given: dict[str, int], outputs: int) -> list[int]:
    """The outputs of an assembly body whose operands have the values ``given``."""
    held = dict(given)
    body = re.sub(r"\.reg [^;]*;", "", text.strip().strip("{}"))
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, _, rest = line.partition(" ")
        to, *names = (part.strip() for part in rest.split(","))
        values = [held[n] if n in held else int(n, 0) for n in names]
        if name == "lop3.b32":
            a, b, c, table = values
            assert table == 0xEA
            held[to] = a & b | c
        else:
            held[to] = MEANING[name](*values)
    return [held[f"${i}"] for i in range(outputs)]


def weights(element: str, zero: int | None, word: int) -> list[float]:
    """All weights of a word of codes, in the order of the codes from the lowest bits on."""
    outputs = 2 if element in ("uint8", "int8") else 4
    made = run(dequant(element, "bf16", 0, zero), {f"${outputs}": word}, outputs)
    low, high = zip(*(floats(m).tolist() for m in made), strict=True)
    if outputs == 2:  # a pair is the two bytes of one half
        return [low[0], high[0], low[1], high[1]]
    return [*low, *high]  # a pair is one field of both halves


BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("code", range(256))
def test_every_byte_becomes_its_value(code):
    word = code | (code ^ 0x55) << 8 | (code ^ 0xAA) << 16 | (255 - code) << 24
    codes = torch.tensor([code, code ^ 0x55, code ^ 0xAA, 255 - code])
    assert weights("int8", 0, word) == BYTES[codes].view(torch.int8).tolist()
    assert weights("uint8", 128, word) == (codes - 128).tolist()


@pytest.mark.parametrize(("element", "zero"), [("uint4", 8), ("uint4", 3), ("e2m1", None)])
def test_every_nibble_becomes_its_value(element, zero):
    of = element_table("fp4_e2m1") if element == "e2m1" else torch.arange(16) - float(zero)
    for first in range(16):
        codes = [(first + 3 * i) % 16 for i in range(8)]
        word = sum(c << 4 * i for i, c in enumerate(codes))
        assert weights(element, zero, word) == of[codes].tolist()
