"""Block exponents by every rule: the published tables, and bytes recorded from two peers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.errors import LayoutError
from quant_core.numerics import (
    MX_RULES,
    decode_e8m0,
    element_range,
    encode_e8m0,
    mx_scale,
    round_up_power_of_two,
)
from quant_core.spec import Element

ELEMENTS = {
    name: Element(name=name, bits=bits, kind="float")
    for name, bits in [("fp4_e2m1", 4), ("fp6_e2m3", 6), ("fp6_e3m2", 6), ("fp8_e4m3", 8),
                       ("fp8_e5m2", 8)]
}  # fmt: skip
FP4, FP8 = ELEMENTS["fp4_e2m1"], ELEMENTS["fp8_e4m3"]

FP4_AMAX = [1.5, 1.74, 1.75, 3.5, 6, 6.5, 7, 0]
FP4_BYTES = {
    "floor": [125, 125, 125, 126, 127, 127, 127, 0],
    "ceil": [126, 126, 126, 127, 128, 128, 128, 0],
    "rceil": [125, 126, 126, 127, 127, 128, 128, 0],
    "even": [125, 125, 126, 127, 127, 127, 128, 0],
    "even_m1": [125, 125, 126, 127, 127, 127, 128, 0],
    "even_log2": [125, 125, 126, 127, 127, 127, 128, 105],
}
FP8_AMAX = [1.75, 1.7500001, 256, 448, 449, 511, 512]
FP8_BYTES = {
    "floor": [119, 119, 127, 127, 127, 127, 128],
    "rceil": [119, 120, 127, 127, 128, 128, 128],
    "rceil_log2": [119, 119, 127, 127, 128, 128, 128],
    "even": [119, 119, 127, 127, 127, 128, 128],
    "even_m1": [120, 120, 127, 128, 128, 128, 128],
}


@pytest.mark.parametrize("rule", FP4_BYTES)
def test_fp4_bytes_equal_the_table(rule):
    assert mx_scale(torch.tensor(FP4_AMAX), FP4, rule).tolist() == FP4_BYTES[rule]


@pytest.mark.parametrize("rule", FP8_BYTES)
def test_fp8_bytes_equal_the_table(rule):
    assert mx_scale(torch.tensor(FP8_AMAX), FP8, rule).tolist() == FP8_BYTES[rule]


def recorded_amax():
    """Largest magnitude of 32 blocks, all exact in float32; mantissas and exponents vary."""
    i = torch.arange(32 * 32)
    base = ((i * 37) % 101 - 50).float() * torch.exp2((i // 32 * 7 % 23 - 11).float())
    return (base * (1 + (i // 32 * 11 % 32).float() / 32)).view(32, 32).abs().amax(1)


# torchao 0.18.0 prototype.mx_formats.mx_tensor.to_mx (float32 input, block 32), CPU, torch 2.13
TORCHAO = {
    ("fp8_e4m3", "floor"): "71798086777e84757c82737a8088787e86767c84747a8272788087767e85757c",
    ("fp8_e4m3", "ceil"): "727a8187787f85767d83747b8189797f87777d85757b8373798188777f86767d",
    ("fp8_e4m3", "rceil"): "71798086777e84757c82737a8188787f86767d84747b8272798087777e85757c",
    ("fp8_e4m3", "even"): "71798086777e84757c82737a8088787e86767c84747a8272788087777e85757c",
    ("fp4_e2m1", "floor"): "777f868c7d848a7b82887980868e7e848c7c828a7a8088787e868d7c848b7b82",
    ("fp4_e2m1", "ceil"): "7880878d7e858b7c83897a81878f7f858d7d838b7b8189797f878e7d858c7c83",
    ("fp4_e2m1", "rceil"): "787f868d7d848b7b82897980878e7e858c7c838a7a8188787f868e7d848c7b82",
    ("fp4_e2m1", "even"): "777f868c7d848a7b82887980878e7e858c7c838a7a8188787f868d7d848b7b82",
}
# compressed-tensors 0.20.0 quantization.utils.mxfp_utils.generate_mx_scales
COMPRESSED_TENSORS = {
    "fp4_e2m1": "777f868c7d848a7b82887980878e7e858c7c838a7a8188787f868d7d848b7b82",
    "fp6_e2m3": "777f868c7d848a7b82887980868e7e848c7c828a7a8088787e868d7d848b7b82",
    "fp8_e4m3": "71798086777e84757c82737a8188787f86767d84747b8272798087777e85757c",
}


@pytest.mark.parametrize("key", TORCHAO, ids=" ".join)
def test_bytes_equal_torchao(key):
    name, rule = key
    got = mx_scale(recorded_amax(), ELEMENTS[name], rule)
    assert bytes(got.tolist()).hex() == TORCHAO[key]


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_bytes_equal_compressed_tensors(name):
    got = mx_scale(recorded_amax(), ELEMENTS[name], "even_m1")
    assert bytes(got.tolist()).hex() == COMPRESSED_TENSORS[name]


positive = st.floats(
    min_value=2.0**-100, max_value=2.0**100, width=32, allow_nan=False, allow_infinity=False
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(values=st.lists(positive, min_size=1), name=st.sampled_from(sorted(ELEMENTS)))
def test_rules_equal_their_formula_in_exact_arithmetic(values, name):
    e = ELEMENTS[name]
    top = element_range(e)[1]
    emax = math.frexp(top)[1] - 1
    amax = torch.tensor(values, dtype=torch.float32)
    floor, ceil, rceil = (mx_scale(amax, e, r) for r in ("floor", "ceil", "rceil"))
    for i, v in enumerate(amax.tolist()):
        mantissa, exponent = math.frexp(v)  # v = mantissa * 2**exponent, mantissa in [0.5, 1)
        assert floor[i] == 127 + exponent - 1 - emax
        assert ceil[i] == 127 + exponent - (mantissa == 0.5) - emax
        ratio = (torch.tensor(v) / top).item()  # float32, as every producer divides
        mantissa, exponent = math.frexp(ratio)
        assert rceil[i] == 127 + exponent - (mantissa == 0.5)
        assert v <= top * 2.0 ** (int(rceil[i]) - 127) * (1 + 2.0**-23)  # does not overflow


@pytest.mark.parametrize("rule", MX_RULES)
def test_nan_and_infinity_become_the_nan_byte(rule):
    amax = torch.tensor([math.nan, math.inf, 1.0])
    assert mx_scale(amax, FP8, rule)[:2].tolist() == [255, 255]
    assert mx_scale(amax, FP8, rule)[2] < 255


@pytest.mark.parametrize("rule", MX_RULES)
def test_extremes_stay_inside_the_byte(rule):
    amax = torch.tensor([torch.finfo(torch.float32).max, 1e-45, 2.0**-126])
    got = mx_scale(amax, ELEMENTS["fp6_e2m3"], rule).tolist()
    assert 250 <= got[0] <= 254
    assert max(got[1:]) <= 105


def test_subnormal_ratio_is_byte_one_on_the_bits_and_zero_through_the_logarithm():
    amax = torch.tensor([448 * 2.0**-140])
    assert mx_scale(amax, FP8, "rceil").item() == 1
    assert mx_scale(amax, FP8, "rceil_log2").item() == 0


@pytest.mark.parametrize(("rule", "element"), [("round", FP4), ("floor", Element.int(8))])
def test_unknown_rule_or_element_raises_layout_error(rule, element):
    with pytest.raises(LayoutError) as err:
        mx_scale(torch.ones(1), element, rule)
    assert err.value.code == "Q-LAYOUT-ELEMENT"


# -------------------------------------------------------------------------------------- e8m0


def test_e8m0_decodes_bytes_0_and_255_as_the_standard_says():
    got = decode_e8m0(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8))
    assert got[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert got[0] > 0  # the shift (byte << 23) gives 0.0 here, and infinity for 255
    assert got[4].isnan()


def test_e8m0_encode_is_the_inverse_of_decode():
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(encode_e8m0(decode_e8m0(codes)), codes)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, 2.0**-128, math.inf, math.nan])
def test_e8m0_encode_of_anything_else_raises(value):
    with pytest.raises(LayoutError, match="no powers of two") as err:
        encode_e8m0(torch.tensor([1.0, value]))
    assert err.value.code == "Q-VALUE-SCALE"


def test_torchs_own_cast_is_not_a_block_scale_rule():
    """f32 -> e8m0fnu rounds to nearest, halves up: neither floor nor ceil."""
    x = torch.tensor([1.25, 1.5, 3.0, 6.0])
    assert x.to(torch.float8_e8m0fnu).view(torch.uint8).tolist() == [127, 128, 129, 130]


def test_round_up_power_of_two_is_bit_exact():
    one = torch.tensor(1.0)
    x = torch.stack([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)])
    assert round_up_power_of_two(x).tolist() == [1.0, 2.0, 1.0]
    rest = torch.tensor([0.0, 1e-40, 3.0, 2.0**-126])
    assert round_up_power_of_two(rest).tolist() == [0.0, 2.0**-126, 4.0, 2.0**-126]
    assert round_up_power_of_two(torch.tensor(math.nan)).isnan()
