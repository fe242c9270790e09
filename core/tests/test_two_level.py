"""Scales in two levels, and the tile order of block scales."""

from __future__ import annotations

import pytest
import torch

from quant_core.numerics import (
    block_scale,
    decode,
    decode_scale,
    encode,
    encode_scale,
    swizzle_scales,
    swizzled_offset,
    tensor_scale,
    unswizzle_scales,
)
from quant_core.spec import Element

FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
# The worked row of ModelOpt 0.47 and compressed-tensors 0.20, which store the same bytes
ROW = torch.tensor([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 1.1, -1.2, 1.3, -1.4,
                    1.5, -3.0])  # fmt: skip
PACKED = "90a1a2b3c4c4d5f5"
VALUES = [0, -0.25, 0.25, -0.5, 0.5, -0.5, 0.75, -0.75, 1, -1, 1, -1, 1.5, -1.5, 1.5, -3]


@pytest.mark.parametrize("inverse", [False, True])
def test_worked_row_has_the_published_bytes_in_both_directions(inverse):
    factor = tensor_scale(ROW.abs().max(), inverse=inverse)
    assert factor.item() == (896.0 if inverse else torch.tensor(3 / 2688).item())
    block = block_scale(ROW.abs().max(), factor, inverse=inverse)
    assert block.item() == 0x7E
    value = decode_scale(block, "fp8_e4m3")
    s = value / factor if inverse else value * factor
    codes = encode(ROW / s, FP4)
    assert bytes((codes[::2] | codes[1::2] << 4).tolist()).hex() == PACKED
    got = decode(codes, FP4) * s
    assert torch.allclose(got, torch.tensor(VALUES), rtol=2**-23, atol=0)  # one ulp: 448 * 3/2688


def test_smallest_block_scale_saturates_or_vanishes():
    factor = torch.tensor(1.0)
    amax = torch.tensor([1e9, 6 * 2.0**-9, 1e-9])
    assert block_scale(amax, factor).tolist() == [0x7E, 0x01, 0x00]
    assert block_scale(amax, factor, least=2.0**-9).tolist() == [0x7E, 0x01, 0x01]


def test_tensor_of_zeros_has_the_factor_one():
    assert tensor_scale(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert tensor_scale(torch.zeros(()), inverse=True).item() == 1.0


def test_eight_bit_elements_under_block_scales_use_their_own_range():
    fp8 = Element(name="fp8_e4m3", bits=8, kind="float")
    assert tensor_scale(torch.tensor(448.0 * 448), element=fp8).item() == 1.0


@pytest.mark.parametrize("element", ["f32", "bf16", "fp8_e4m3", "e8m0", "uint6", "int8"])
def test_encode_scale_is_the_inverse_of_decode_scale(element):
    values = torch.tensor([1.0, 2.0, 16.0])
    assert torch.equal(decode_scale(encode_scale(values, element), element), values)


# ----------------------------------------------------------------------------------- swizzle


def test_swizzled_offsets_equal_the_formula():
    rows, cols = 200, 6
    scales = (torch.arange(rows * cols) % 251 + 1).to(torch.uint8).view(rows, cols)
    flat = swizzle_scales(scales)
    assert flat.shape == (2 * 2 * 512,)
    for r, c in [(0, 0), (31, 3), (32, 0), (127, 3), (128, 0), (199, 5), (0, 4), (130, 5)]:
        offset = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4
        assert swizzled_offset(r, c, cols) == offset
        assert flat[offset] == scales[r, c]
    assert int((flat == 0).sum()) == flat.numel() - rows * cols  # the padding
    assert torch.equal(unswizzle_scales(flat, rows, cols), scales)


def test_swizzle_equals_torchao():
    """sha256 of torchao 0.18.0 ``prototype.mx_formats.utils.to_blocked`` on the same bytes."""
    import hashlib

    scales = (torch.arange(200 * 6) % 251).to(torch.uint8).view(200, 6)
    digest = hashlib.sha256(bytes(swizzle_scales(scales).tolist())).hexdigest()
    assert digest[:16] == "a5927e5e9679da0d"


def test_stacks_are_swizzled_expert_by_expert():
    scales = torch.randint(0, 256, (3, 40, 5), dtype=torch.uint8)
    stacked = swizzle_scales(scales)
    assert torch.equal(stacked, torch.stack([swizzle_scales(s) for s in scales]))
    assert torch.equal(unswizzle_scales(stacked, 40, 5), scales)
