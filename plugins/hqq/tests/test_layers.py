"""HQQ layers: values, the way back, fused and stacked members."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.build import Builder
from quant_core.errors import LayoutError
from quant_core.load import load_tensor, read_matrix
from quant_core.packing import pack
from quant_core.rewrites import slice_out
from quant_core.spec import CANONICAL, Zero
from quant_plugin_hqq.layout import codes_of, unpack_words
from quant_plugin_hqq.meta import Meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(8, 128, 64), (16, 32, 64), (16, 48, 32), (16, 24, 16), (40, 16, 16)]
)
def test_weights_equal_the_formula_and_come_back(write, hqq, bits, n, k, group, dtype):
    stored, weight = hqq.layer(n, k, bits=bits, group=group, dtype=dtype)
    planned = hqq.plan(write(hqq.named(stored), hqq.block(bits, group)))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), weight)
    back = member.scheme.serialize(member.layer, lt)
    assert back.keys() == stored.keys()
    for name, want in stored.items():
        assert back[name].dtype == want.dtype, name
        assert torch.equal(back[name], want), name


def test_four_bit_bytes_hold_rows_from_both_halves():
    words = torch.tensor([[0x1A], [0x2B], [0x3C]], dtype=torch.uint8)
    meta = Meta(bits=4, group_size=1, shape=(6, 1), packing="4bit_u8")
    assert unpack_words(words, meta, "w").flatten().tolist() == [1, 2, 3, 10, 11, 12]


@pytest.mark.parametrize(
    ("n", "k", "group"), [(6, 64, 64), (640, 1024, 64), (3, 64, 32), (5, 6, 2)]
)
def test_four_bit_bytes_become_the_canonical_ones_of_their_codes(n, k, group):
    meta = Meta(bits=4, group_size=group, shape=(n, k), packing="4bit_u8")
    words = torch.randint(0, 256, (meta.word_rows, group), dtype=torch.uint8)
    if 2 * meta.word_rows > meta.rows:
        words[-1] &= 0xF0  # the second part is a row shorter
    want = pack(unpack_words(words, meta, "w"), 4, CANONICAL)
    assert torch.equal(codes_of(words, meta, "w"), want)
    words[0, 0] ^= 0x10
    assert not torch.equal(codes_of(words, meta, "w"), want)


def test_three_bit_words_hold_ten_parts_from_bit_27_down():
    word = sum(code << (27 - 3 * i) for i, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0, 1, 2]))
    words = torch.tensor([[word]], dtype=torch.int32)
    meta = Meta(bits=3, group_size=1, shape=(10, 1), packing="3bit_32")
    assert unpack_words(words, meta, "w").flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 1, 2]


def test_words_viewed_as_floats(write, hqq):
    stored, weight = hqq.layer(8, 128)
    stored["W_q"] = stored["W_q"].view(torch.float16)
    stored["view_as_float"] = torch.ones((), dtype=torch.uint8)
    planned = hqq.plan(write(hqq.named(stored), hqq.block()))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    assert torch.equal(lt.dequantize(), weight)
    back = member.scheme.serialize(member.layer, lt)["W_q"]
    assert back.dtype == torch.float16
    assert torch.equal(back.view(torch.uint8), stored["W_q"].view(torch.uint8))


def test_zero_applied_after_the_scale_misses_the_weights(write, hqq):
    stored, weight = hqq.layer(8, 128)
    (lt,) = load_tensor(hqq.plan(write(hqq.named(stored), hqq.block())), hqq.NAME).matrices
    level = lt.weight.spec.scales[0]
    spec = replace(lt.weight.spec, zero=Zero(kind="offset", levels=(level,)))
    wrong = replace(lt.weight, spec=spec, zeros=None, offset=(-lt.weight.zeros,))
    assert not torch.allclose(wrong.dequantize(), weight, atol=0.1)


def test_halves_swapped_misses_the_weights(write, hqq):
    stored, weight = hqq.layer(8, 128)
    swapped = stored["W_q"] << 4 | stored["W_q"] >> 4
    planned = hqq.plan(write(hqq.named(stored | {"W_q": swapped}), hqq.block()))
    assert not torch.allclose(load_tensor(planned, hqq.NAME).dequantize(), weight, atol=0.1)


@pytest.mark.parametrize(("sizes", "group"), [((8, 4), 64), ((4, 2), 64), ((16, 8), 32)])
def test_fused_members_equal_the_single_ones_and_are_restored(write, hqq, sizes, group):
    tensors, names = {}, [f"model.layers.0.self_attn.{p}_proj" for p in "qk"]
    for i, (name, n) in enumerate(zip(names, sizes)):
        stored, _ = hqq.layer(n, 128, group=group, seed=i)
        tensors |= hqq.named(stored, name)
    planned = hqq.plan(write(tensors, hqq.block(4, group)))
    members = [planned.members[n] for n in names]
    weights = [load_tensor(planned, n).dequantize() for n in names]
    module = Builder(plan=planned, dtype=torch.float64).linear("qk", members)
    x = torch.randn(3, 128, dtype=torch.float64)
    want = x @ torch.cat(weights).double().T
    assert torch.allclose(module(x), want, rtol=1e-12, atol=1e-12)  # float64 summation order
    whole, row = module.restore(), 0
    for member in members:
        part = slice_out(whole, row, row + member.scheme.shape[0])
        row += member.scheme.shape[0]
        for leaf, t in member.scheme.serialize(member.layer, part).items():
            assert torch.equal(t, tensors[f"{member.layer.stored}.{leaf}"]), leaf


def test_experts_load_as_one_stack(write, hqq):
    tensors, weights = {}, []
    for e in range(3):
        stored, weight = hqq.layer(4, 64, seed=e)
        tensors |= hqq.named(stored, f"model.layers.0.mlp.experts.{e}.up_proj")
        weights.append(weight)
    planned = hqq.plan(write(tensors, hqq.block()))
    loaded = load_tensor(planned, "model.layers.0.mlp.experts.up_proj")
    assert torch.equal(loaded.dequantize(), torch.stack(weights))


def test_expert_described_unlike_its_stack_is_refused(write, hqq):
    tensors = {}
    for e in range(2):
        stored, _ = hqq.layer(4, 64, seed=e)
        stored["shape"] = torch.tensor([4, 64] if not e else [8, 32])
        tensors |= hqq.named(stored, f"model.layers.0.mlp.experts.{e}.up_proj")
    planned = hqq.plan(write(tensors, hqq.block()))
    with pytest.raises(LayoutError, match="shape") as err:
        load_tensor(planned, "model.layers.0.mlp.experts.up_proj")
    assert err.value.code == "Q-LAYOUT-FUSED"


@pytest.mark.parametrize(("leaf", "bad"), [("scale", float("inf")), ("zero", float("nan"))])
def test_scales_and_zeros_that_are_not_finite_are_refused(write, hqq, leaf, bad):
    stored, _ = hqq.layer(4, 64)
    stored[leaf][1] = bad
    with pytest.raises(LayoutError, match=hqq.NAME) as err:
        load_tensor(hqq.plan(write(hqq.named(stored), hqq.block())), hqq.NAME)
    assert err.value.code == "Q-VALUE-SCALE"


def test_codes_beyond_the_bits_and_odd_padding_are_refused(write, hqq):
    stored, _ = hqq.layer(4, 64, bits=5)
    stored["W_q"][0, 0] = 200
    with pytest.raises(LayoutError, match="200") as err:
        load_tensor(hqq.plan(write(hqq.named(stored), hqq.block(5))), hqq.NAME)
    assert err.value.code == "Q-VALUE-CODE"
    stored, _ = hqq.layer(4, 64, bits=3)  # 4 groups, 6 rows of padding
    stored["W_q"][0, 0] |= 1
    with pytest.raises(LayoutError, match="beyond the last group"):
        load_tensor(hqq.plan(write(hqq.named(stored), hqq.block(3))), hqq.NAME)


def test_another_meaning_is_not_written(write, hqq):
    stored, _ = hqq.layer(4, 64)
    planned = hqq.plan(write(hqq.named(stored), hqq.block()))
    (member,) = planned.quantized.values()
    lt = read_matrix(planned, member)
    spec = replace(lt.weight.spec, zero=Zero(kind="const", value=8))
    odd = replace(lt.weight, spec=spec, zeros=None)
    with pytest.raises(LayoutError) as err:
        member.scheme.serialize(member.layer, replace(lt, operands={"weight": odd}))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_integer_formats_refuse_float_zeros(write, hqq):
    from quant_core.intspec import check_plain, weight_spec

    stored, _ = hqq.layer(4, 64)
    (lt,) = load_tensor(hqq.plan(write(hqq.named(stored), hqq.block())), hqq.NAME).matrices
    want = weight_spec(4, 64, 64, sym=False, scale_dtype="float32")
    with pytest.raises(LayoutError) as err:
        check_plain("w", lt, want, (4, 64), holder="integers", plugin="x")
    assert err.value.code == "Q-LAYOUT-REPRESENT"
