"""Words worked out with the producers' own packers: GPTQModel 7.7.0 (stream, planar, v1 shift)."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from quant_core.intpack import read_zeros, write_zeros
from quant_core.intspec import weight_spec
from quant_core.packing import pack, unpack
from quant_plugin_gptq.layout import canonicalize, serialize
from quant_plugin_gptq.scheme import GptqScheme

N, K, G = 8, 32, 16
CODES = (3 * torch.arange(N)[:, None] + torch.arange(K)) % 16
ZEROS = (torch.arange(N) + 1 + torch.arange(2)[:, None]) % 16  # (G, N)
SCALES = ((1 + torch.arange(N) + 8 * torch.arange(2)[:, None]) / 16).half()
ROW0 = "76543210 a9876543 dcba9876 0fedcba9 3210fedc 6543210f 98765432 cba98765"
ZEROS_V2, ZEROS_V1 = "87654321 98765432", "76543210 87654321"


def hexes(words: Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist())


def unhex(text: str) -> Tensor:
    values = [int(w, 16) for w in text.split()]
    return torch.tensor([v - (v >> 31 << 32) for v in values], dtype=torch.int32)


def scheme(bits: int = 4, n: int = N, k: int = K, g: int = G, **changes: object) -> GptqScheme:
    spec = weight_spec(bits, k, g, sym=False, scale_dtype="float16", gather=False)
    fields = {"sym": False, "v1": True} | changes
    return GptqScheme(
        name=f"w{bits}a16",
        shape=(n, k),
        operands={"weight": spec},
        bits=bits,
        group_size=g,
        **fields,
    )


def stored(zeros: str) -> dict[str, Tensor]:
    return {
        "qweight": pack(CODES.to(torch.uint8), 4, scheme().packing),
        "qzeros": unhex(zeros)[:, None],
        "scales": SCALES,
        "g_idx": (torch.arange(K) // G).to(torch.int32),
    }


def test_qweight_of_the_common_layer_has_the_published_words() -> None:
    words = pack(CODES.to(torch.uint8), 4, scheme().packing)
    assert hexes(words[0]) == ROW0
    assert words.shape == (4, 8)
    assert zlib.crc32(words.numpy().tobytes()) == 0x745D7A31


@pytest.mark.parametrize(("zeros", "v1"), [(ZEROS_V2, False), (ZEROS_V1, True)])
def test_common_layer_dequantizes_to_the_published_values(zeros: str, v1: bool) -> None:
    made = scheme(v1=v1)
    tensors = canonicalize(made, "layer", stored(zeros))
    w = tensors.dequantize()
    assert w[0, :4].tolist() == [-0.0625, 0, 0.0625, 0.125]
    assert w[7, 28:].tolist() == [-8, -7, -6, -5]
    assert float(w.sum()) == 224
    back = serialize(made, "layer", tensors)
    assert {n: hexes(t) for n, t in back.items() if n != "scales"} == {
        n: hexes(t) for n, t in stored(zeros).items() if n != "scales"
    }


def test_v2_zeros_read_as_v1_give_another_weight() -> None:
    w = canonicalize(scheme(v1=True), "layer", stored(ZEROS_V2)).dequantize()
    assert float(w.sum()) != 224


def test_swapped_nibbles_give_another_weight() -> None:
    tensors = stored(ZEROS_V1)
    raw = tensors["qweight"].to(torch.int64) & 0xFFFFFFFF
    swapped = ((raw & 0x0F0F0F0F) << 4) | ((raw >> 4) & 0x0F0F0F0F)
    tensors["qweight"] = (swapped - ((swapped >> 31) << 32)).to(torch.int32)
    assert canonicalize(scheme(), "layer", tensors).dequantize()[0, 0] != -0.0625


def test_word_of_eight_codes_has_the_published_order() -> None:
    assert hexes(pack(torch.arange(8, dtype=torch.uint8)[None], 4, scheme().packing)) == "76543210"


@pytest.mark.parametrize(
    ("bits", "planar", "words"),
    [
        (3, False, "88fac688 c688fac6 fac688fa"),
        (3, True, "e4e4e4e4 e4e4e4e4 f0f0f0f0"),
        (5, False, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
        (5, True, "76543210 fedcba98 76543210 fedcba98 ffff0000"),
    ],
)
def test_wide_and_odd_codes_have_the_published_words(bits: int, planar: bool, words: str) -> None:
    codes = (torch.arange(32) % (8 if bits == 3 else 32)).to(torch.uint8)[None]
    packing = scheme(bits, n=1, planar=planar).packing
    assert hexes(pack(codes, bits, packing)) == words
    assert torch.equal(unpack(unhex(words)[:, None], bits, (1, 32), packing), codes)


def test_v1_zero_of_zero_borrows_and_comes_back() -> None:
    packing = scheme().zeros_packing
    fields = torch.tensor([[15, 3, 15, 14, 14, 14, 14, 14]], dtype=torch.uint8)
    zeros = torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    words = pack(fields, 4, packing)
    assert torch.equal(read_zeros(words, 4, 8, packing, minus_one=True), zeros)
    assert torch.equal(write_zeros(zeros, 4, packing, minus_one=True), words)
    per_field = (fields + 1) & 15  # the reading that older loaders use
    assert not torch.equal(per_field, zeros)


@pytest.mark.parametrize(
    ("bits", "v1", "words"),
    [
        (2, True, "55555555"),
        (2, False, "aaaaaaaa"),
        (4, True, "77777777"),
        (4, False, "88888888"),
        (8, True, "7f7f7f7f"),
        (8, False, "80808080"),
        (3, True, "db6db6db b6db6db6 6db6db6d"),
        (3, False, "24924924 49249249 92492492"),
    ],
)
def test_symmetric_zeros_have_the_published_constants(bits: int, v1: bool, words: str) -> None:
    packing = scheme(bits).zeros_packing
    n = 32 * len(words.split()) // bits
    half = torch.full((1, n), 1 << (bits - 1), dtype=torch.uint8)
    assert hexes(write_zeros(half, bits, packing, minus_one=v1)) == words
    assert torch.equal(read_zeros(unhex(words)[None], bits, n, packing, minus_one=v1), half)
