"""Worked vectors and words that compressed-tensors itself packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from made_words import words
from quant_core.load import read_matrix
from quant_core.packing import unpack
from quant_core.spec import Packing

# rows of 40 codes (5 * i) % 2**b - 2**(b-1), from pack_to_int32 of the versions named
VALUES = {b: (torch.arange(40) * 5) % (1 << b) for b in (3, 5, 6, 7)}
DENSE = {  # compressed-tensors 0.19.0
    3: "a878cea8 cea878ce 78cea878 0078cea8",
    5: "b347a8a0 cbc9a81f eab05983 b89b924f dda2c38b b347a8a0 0000001f",
    6: "543ca140 2b688de6 2c607cdf 647da550 2f78ceea 6d644c1c 74bea960 00000fee",
    7: "41e28280 a84678c9 0bc6ec96 aad0971a bb4e4bf6 e0bef8e7 365888c0 45ea92a0 0086f9cb",
}
PADDED = {  # compressed-tensors 0.9.4
    3: "2878cea8 3aa1e33a 0cea878c 1e33aa1e",
    5: "3347a8a0 2f26a07e 2b05983c 26e493fa 22c38bb8 1ea28376 0001fb34",
    6: "143ca140 2da23799 0607cdf2 1f69540b 38ceea64 113070bd 2a9606d6 03fb9d2f",
    7: "01e28280 04678c94 06ec96a8 0971a0bc 0bf6aad0 0e7bb4e4 00e0bef8 0365888c 05ea92a0 086f9cb4",
}


def hexed(text):
    return words([int(w, 16) for w in text.split()]).view(1, -1)


@pytest.mark.parametrize("bits", VALUES)
def test_both_packings_are_the_librarys_own(ct, bits):
    codes = VALUES[bits].view(1, 40).to(torch.uint8)
    for golden, pad in ((DENSE, False), (PADDED, True)):
        stored = hexed(golden[bits])
        assert torch.equal(ct.pack_rows(codes, bits, pad=pad), stored)
        packing = Packing(word="int32", straddle=not pad)
        assert torch.equal(unpack(stored, bits, (1, 40), packing), codes)
    dense = Packing(word="int32")  # negative control: the wrong packing gives other codes
    width = DENSE[bits].count(" ") + 1
    assert not torch.equal(unpack(hexed(PADDED[bits])[:, :width], bits, (1, 40), dense), codes)


def _load(ct, write, stored, config):
    planned = ct.plan(write(ct.named(stored), config))
    member = planned.members[ct.NAME]
    return member, read_matrix(planned, member)


def test_worked_layer_of_four_bits(ct, write):
    n, k, g = torch.arange(8)[:, None], torch.arange(32)[None], torch.arange(2)[None]
    codes, zeros = (3 * n + k) % 16, (n + 1 + g) % 16
    stored = {
        "weight_packed": ct.pack_rows(codes, 4),
        "weight_scale": ((1 + n + 8 * g) / 16).float(),
        "weight_shape": torch.tensor([8, 32]),
        "weight_zero_point": hexed("87654321 98765432"),
    }
    assert torch.equal(stored["weight_packed"][:1], hexed("76543210 fedcba98 76543210 fedcba98"))
    assert torch.equal(ct.pack_rows(zeros.t(), 4).t(), stored["weight_zero_point"])
    config = ct.block(ct.args(4, 16, symmetric=False))
    member, lt = _load(ct, write, stored, config)
    w = lt.dequantize()
    assert w[0, :4].tolist() == [-0.0625, 0.0, 0.0625, 0.125]
    assert w[7, 28:].tolist() == [-8.0, -7.0, -6.0, -5.0]
    assert w.sum() == 224
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
    lt.operands["weight"] = replace(lt.weight, zeros=lt.weight.zeros + 1)
    assert lt.dequantize().sum() != 224


def test_worked_row_of_symmetric_four_bits(ct, write):
    stored = {
        "weight_packed": hexed("76543210 fedcba98"),
        "weight_scale": torch.tensor([[0.5, 0.5]]),
        "weight_shape": torch.tensor([1, 16]),
    }
    _, lt = _load(ct, write, stored, ct.block(ct.args(4, 8)))
    assert lt.dequantize().tolist() == [[v / 2 for v in range(-8, 8)]]


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (3, "88fac688 c688fac6 fac688fa"),
        (5, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
    ],
)
def test_worked_streams(ct, write, bits, text):
    stored = {
        "weight_packed": hexed(text),
        "weight_scale": torch.ones(1, 1),
        "weight_shape": torch.tensor([1, 32]),
    }
    _, lt = _load(ct, write, stored, ct.block(ct.args(bits, 32)))
    top = 1 << bits
    assert lt.dequantize().tolist() == [[float(i % top - top // 2) for i in range(32)]]


# dequantize(q, scale, zero_point, g_idx) of compressed-tensors 0.9.4; columns 8..31 repeat
G_IDX = [1, 0, 3, 2, 2, 3, 0, 1]
ORDERED = [
    [-0.875, 0.4375, -0.25, -0.5625, 0.75, -3.0, 0.625, -0.75,
     0.125, 0.9375, -2.25, 0.9375, -0.75, -1.0, 0.125, 0.25],
    [-1.125, -0.3125, 0.5, -2.1875, 0.875, 3.0, 0.625, -0.75,
     1.875, -2.8125, 4.5, -5.6875, -2.625, 7.0, -1.875, 2.25],
]  # fmt: skip


@pytest.mark.parametrize("packs_zeros", [False, True], ids=["int8 zeros", "packed zeros"])
def test_activation_order_is_the_librarys_own(ct, write, packs_zeros):
    n, k = torch.arange(2)[:, None], torch.arange(32)[None]
    codes = (n * 3 + k * 7) % 16
    signed = torch.tensor([[-8, -1, 0, 7], [3, -2, 5, -8]], dtype=torch.int8)
    stored = ct.packed_layer(
        codes,
        (torch.arange(8).view(2, 4) + 1).float() / 16,
        (signed + 8) if packs_zeros else None,
        bits=4,
    )
    if not packs_zeros:
        stored["weight_zero_point"] = signed
    stored["weight_g_idx"] = torch.tensor(4 * G_IDX, dtype=torch.int32)
    config = ct.block(ct.args(4, 8, symmetric=False, actorder="group"), version="0.9.0")
    member, lt = _load(ct, write, stored, config)
    assert lt.weight.gather is not None
    assert lt.dequantize().tolist() == [row + row for row in ORDERED]
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)
