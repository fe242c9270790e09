"""Packing: words published with the formats, fast paths against the generic codec, round trips."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.errors import LayoutError
from quant_core.intspec import halves
from quant_core.packing import (
    WORD_DTYPES,
    _pack_generic,
    _unpack_generic,
    pack,
    pack_unit,
    packed_shape,
    repack,
    unpack,
    word_slice,
)
from quant_core.packing_words import has_fast_path, view_as
from quant_core.spec import CANONICAL, Field, Packing

torch.set_num_threads(1)

GPTQ = Packing(word="int32", k_major=True)
ROWS = Packing(word="int32")  # compressed-tensors, AWQ GEMV
PADDED = Packing(word="int32", straddle=False)
AWQ = Packing(word="int32", axis="out", k_major=True, order=(0, 4, 1, 5, 2, 6, 3, 7))
AWQ8 = Packing(word="int32", axis="out", k_major=True, order=(0, 2, 1, 3))
ALONG_N = Packing(word="int32", axis="out", k_major=True)
ZEROS_N = Packing(word="int32", axis="out")
FIELDS = {  # ggml's blocks: Q2_K, Q3_K, Q4_1, NVFP4, Q5_0, Q5_K, Q6_K, Q8_0
    2: [Packing(fields=(Field(16, 64, 2, 32),), block=84)],
    3: [Packing(fields=(Field(32, 64, 2, 32), Field(0, 32, 1, 32)), block=110)],
    4: [
        Packing(fields=(Field(4, 16, 4, 16),), block=20),
        Packing(fields=(Field(4, 32, 4, 8),), block=36),
    ],
    5: [
        Packing(fields=(Field(6, 16, 4, 16), Field(2, 4, 1, 1)), block=22),
        Packing(fields=(Field(48, 128, 4, 32), Field(16, 32, 1, 32)), block=176),
    ],
    6: [Packing(fields=(Field(0, 128, 4, 64), Field(128, 64, 2, 32)), block=210)],
    8: [Packing(fields=(Field(2, 32, 8, 1),), block=34)],
}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planar(bits: int) -> Packing:
    return Packing(word="int32", k_major=True, planes=PLANES.get(bits, (bits,)))


def packings(bits: int) -> list[Packing]:
    """Every kind at this bit width: words x axis x major x straddle, orders and planes."""
    kinds = [
        Packing(word=word, axis=axis, straddle=straddle, k_major=k_major)
        for word, axis, straddle, k_major in itertools.product(
            ("uint8", "int16", "int32"), ("in", "out"), (True, False), (True, False)
        )
    ]
    kinds += [AWQ, AWQ8, Packing(word="int16", order=(3, 1, 0, 2)), planar(bits)]
    kinds += [Packing(word="uint8", planes=PLANES.get(bits, (bits,)), axis="out", order=(1, 0))]
    kinds += FIELDS.get(bits, [])
    return kinds + [Packing(order=halves(run)) for run in (16, 32, 64)]


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)


def hex_words(words: torch.Tensor) -> list[str]:
    return [f"{w & 0xFFFFFFFF:08x}" for w in words.flatten().tolist()]


# ------------------------------------------------------------- worked vectors of the formats


@pytest.mark.parametrize("run", [16, 32, 64])
def test_unpack_halves_byte_holds_codes_half_a_run_apart(run: int) -> None:
    """ggml's Q4_0 (run 32) and Q4_K (run 64): byte i is code i | code (i + run / 2) << 4."""
    words = torch.randint(0, 256, (5, 3 * run // 2), generator=torch.Generator().manual_seed(run))
    words = words.to(torch.uint8)
    runs = words.view(5, 3, run // 2)
    want = torch.cat([runs & 15, runs >> 4], dim=-1).view(5, 3 * run)
    packing = Packing(order=halves(run))
    assert torch.equal(unpack(words, 4, (5, 3 * run), packing), want)
    assert torch.equal(pack(want, 4, packing), words)
    canonical = repack(words, 4, (5, 3 * run), packing, CANONICAL)
    assert torch.equal(canonical, want[:, ::2] | (want[:, 1::2] << 4))
    assert torch.equal(repack(canonical, 4, (5, 3 * run), CANONICAL, packing), words)


def common_codes() -> torch.Tensor:
    n, k = torch.meshgrid(torch.arange(8), torch.arange(32), indexing="ij")
    return ((3 * n + k) % 16).to(torch.uint8)


def common_zeros() -> torch.Tensor:
    n, g = torch.meshgrid(torch.arange(8), torch.arange(2), indexing="ij")
    return ((n + 1 + g) % 16).to(torch.uint8)


def crc(words: torch.Tensor) -> str:
    return f"{zlib.crc32(words.contiguous().numpy().tobytes()):08x}"


def test_gptq_words_match_published_vector() -> None:
    words = pack(common_codes(), 4, GPTQ)
    assert words.shape == (4, 8)
    assert " ".join(hex_words(words[0])) == (
        "76543210 a9876543 dcba9876 0fedcba9 3210fedc 6543210f 98765432 cba98765"
    )
    assert crc(words) == "745d7a31"
    assert torch.equal(unpack(words, 4, (8, 32), GPTQ), common_codes())


def test_gptq_zero_words_match_published_vector() -> None:
    # stored [G, N words]: groups take the place of K, packed along N
    assert hex_words(pack(common_zeros(), 4, ALONG_N)) == ["87654321", "98765432"]


def test_compressed_tensors_words_match_published_vector() -> None:
    words = pack(common_codes(), 4, ROWS)
    assert hex_words(words[0]) == ["76543210", "fedcba98", "76543210", "fedcba98"]
    zeros = pack(common_zeros(), 4, ZEROS_N)
    assert zeros.shape == (1, 2)
    assert hex_words(zeros) == ["87654321", "98765432"]


def test_awq_words_match_published_vector() -> None:
    words = pack(common_codes(), 4, AWQ)
    assert words.shape == (32, 1)
    assert hex_words(words[:2]) == ["5f932c60", "60a43d71"]
    assert crc(words) == "6ba52bf5"
    assert hex_words(pack(common_zeros(), 4, AWQ)) == ["86427531", "97538642"]
    channels = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    assert hex_words(pack(channels, 4, AWQ)) == ["75316420"]
    assert hex_words(pack(channels, 4, ALONG_N)) == ["76543210"]


@pytest.mark.parametrize(
    ("bits", "packing", "expected"),
    [
        (3, GPTQ, "88fac688 c688fac6 fac688fa"),
        (3, planar(3), "e4e4e4e4 e4e4e4e4 f0f0f0f0"),
        (5, GPTQ, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
        (5, planar(5), "76543210 fedcba98 76543210 fedcba98 ffff0000"),
    ],
)
def test_odd_width_words_match_published_vector(bits: int, packing: Packing, expected: str) -> None:
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8).unsqueeze(0)
    words = pack(codes, bits, packing)
    assert " ".join(hex_words(words)) == expected
    assert torch.equal(unpack(words, bits, (1, 32), packing), codes)


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, ["55555555"], ["aaaaaaaa"]),
        (4, ["77777777"], ["88888888"]),
        (8, ["7f7f7f7f"], ["80808080"]),
        (3, ["db6db6db", "b6db6db6", "6db6db6d"], ["24924924", "49249249", "92492492"]),
    ],
)
def test_symmetric_zero_words_match_published_constants(
    bits: int, v1: list[str], v2: list[str]
) -> None:
    count = 32 * len(v1) // bits
    mid = torch.full((count, 1), 1 << (bits - 1), dtype=torch.uint8)
    assert hex_words(pack(mid, bits, ALONG_N)) == v2
    assert hex_words(pack(mid - 1, bits, ALONG_N)) == v1


