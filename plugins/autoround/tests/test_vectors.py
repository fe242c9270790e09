"""Words of the tool itself, and worked vectors of the layouts it shares with GPTQ and AWQ."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor

from quant_core.packing import pack, unpack
from quant_core.spec import LayerDesc
from quant_plugin_autoround.scheme import AutoRoundScheme, build_scheme

LAYER = LayerDesc(kind="linear", name="proj", stored="proj")
N, K, G = 8, 32, 16
CODES = ((3 * torch.arange(N)[:, None] + torch.arange(K)) % 16).to(torch.uint8)
SCALES = ((1 + torch.arange(N) + 8 * torch.arange(2)[:, None]) / 16).half()  # (G, N)
# zeros (n + 1 + group) % 16
ZEROS = {
    "minus_one": "76543210 87654321",
    "raw": "87654321 98765432",
    "interleaved": "86427531 97538642",
}


def hexes(words: Tensor) -> str:
    return " ".join(f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist())


def unhex(text: str) -> Tensor:
    values = [int(w, 16) for w in text.split()]
    return torch.tensor([v - (v >> 31 << 32) for v in values], dtype=torch.int32)


def scheme(dialect: str, bits: int = 4, n: int = N, k: int = K) -> AutoRoundScheme:
    return build_scheme(
        shape=(n, k),
        bits=bits,
        group_size=G,
        sym=False,
        dialect=dialect,  # type: ignore[arg-type]
    )


def stored(dialect: str) -> dict[str, Tensor]:
    return {
        "qweight": pack(CODES, 4, scheme(dialect).packing),
        "qzeros": unhex(ZEROS[dialect])[:, None],
        "scales": SCALES,
    }


def test_codes_of_the_common_layer_have_the_published_words() -> None:
    along_k = stored("raw")["qweight"]
    assert hexes(along_k[0]) == (
        "76543210 a9876543 dcba9876 0fedcba9 3210fedc 6543210f 98765432 cba98765"
    )
    assert zlib.crc32(along_k.numpy().tobytes()) == 0x745D7A31
    along_n = stored("interleaved")["qweight"]
    assert hexes(along_n[:2]) == "5f932c60 60a43d71"
    assert zlib.crc32(along_n.numpy().tobytes()) == 0x6BA52BF5


@pytest.mark.parametrize("dialect", ZEROS)
def test_common_layer_has_the_published_values_and_comes_back(dialect: str) -> None:
    made, tensors = scheme(dialect), stored(dialect)
    lt = made.canonicalize(LAYER, tensors)
    w = lt.dequantize()
    assert w[0, :4].tolist() == [-0.0625, 0, 0.0625, 0.125]
    assert w[7, 28:].tolist() == [-8, -7, -6, -5]
    assert float(w.sum()) == 224
    back = made.serialize(LAYER, lt)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dialect", ZEROS)
@pytest.mark.parametrize("other", ZEROS)
def test_zeros_of_another_dialect_give_another_weight(dialect: str, other: str) -> None:
    tensors = stored(dialect) | {"qzeros": stored(other)["qzeros"]}
    w = scheme(dialect).canonicalize(LAYER, tensors).dequantize()
    right = torch.equal(w, scheme(dialect).canonicalize(LAYER, stored(dialect)).dequantize())
    assert right is (dialect == other)


# codes (7 i + 3) mod 2^b, i < 32, packed by AutoRound 0.16.1 utils/bit_packing.py
STREAMS = {
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    5: "4dfc4543 78245ba3 0753617d 4b276cf4 e55c7066",
    6: "9f611283 90bbd2d9 b2579740 8f201eb3 9cab91d5 71538703",
    7: "f3044503 3b68b531 f57a1261 7d73d996 74b0f100 0e592b48 b9567478",
}
INTERLEAVED = {
    4: "468adf13 ce02579b 468adf13 ce02579b",
    5: "b0a6fe23 22dd3ba1 bc3367a0 2b2591ae e3812a9f",
    6: "0ab5f443 727bd266 b1e40295 3a74f073 7e6b9162 70e03254",
    7: "a5a7c883 bb6898c0 842cb5e4 c0f3d97a 5847a3a3 b1dcab48 b93a032a",
}


@pytest.mark.parametrize("bits", STREAMS)
def test_stream_has_the_words_of_the_tool(bits: int) -> None:
    codes = ((7 * torch.arange(32) + 3) % (1 << bits)).to(torch.uint8)
    packing = scheme("raw", bits, n=1).packing
    words = unhex(STREAMS[bits])
    assert torch.equal(pack(codes[None], bits, packing)[:, 0], words)
    assert torch.equal(unpack(words[:, None], bits, (1, 32), packing)[0], codes)
    zeros = scheme("raw", bits).zeros_packing
    assert torch.equal(pack(codes[None], bits, zeros)[0], words)


@pytest.mark.parametrize("bits", INTERLEAVED)
def test_interleaved_stream_has_the_words_of_the_tool(bits: int) -> None:
    codes = ((7 * torch.arange(32) + 3) % (1 << bits)).to(torch.uint8)
    made, words = scheme("interleaved", bits, n=32, k=1), unhex(INTERLEAVED[bits])
    assert torch.equal(pack(codes[:, None], bits, made.packing)[0], words)
    assert torch.equal(unpack(words[None], bits, (32, 1), made.packing)[:, 0], codes)
    assert torch.equal(pack(codes[None], bits, made.zeros_packing)[0], words)
    assert hexes(words) != STREAMS[bits]
