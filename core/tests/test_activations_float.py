"""Activations in fp8, fp6, fp4 under float, power-of-two and two-level scales."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from made_layers import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.kernels.activations import fake_quantize, static_shape, unsupported_input
from quant_core.kernels.base import Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.numerics import round_to
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale, Zero, group
from with_input import with_input

FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
FP6 = Element(name="fp6_e2m3", bits=6, kind="float")
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")


def dynamic(element, grain, scale="f32", **rules):
    factor = Scale(element=scale, grain=grain, static=False, **rules)
    return QuantSpec(element=element, scales=(factor,))


def two_level(outer):
    inner = Scale(element="fp8_e4m3", grain=group(16), static=False)
    return QuantSpec(element=FP4, scales=(inner, outer))


STATIC_INVERSE = Scale(element="f32", grain=TENSOR, inverse=True)
SPECS_OF = {
    "fp8 group": dynamic(FP8, group(16)),
    "fp8 mx": dynamic(FP8, group(32), "e8m0", rule="even_m1"),
    "fp4 mx": dynamic(FP4, group(32), "e8m0", rule="even_m1"),
    "fp4 two levels": two_level(STATIC_INVERSE),
}
# sha256 of the float32 result of compressed-tensors 0.20.0 (compute_dynamic_scales_and_zp, then
# fake_quantize of quantization.lifecycle.forward; CPU, torch 2.13) on X
DIGESTS = {
    "fp8 group": "6dc22505fb60350e",
    "fp8 mx": "fca73c9c90dcef25",
    "fp4 mx": "71eb3060cf72fce8",
    "fp4 two levels": "1a8a868da8f9b354",
}


def made_x():
    i = torch.arange(3 * 64).float()
    x = (((i * 37) % 101 - 50) * torch.exp2((i % 13) - 6)).view(3, 64)
    x[1] = 0
    return x


X = made_x()
INVERSE_FACTOR = torch.tensor([0.875])  # 448 * 6 / max|X|, max|X| = 3072


@pytest.mark.parametrize("name", DIGESTS)
def test_results_equal_compressed_tensors_bit_for_bit(name):
    factor = INVERSE_FACTOR if name == "fp4 two levels" else None
    got = fake_quantize(X, SPECS_OF[name], factor)
    assert hashlib.sha256(got.numpy().tobytes()).hexdigest()[:16] == DIGESTS[name]


def test_inverse_factor_is_that_of_the_data():
    assert 448 * 6 / X.abs().max().item() == INVERSE_FACTOR.item()


def test_static_tensor_scale_follows_the_formula():
    spec = QuantSpec(element=FP8, scales=(Scale(element="f32", grain=TENSOR),))
    s = torch.tensor([0.37])
    want = round_to((X / 0.37).clamp(-448, 448), FP8) * s
    assert torch.equal(fake_quantize(X, spec, s), want)
    assert fake_quantize(X, spec, s).abs().max() == 448 * s  # saturates, as a static scale does


def test_static_inverse_scale_divides():
    spec = QuantSpec(element=FP8, scales=(STATIC_INVERSE,))
    s = torch.tensor([3.0])
    assert torch.equal(fake_quantize(X, spec, s), round_to(X * 3.0, FP8) / 3.0)


def test_upper_bound_caps_the_tokens_scale():
    """fbgemm: s = min(max|x|, 1200) / 448; larger values saturate."""
    spec = dynamic(FP8, CHANNEL, most=1200 / 448)
    x = torch.tensor([[1500.0, 300.0], [600.0, 300.0]])
    got = fake_quantize(x, spec)
    assert got[0, 0].item() == pytest.approx(1200, rel=1e-6)
    assert got[1].tolist() == fake_quantize(x, dynamic(FP8, CHANNEL))[1].tolist()
    assert not torch.equal(got, fake_quantize(x, dynamic(FP8, CHANNEL)))


def test_lower_bound_keeps_small_tokens_from_filling_the_range():
    """vLLM 0.32: s >= 1 / (448 * 512)."""
    x = torch.tensor([[2.0**-12, 1.1 * 2.0**-28]])
    got = fake_quantize(x, dynamic(FP8, CHANNEL, least=1 / (448 * 512)))
    want = round_to(x * (448 * 512), FP8) / (448 * 512)
    assert torch.allclose(got, want, rtol=1e-6, atol=0)
    assert got[0, 1] != fake_quantize(x, dynamic(FP8, CHANNEL))[0, 1]


def test_power_of_two_group_scales_are_rounded_up():
    """ue8m0 scales of block fp8: s = 2**ceil(log2(max|x| / 448)), max|x| at least 1e-4."""
    spec = dynamic(FP8, group(32), "e8m0", rule="rceil", least=1e-4 / 448)
    x = torch.zeros(2, 32)
    x[0, :2] = torch.tensor([450.0, 1.0])
    x[1, 0] = 1e-6
    got = fake_quantize(x, spec)
    assert got[0, :2].tolist() == [448.0, 1.0]  # s = 2: 225 is 224 in fp8
    s = 2.0 ** math.ceil(math.log2(1e-4 / 448))
    assert got[1, 0] == round_to(torch.tensor(1e-6 / s), FP8) * s


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "rceil_log2", "even", "even_m1"])
def test_block_rules_give_the_documented_results(rule):
    """max|x| = 7 in fp4: floor saturates to 6, the others take the next power of two or not."""
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([7.0, 1.0])
    top = 6.0 if rule == "floor" else 8.0
    assert fake_quantize(x, dynamic(FP4, group(32), "e8m0", rule=rule))[0, :2].tolist() == [
        top,
        1.0,
    ]


def test_six_bit_blocks_keep_more_than_four_bit_ones():
    six = fake_quantize(X, dynamic(FP6, group(32), "e8m0", rule="even"))
    four = fake_quantize(X, dynamic(FP4, group(32), "e8m0", rule="even"))
    assert (six - X).norm() < 0.5 * (four - X).norm()
    table = fake_quantize(torch.tensor([[1.0, 7.5]]), dynamic(FP6, group(32), "e8m0"))
    assert table.tolist() == [[1.0, 7.5]]


def test_ties_are_the_specs():
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([6.0, 2.5, 0.25])
    spec = dynamic(FP4, group(32), "e8m0", rule="floor")
    assert fake_quantize(x, spec)[0, :3].tolist() == [6.0, 2.0, 0.0]
    assert fake_quantize(x, replace(spec, ties="up"))[0, :3].tolist() == [6.0, 3.0, 0.5]
    assert fake_quantize(x, replace(spec, ties="down"))[0, :3].tolist() == [6.0, 2.0, 0.0]


@pytest.mark.parametrize("grain", [TENSOR, CHANNEL])
def test_run_time_factor_is_that_of_the_tensor_or_the_token(grain):
    spec = two_level(Scale(element="f32", grain=grain, static=False))
    x = X[:, :32].contiguous()
    x[2] *= 2.0**20  # one token dwarfs the others: only a factor per token keeps them
    got = fake_quantize(x, spec)
    error = (got[0] - x[0]).norm() / x[0].norm()
    assert got[1].eq(0).all()
    assert error < 0.15 if grain == CHANNEL else error > 0.3


def test_stored_factor_and_its_inverse_differ_only_in_rounding():
    factor = torch.tensor([1 / 0.875])
    got = fake_quantize(X, two_level(Scale(element="f32", grain=TENSOR)), factor)
    want = fake_quantize(X, two_level(STATIC_INVERSE), INVERSE_FACTOR)
    # 2**-20: a few float32 roundings; a code that fell to the other side would be far off
    assert torch.allclose(got, want, rtol=2**-20, atol=0)


@pytest.mark.parametrize("name", SPECS_OF)
def test_nan_and_infinity_stay_visible_and_short_groups_stand_alone(name):
    spec, factor = SPECS_OF[name], INVERSE_FACTOR
    bad = X.clone()
    bad[0, 2], bad[2, 0] = math.nan, math.inf
    got = fake_quantize(bad, spec, factor)
    assert got[0, 2].isnan()
    assert not got[2, :16].isfinite().all()
    assert got[1].eq(0).all()
    short = X[:, :40].contiguous()
    tail = fake_quantize(F.pad(short[:, 32:], (0, 24)), spec, factor)[:, :8]
    assert torch.equal(fake_quantize(short, spec, factor)[:, 32:], tail)
    assert fake_quantize(X.bfloat16(), spec, factor).dtype == torch.bfloat16


def test_float64_inputs_are_rounded_in_float64():
    spec = dynamic(FP8, group(16))
    x = X.double() * (1 + 2.0**-40)
    got = fake_quantize(x, spec)
    assert got.dtype == torch.float64
    assert not torch.equal(got, got.float().double())


@pytest.mark.parametrize("name", SPECS_OF)
def test_linear_multiplies_the_rounded_activations(name):
    lt = make_layer(SPECS["fp8_block"], n=40, k=64)
    spec = SPECS_OF[name]
    features = ()
    if name == "fp4 two levels":
        lt.input_scale, features = INVERSE_FACTOR, ("input_scale",)
    kernel = ReferenceKernel()
    op = with_input(make_op("linear", lt, k=64), spec, *features)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    got = kernel.bind(op)(list(buffers.values()), X)
    w = dense_weight(lt.weight, 64)
    want = F.linear(fake_quantize(X, spec, INVERSE_FACTOR), w)
    scale = X.abs().max() * w.abs().max()
    # same float32 products, summed in another order over K=64
    assert torch.allclose(got, want, rtol=1e-5, atol=float(scale) * 1e-6)
    # negative control: without activation quantization the result is another one
    assert (F.linear(X, w) - want).abs().max() > float(scale) * 1e-3
    if features:
        assert static_shape(op) == {"input_scale": ((1,), torch.float32)}
        assert torch.equal(kernel.restore(buffers, op).input_scale, INVERSE_FACTOR)


E8M0 = Scale(element="e8m0", grain=group(32), static=False)
WRONG = {
    "rule without e8m0": dynamic(FP8, group(32), rule="floor"),
    "unknown rule": dynamic(FP8, group(32), "e8m0", rule="round"),
    "integer under e8m0": dynamic(Element.int(8), group(32), "e8m0"),
    "integer scale": dynamic(FP8, group(32), "uint6"),
    "run-time inverse": dynamic(FP8, group(32), inverse=True),
    "exponent as element": dynamic(Element(name="e8m0", bits=8, kind="float"), CHANNEL),
    "two e8m0": QuantSpec(element=FP4, scales=(E8M0, Scale(element="f32", grain=TENSOR))),
    "three levels": QuantSpec(element=FP4, scales=(E8M0, E8M0, E8M0)),
    "static factor per token": two_level(Scale(element="f32", grain=CHANNEL)),
    "factor in fp8": two_level(Scale(element="fp8_e4m3", grain=TENSOR)),
    "no scale": QuantSpec(element=FP8),
    "two levels with zero": QuantSpec(
        element=Element.int(8),
        scales=two_level(STATIC_INVERSE).scales,
        zero=Zero(kind="code", element="int8"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_cannot_be_computed_are_rejected_with_a_reason(name):
    op = with_input(make_op("linear", make_layer(SPECS["fp8_block"])), WRONG[name])
    answer = unsupported_input(op)
    assert isinstance(answer, Rejected)
    assert answer.need
    assert ReferenceKernel().accepts(op) == answer