def test_fp4_bytes_match_published_vector() -> None:
    codes = torch.arange(16, dtype=torch.uint8).unsqueeze(0)
    assert pack(codes, 4, CANONICAL).numpy().tobytes().hex() == "1032547698badcfe"


def test_padded_words_hold_ten_three_bit_codes() -> None:
    codes = random_codes(2, 1024, 3)
    assert pack(codes, 3, PADDED).shape == (2, 103)  # written up to compressed-tensors 0.17.1
    assert pack(codes, 3, ROWS).shape == (2, 96)  # since 0.18.0
    word = pack(codes, 3, PADDED)[0, 0].item()
    assert [word >> (3 * i) & 7 for i in range(10)] == codes[0, :10].tolist()
    assert word >> 30 == 0


# ------------------------------------------------------------------------ all kinds, all sizes


def slow_field_code(value: list[int], at: int, packing: Packing) -> int:
    """Code ``at`` of a row of bytes, from the definition of ``Field``."""
    per = packing.fields[0].nbytes * 8 // packing.fields[0].width
    block, code, shift = value[at // per * packing.block :], 0, 0
    for f in packing.fields:
        run, v = divmod(at % per, f.stride * 8 // f.width)
        byte = block[f.at + run * f.stride + v % f.stride]
        code |= (byte >> f.width * (v // f.stride) & ((1 << f.width) - 1)) << shift
        shift += f.width
    return code


def slow_unpack_bit(words: torch.Tensor, bits: int, row: int, col: int, packing: Packing) -> int:
    """One code, bit by bit, straight from the definition of ``Packing``."""
    at, line = (col, row) if packing.axis == "in" else (row, col)
    if packing.k_major == (packing.axis == "in"):
        words = words.t()
    size = {"uint8": 8, "int16": 16, "int32": 32}[packing.word]
    value = [int(w) & ((1 << size) - 1) for w in words[line].tolist()]
    slot = at
    if packing.order is not None:
        run = len(packing.order)
        slot = at // run * run + packing.order[at % run]
    if packing.fields:
        return slow_field_code(value, at, packing)
    stream = sum(w << (size * i) for i, w in enumerate(value))
    if packing.planes:
        start, code, shift = slot // 32 * 32 * bits, 0, 0
        for width in packing.planes:
            part = stream >> (start + slot % 32 * width) & ((1 << width) - 1)
            code, shift, start = code | part << shift, shift + width, start + 32 * width
        return code
    if not packing.straddle:
        per = size // bits
        return value[slot // per] >> (slot % per * bits) & ((1 << bits) - 1)
    return stream >> (slot * bits) & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_packing_holds_each_code_where_its_definition_says(bits: int) -> None:
    for (n, k), packing in itertools.product([(1, 1), (7, 33), (8, 16)], packings(bits)):
        codes = random_codes(n, k, bits, seed=n)
        words = pack(codes, bits, packing)
        assert tuple(words.shape) == packed_shape((n, k), bits, packing)
        assert words.dtype == WORD_DTYPES[packing.word]
        for row, col in {(0, 0), (n - 1, k - 1), (n // 2, k // 3), (n - 1, 0)}:
            assert slow_unpack_bit(words, bits, row, col, packing) == codes[row, col], packing


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (8, 8), (7, 33), (16, 16), (32, 64), (33, 31), (40, 8)]
)
def test_every_packing_round_trips(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    for packing in packings(bits):
        words = pack(codes, bits, packing)
        assert torch.equal(unpack(words, bits, shape, packing), codes), packing
        assert torch.equal(words, _pack_generic(codes, bits, packing)), packing
        assert torch.equal(_unpack_generic(words, bits, shape, packing), codes), packing


@pytest.mark.parametrize("bits", range(1, 9))
def test_repack_equals_unpack_then_pack_for_every_pair(bits: int) -> None:
    shape = (40, 48)
    codes = random_codes(*shape, bits)
    kinds = packings(bits)
    for old, new in zip(kinds, kinds[7:] + kinds[:7]):
        words = _pack_generic(codes, bits, old)
        before = words.clone()
        assert torch.equal(repack(words, bits, shape, old, new), _pack_generic(codes, bits, new))
        assert torch.equal(words, before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [1, 64, 97, 160])
def test_repack_in_row_blocks_equals_unblocked(bits: int, n: int) -> None:
    shape = (n, 36)
    codes = random_codes(*shape, bits)
    kinds = packings(bits)
    for old, new in zip(kinds, kinds[5:] + kinds[:5]):
        words = _pack_generic(codes, bits, old)
        small = repack(words, bits, shape, old, new, block_bytes=36 * 32)
        assert torch.equal(small, _pack_generic(codes, bits, new)), (old, new)


def test_repack_fast_paths_exist_for_the_common_packings() -> None:
    shape = (64, 128)
    assert has_fast_path(4, shape, GPTQ)
    assert has_fast_path(3, shape, GPTQ)
    assert has_fast_path(4, shape, AWQ)
    assert has_fast_path(8, shape, AWQ8)
    assert not has_fast_path(3, shape, planar(3))
    assert not has_fast_path(4, (60, 128), AWQ)  # 60 rows do not fill words of 8
    assert not has_fast_path(3, shape, PADDED)


def test_gptq_and_compressed_tensors_words_are_transposes() -> None:
    codes = random_codes(24, 64, 4)
    rows = repack(pack(codes, 4, GPTQ), 4, (24, 64), GPTQ, ROWS)
    assert torch.equal(rows, pack(codes, 4, GPTQ).t())


def test_padding_bits_of_the_source_do_not_leak() -> None:
    words = torch.full((1, 2), -1, dtype=torch.int32)  # 5 codes of 3 bits in 64 one-bits
    packing = Packing(word="int32", k_major=False)
    words = words[:, :1]
    out = repack(words, 3, (1, 5), packing, CANONICAL)
    assert out.tolist() == [[0xFF, 0x7F]]
    assert words.item() == -1


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    kind=st.integers(0, 28),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_pack_unpack_property(bits: int, kind: int, n: int, k: int, seed: int) -> None:
    packing = packings(bits)[kind]
    codes = random_codes(n, k, bits, seed)
    words = pack(codes, bits, packing)
    assert torch.equal(unpack(words, bits, (n, k), packing), codes)
    assert torch.equal(repack(words, bits, (n, k), packing), pack(codes, bits, CANONICAL))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_non_contiguous_inputs_are_read_right(bits: int) -> None:
    codes = random_codes(33, 64, bits)
    for packing in packings(bits):
        assert torch.equal(
            pack(codes.t(), bits, packing), pack(codes.t().contiguous(), bits, packing)
        )
        words = pack(codes, bits, packing)
        wide = torch.zeros(words.shape[0] + 3, words.shape[1] + 5, dtype=words.dtype)
        wide[3:, 5:] = words
        view = wide[3:, 5:]
        assert torch.equal(unpack(view, bits, (33, 64), packing), codes)
        assert torch.equal(repack(view, bits, (33, 64), packing, GPTQ), pack(codes, bits, GPTQ))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_word_slice_at_pack_units_holds_the_rows_codes(bits: int) -> None:
    for packing in packings(bits):
        codes = random_codes(192, 768 if packing.fields else 192, bits)
        unit = pack_unit(bits, packing)
        words = pack(codes, bits, packing)
        assert codes.shape[1] % unit == 0 or packing.straddle is False
        size = codes.shape[packing.axis == "in"]
        start, stop = unit, min(size, 3 * unit)
        if start >= stop:
            continue
        n, k = (slice(None), slice(start, stop))[:: 1 if packing.axis == "in" else -1]
        part = word_slice(words, bits, packing, packing.axis, start, stop)
        expected = codes[n, k]
        assert torch.equal(unpack(part, bits, tuple(expected.shape), packing), expected)


def test_negative_control_swapped_order_changes_words() -> None:
    natural = Packing(word="int32", axis="out", k_major=True, order=(0, 1, 2, 3, 4, 5, 6, 7))
    codes = common_codes()
    assert torch.equal(pack(codes, 4, natural), pack(codes, 4, ALONG_N))
    assert not torch.equal(pack(codes, 4, natural), pack(codes, 4, AWQ))


def test_unpack_wrong_shape_raises_layout_error() -> None:
    words = pack(random_codes(8, 32, 4), 4, GPTQ)
    with pytest.raises(LayoutError) as err:
        unpack(words, 4, (8, 40), GPTQ)
    assert err.value.code == "Q-LAYOUT-SHAPE"
    assert err.value.expected == (5, 8)
    assert err.value.actual == (4, 8)


def test_unpack_wrong_dtype_raises_layout_error() -> None:
    with pytest.raises(LayoutError, match="int64"):
        unpack(torch.zeros(4, 8, dtype=torch.int64), 4, (8, 32), GPTQ)


def test_pack_code_out_of_range_raises_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        pack(torch.tensor([[3, 16]], dtype=torch.uint8), 4, CANONICAL)
    assert err.value.code == "Q-LAYOUT-ELEMENT"
    assert err.value.actual == 16


def test_planes_that_do_not_sum_to_bits_raise_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        pack(random_codes(1, 32, 3), 3, Packing(planes=(2, 2)))
    assert err.value.code == "Q-LAYOUT-ELEMENT"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_view_as_single_word_with_an_odd_stride_is_read(step):
    words = torch.tensor([[0, 0x04030201, 9, 9, 9, 9]], dtype=torch.int32)[:, 1::step][:, :1]
    assert view_as(words, torch.uint8).tolist() == [[1, 2, 3, 4]]
    assert view_as(words.t(), torch.uint8).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("count", [8, 13, 16, 200])
def test_interleaved_words_of_rows_hold_even_columns_below_odd_ones(count: int) -> None:
    """AWQ's zeros as rows: written out for every column, sign bits set among the words."""
    g = torch.Generator().manual_seed(count)
    words = torch.randint(-(2**31), 2**31, (5, -(-count // 8)), generator=g).to(torch.int32)
    place = (0, 4, 1, 5, 2, 6, 3, 7)
    want = [
        [(int(row[c // 8]) & 0xFFFFFFFF) >> 4 * place[c % 8] & 15 for c in range(count)]
        for row in words
    ]
    packing = Packing(word="int32", order=place)
    codes = unpack(words, 4, (5, count), packing)
    assert codes.tolist() == want
    assert unpack(words, 4, (5, count), Packing(word="int32")).tolist() != want
