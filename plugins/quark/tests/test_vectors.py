"""Words packed by the producer: amd-quark 0.13 ``torch/utils/pack.py``, run on the values below.

4 bits   v[n, k] = (3n + 5k) mod 16, less 8 for int4, N = 10, K = 8: the last word is short
         zero points z[n, g] = n, 15 - n, less 8 for int4
2 bits   v[n, k] = (n + k) mod 4, N = 8
"""

from __future__ import annotations

import pytest
import torch

from quant_core.load import read_matrix

N, K = 10, 8
ROWS, COLS = torch.meshgrid(torch.arange(N), torch.arange(K), indexing="ij")
CODES = (3 * ROWS + 5 * COLS) % 16

# (dtype, pack_method) -> words of the weight, words of the zero points
GROUPED = {
    ("uint4", "reorder"): (
        [[1603480672, 720904], [-1528270411, 13], [-113392118, 327682], [1317149535, 655367],
         [-1814601564, 983052], [-399723015, 262145], [1030818382, 589830], [-2100928621, 917515]],
        [[1966171168, 589832], [-1966171169, 393223]],
    ),
    ("uint4", "order"): (
        [[1392285232, 184], [-1488852091, 13], [-57265958, 82], [1105954095, 167],
         [-1775183244, 252], [-343593015, 65], [819622942, 150], [-2060465821, 235]],
        [[1985229328, 152], [-1985229329, 103]],
    ),
    ("int4", "reorder"): (
        [[-686054168, 196608], [744552765, 524293], [1907707522, 851978], [-972385321, 131087],
         [459270188, 458756], [1621376369, 786441], [-1241939258, 65550], [172939035, 393219]],
        [[-38146904, 65536], [38146903, 917519]],
    ),
    ("int4", "order"): (
        [[-629924168, 48], [801727245, 133], [1948170322, 218], [-916255321, 47],
         [515396348, 116], [1661839169, 201], [-1202520938, 30], [229065195, 99]],
        [[-19088744, 16], [19088743, 239]],
    ),
}  # fmt: skip
CHANNEL = {
    ("uint4", "reorder"): (
        [972416160, 1814566867, -1621407226, -1030849223, -172908436, 686085023, 1528235714,
         -1907738123, -1317180376, -459235493],
        [1966171168, 589832],
    ),
    ("int4", "reorder"): (
        [-1317180376, -459235493, 399753870, 1241970097, 2100898020, -1603511529, -744518070,
         113422717, 972416160, 1814566867],
        [-38146904, 65536],
    ),
    ("int4", "order"): (
        [-1239649576, -380656373, 477288510, 1336216417, 1926774420, -1525980729, -666987270,
         190957357, 1049950800, 1640443267],
        [-19088744, 16],
    ),
}  # fmt: skip


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def load(qk, write, stored, config):
    """The canonical tensors of one layer, after it gave its stored bytes back."""
    planned = qk.plan(write(qk.named(stored), config))
    member = planned.members[qk.NAME]
    lt = read_matrix(planned, member)
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, value in stored.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name
    return lt


def values_of(dtype):
    return CODES - 8 if dtype == "int4" else CODES


@pytest.mark.parametrize(("dtype", "pack"), GROUPED)
def test_grouped_words_of_the_producer_are_read_and_written(qk, write, dtype, pack):
    words, zero_words = (int32(v) for v in GROUPED[dtype, pack])
    scale = (torch.arange(2 * N).view(2, N) + 1).bfloat16() / 16
    stored = {"weight": words, "weight_scale": scale, "weight_zero_point": zero_words}
    weight = qk.grouped(dtype, 4, symmetric=False)
    lt = load(qk, write, stored, qk.block(weight, pack=pack))
    n = torch.arange(N)[:, None].float()
    zeros = torch.cat([n.expand(N, 4), (15 - n).expand(N, 4)], 1) - 8 * (dtype == "int4")
    want = (values_of(dtype) - zeros) * scale.float().t().repeat_interleave(4, 1)
    assert torch.equal(lt.dequantize(), want)


@pytest.mark.parametrize(("dtype", "pack"), CHANNEL)
def test_channel_words_of_the_producer_are_read_and_written(qk, write, dtype, pack):
    words, zero_words = CHANNEL[dtype, pack]
    scale = (torch.arange(N) + 1) / 16
    stored = {
        "weight": int32(words)[:, None], "weight_scale": scale,
        "weight_zero_point": int32(zero_words),
    }  # fmt: skip
    weight = qk.spec(dtype, "per_channel", ch_axis=0, symmetric=False)
    lt = load(qk, write, stored, qk.block(weight, pack=pack))
    zeros = torch.arange(N)[:, None] - 8 * (dtype == "int4")
    assert torch.equal(lt.dequantize(), (values_of(dtype) - zeros) * scale[:, None])


def test_the_other_pack_method_misses(qk, write):
    words, zero_words = (int32(v) for v in GROUPED["uint4", "reorder"])
    scale = torch.ones(2, N)
    stored = {"weight": words, "weight_scale": scale, "weight_zero_point": zero_words}
    weight = qk.grouped("uint4", 4, symmetric=False)
    right, wrong = (
        read_matrix(p, p.members[qk.NAME]).dequantize()
        for p in (
            qk.plan(write(qk.named(stored), qk.block(weight, pack=m))) for m in ("reorder", "order")
        )
    )
    assert (right != wrong).float().mean() > 0.5


