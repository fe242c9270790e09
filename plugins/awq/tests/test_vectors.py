"""Published worked vectors, and layers packed by the independent packers of conftest."""

from __future__ import annotations

import zlib

import pytest
import torch

from quant_core.intspec import INTERLEAVE
from quant_core.packing import unpack
from quant_core.spec import Packing
from quant_plugin_awq.layout import pack_tiles
from quant_plugin_awq.scheme import build_scheme


def _hex(words):
    return [f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist()]


def _scheme(layout, n, k, g, **kw):
    if layout == "llm-awq":
        kw.setdefault("zeros", "scaled_zeros")
    return build_scheme(layout=layout, shape=(n, k), bits=4, group_size=g, **kw)


def _dense(codes, zeros, scales, g):
    z, s = (t.float().repeat_interleave(g, dim=1) for t in (zeros, scales))
    return (codes.float() - z) * s


def test_gemm_worked_vector_words_and_weights(ref, linear):
    codes, zeros, scales = ref.worked_layer()
    scheme = _scheme("gemm", 8, 32, 16)
    qweight, qzeros = ref.gemm_words(codes), ref.gemm_words(zeros)
    assert _hex(qweight[:2]) == ["5f932c60", "60a43d71"]
    assert _hex(qzeros) == ["86427531", "97538642"]
    assert zlib.crc32(qweight.numpy().tobytes()) == 0x6BA52BF5

    stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales.t().contiguous()}
    lt = scheme.canonicalize(linear(), stored)
    weight = lt.dequantize()
    assert weight[0, :4].tolist() == [-0.0625, 0.0, 0.0625, 0.125]
    assert weight[7, 28:].tolist() == [-8.0, -7.0, -6.0, -5.0]
    assert weight.sum().item() == 224.0
    assert torch.equal(lt.weight.zeros, zeros)


def test_serialize_worked_vector_from_canonical_bytes_gives_published_words(ref, linear):
    codes, zeros, scales = ref.worked_layer()
    scheme = _scheme("gemm", 8, 32, 16)
    lt = scheme.canonicalize(
        linear(),
        {
            "qweight": torch.zeros(32, 1, dtype=torch.int32),
            "qzeros": torch.zeros(2, 1, dtype=torch.int32),
            "scales": scales.t().contiguous(),
        },
    )
    lt.weight.codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    lt.weight.packing = Packing()
    lt.weight.zeros = zeros
    out = scheme.serialize(linear(), lt)
    assert zlib.crc32(out["qweight"].numpy().tobytes()) == 0x6BA52BF5
    assert _hex(out["qzeros"]) == ["86427531", "97538642"]


def test_one_word_of_channels_0_to_7_is_75316420():
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    packing = Packing(word="int32", axis="out", k_major=True, order=INTERLEAVE)
    assert unpack(word, 4, (8, 1), packing).flatten().tolist() == list(range(8))


def test_gemv_fast_worked_vector_first_words(ref):
    n, k = torch.arange(4)[:, None], torch.arange(64)[None]
    codes = ((3 * n + k) % 16).to(torch.uint8)
    words = pack_tiles(codes[:, ::2] | (codes[:, 1::2] << 4))
    first = [f"{w & 0xFFFF:04x}" for w in words[0, :8].tolist()]
    assert first == ["8080", "9191", "a2a2", "b3b3", "c4c4", "d5d5", "e6e6", "f7f7"]
    assert torch.equal(words, ref.tile_words(codes))


@pytest.mark.parametrize(
    ("layout", "n", "k", "g"),
    [
        ("gemm", 24, 96, 32),
        ("gemm", 8, 64, 64),
        ("gemv", 12, 256, 128),
        ("gemv", 8, 192, 64),
        ("gemv", 8, 96, 32),
        ("gemv_fast", 12, 256, 128),
        ("gemv_fast", 8, 192, 64),
        ("gemv_fast", 8, 320, 32),
        ("llm-awq", 8, 256, 128),
    ],
)
def test_independently_packed_layer_dequantizes_exactly_and_serializes_back(
    ref, linear, layout, n, k, g
):
    codes, zeros, scales = ref.random_layer(n, k, g)
    stored = ref.stored_layer(layout, codes, zeros, scales, g)
    stored["bias"] = torch.arange(n).half()
    before = {name: t.clone() for name, t in stored.items()}
    scheme = _scheme(layout, n, k, g)
    lt = scheme.canonicalize(linear(), stored)

    if layout in ("gemm", "gemv"):
        assert torch.equal(lt.dequantize(), _dense(codes, zeros, scales, g))
        assert lt.weight.codes is stored["qweight"]
        assert lt.weight.zeros[0, 0] == 0  # a stored zero of 0 stays 0
    else:  # the file holds round16(-s*z); W = c*s + o
        offset = -(scales.float() * zeros.float()).half().float()
        s, o = (t.float().repeat_interleave(g, dim=1) for t in (scales, offset))
        assert torch.equal(lt.dequantize(), codes.float() * s + o)

    back = scheme.serialize(linear(), lt)
    assert back.keys() == before.keys()
    for name, value in before.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name
        assert torch.equal(stored[name], value), f"{name} was changed"


@pytest.mark.parametrize(
    ("bits", "natural"),
    [(b, True) for b in (2, 3, 5, 6, 7, 8)] + [(b, False) for b in (5, 6, 7)],
)
def test_other_bit_widths_follow_the_dialect(ref, linear, bits, natural):
    n, k, g = 32, 12, 6
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (n, 2), generator=rng, dtype=torch.uint8)
    scales = torch.rand(n, 2, generator=rng).half()
    slot = None if natural else ref.slot
    stored = {
        "qweight": ref.stream_words(codes, bits, slot),
        "qzeros": ref.stream_words(zeros, bits, slot),
        "scales": scales.t().contiguous(),
    }
    made = [
        build_scheme(layout="gemm", shape=(n, k), bits=bits, group_size=g, interleaved=order)
        for order in (not natural, natural)
    ]
    lt = made[0].canonicalize(linear(), stored)
    assert torch.equal(lt.dequantize(), _dense(codes, zeros, scales, g))
    back = made[0].serialize(linear(), lt)
    assert all(torch.equal(back[name], t) for name, t in stored.items())
    other = made[1].canonicalize(linear(), stored)
    assert not torch.equal(other.dequantize(), _dense(codes, zeros, scales, g))


def test_interleaved_words_read_in_natural_order_give_other_weights(ref, linear):
    codes, zeros, scales = ref.worked_layer()
    stored = ref.stored_layer("gemm", codes, zeros, scales, 16)
    lt = _scheme("gemm", 8, 32, 16, interleaved=False).canonicalize(linear(), stored)
    assert not torch.equal(lt.dequantize(), _dense(codes, zeros, scales, 16))


def test_swapped_nibbles_give_other_weights(ref, linear):
    codes, zeros, scales = ref.worked_layer()
    stored = ref.stored_layer("gemm", codes, zeros, scales, 16)
    stored["qweight"] = ((stored["qweight"] & 0x0F0F0F0F) << 4) | (
        (stored["qweight"] >> 4) & 0x0F0F0F0F
    )
    lt = _scheme("gemm", 8, 32, 16).canonicalize(linear(), stored)
    assert not torch.equal(lt.dequantize(), _dense(codes, zeros, scales, 16))