def test_symmetric_int4_without_stored_zero_points(qk, write):
    words = int32(CHANNEL["int4", "reorder"][0])[:, None]
    stored = {"weight": words, "weight_scale": torch.tensor(0.5)}
    lt = load(qk, write, stored, qk.block(qk.spec("int4")))
    assert lt.weight.spec.element.name == "uint4"  # what kernels for 4 bits read
    assert torch.equal(lt.dequantize(), values_of("int4") * 0.5)


def test_int4_under_fp8_multiplies_both_scales(qk, write):
    words = int32(CHANNEL["int4", "reorder"][0])[:, None]
    rows = (torch.arange(N) + 1) / 4
    stored = {
        "weight": words, "weight_scale": torch.tensor(0.125), "weight_scale_2": rows,
        "weight_zero_point_2": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    lt = load(qk, write, stored, qk.block(qk.INT4_FP8))
    assert torch.equal(lt.dequantize(), values_of("int4") * 0.125 * rows[:, None])


def test_two_bits_fill_bytes_from_the_high_end(qk, write):
    rows = [[27, 27], [108, 108], [177, 177], [198, 198]] * 2
    stored = {
        "weight": torch.tensor(rows, dtype=torch.uint8),
        "weight_scale": torch.ones(2, 8),
        "weight_zero_point": torch.tensor([[27, 27], [228, 228]], dtype=torch.uint8),
    }
    lt = load(qk, write, stored, qk.block(qk.grouped("uint2", 4, symmetric=False)))
    codes = ((ROWS + COLS) % 4)[:8]
    z = (torch.arange(8) % 4)[:, None].float()
    zeros = torch.cat([z.expand(8, 4), (3 - z).expand(8, 4)], 1)
    assert torch.equal(lt.dequantize(), codes - zeros)


def test_int8_groups_are_stored_transposed(qk, write):
    # the producer's bytes of v = 9 * ((3n + 5k) mod 16 - 8), N = 3
    rows = [[-72, -45, -18], [-27, 0, 27], [18, 45, -72], [63, -54, -27], [-36, -9, 18],
            [9, 36, 63], [54, -63, -36], [-45, -18, 9]]  # fmt: skip
    stored = {
        "weight": torch.tensor(rows, dtype=torch.int8),
        "weight_scale": torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
    }
    lt = load(qk, write, stored, qk.block(qk.grouped("int8", 4)))
    scale = stored["weight_scale"].t().repeat_interleave(4, 1)
    assert torch.equal(lt.dequantize(), (CODES[:3] - 8) * 9 * scale)


@pytest.mark.parametrize("zero_dtype", [torch.int8, torch.int32])
def test_int8_zero_points_are_subtracted(qk, write, zero_dtype):
    stored = {
        "weight": torch.tensor([[-128, 127], [5, -5]], dtype=torch.int8),
        "weight_scale": torch.tensor([0.5, 2.0]),
        "weight_zero_point": torch.tensor([-3, 100], dtype=zero_dtype),
    }
    weight = qk.spec("int8", "per_channel", ch_axis=0, symmetric=False)
    lt = load(qk, write, stored, qk.block(weight))
    assert lt.dequantize().tolist() == [[-62.5, 65.0], [-190.0, -210.0]]


def test_float_zero_points_are_kept(qk, write):
    words = int32(GROUPED["uint4", "reorder"][0])
    zeros = (torch.arange(2 * N).view(2, N) / 7).float()
    stored = {"weight": words, "weight_scale": torch.ones(2, N), "weight_zero_point": zeros}
    weight = qk.grouped("uint4", 4, symmetric=False, zero_point_type="float32")
    lt = load(qk, write, stored, qk.block(weight))
    assert torch.equal(lt.dequantize(), CODES - zeros.t().repeat_interleave(4, 1))


@pytest.mark.parametrize(
    ("dtype", "packed", "values"),
    [
        # formats of OCP MX; four codes in three bytes, as amd-quark packs them
        ("fp6_e2m3", [0x81, 0x80, 0xFC], [0.125, 0.25, 1.0, -7.5]),
        ("fp6_e3m2", [0x5F, 0xF0, 0x33], [28.0, 0.0625, -28.0, 1.0]),
        ("fp4", [0x21, 0xF7], [0.5, 1.0, 6.0, -6.0]),
    ],
)
def test_mx_codes_and_exponents(qk, write, dtype, packed, values):
    stored = {
        "weight": torch.tensor([packed * 8] * 2, dtype=torch.uint8),
        "weight_scale": torch.tensor([[128], [126]], dtype=torch.uint8),
    }
    lt = load(qk, write, stored, qk.block(qk.mx(dtype)))
    assert lt.dequantize()[0].tolist() == [2 * v for v in values] * 8
    assert lt.dequantize()[1].tolist() == [v / 2 for v in values] * 8


def test_fp8_blocks_may_end_short_and_have_byte_scales(qk, write):
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    codes = weight.float()
    for size, keys, scale in (
        ([32, 64], {}, torch.arange(1.0, 5).view(2, 2)),
        ([32, 32], {"scale_type": "float8_e8m0fnu"}, torch.arange(125, 131).view(2, 3).byte()),
    ):
        args = qk.spec("fp8_e4m3", "per_block", block_size=size, **keys)
        stored = {"weight": weight, "weight_scale": scale}
        lt = load(qk, write, stored, qk.block(args))
        real = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale
        grown = real.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:40, :96]
        assert torch.equal(lt.dequantize(), codes * grown)
