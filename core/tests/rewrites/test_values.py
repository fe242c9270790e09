"""Other descriptions of the same weights are exact, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.dequantize import dequantize
from quant_core.errors import LayoutError
from quant_core.rewrites import code_to_offset, const_to_code, fold_scales, regrain
from quant_core.spec import CHANNEL, TENSOR, Element, Scale, Zero, group
from quant_core.tensors import QuantizedTensor

from .strategies import FP8, make, same_bits, snapshot, tensors, unchanged


def asym(bits: int = 4, *levels: Scale, kind: str = "code", seed: int = 0) -> QuantizedTensor:
    zero = (
        Zero(kind="code", element=f"uint{bits}")
        if kind == "code"
        else Zero(kind="const", value=1 << (bits - 1))
    )
    return make(
        n=7,
        k=70,
        element=Element.uint(bits),
        scales=levels or (Scale(element="f16", grain=group(32)),),
        zero=zero,
        seed=seed,
    )


@settings(derandomize=True, max_examples=150, deadline=None)
@given(qt=tensors(), data=st.data())
def test_regrain_to_any_divisor_keeps_every_weight(
    qt: QuantizedTensor, data: st.DataObject
) -> None:
    zero = qt.spec.zero
    offsets = zero.levels if zero is not None and zero.kind == "offset" else ()
    of, level, scale = data.draw(
        st.sampled_from(
            [("scales", i, s) for i, s in enumerate(qt.spec.scales)]
            + [("offset", i, s) for i, s in enumerate(offsets)]
        )
    )
    grain = tuple(
        data.draw(st.sampled_from([d for d in range(1, (g or 9) + 1) if not g or g % d == 0] + [g]))
        for g in scale.grain
    )
    before = snapshot(qt)
    out = regrain(qt, level, grain, of=of)
    assert same_bits(dequantize(out), dequantize(qt))
    described = out.spec.scales if of == "scales" else out.spec.zero.levels
    assert described[level].grain == grain
    assert unchanged(qt, before)


@pytest.mark.parametrize("grain", [(1, 64), (1, 24), (0, 32), (2, 32), (1, 0)])
def test_regrain_to_other_than_a_divisor_raises_layout_error(grain: tuple[int, int]) -> None:
    with pytest.raises(LayoutError) as err:
        regrain(asym(), 0, grain)
    assert err.value.code == "Q-LAYOUT-GROUP"
    assert err.value.expected == (1, 32)
    assert err.value.actual == grain


def test_regrain_of_a_level_that_is_not_there_raises_layout_error() -> None:
    for level, of in ((1, "scales"), (0, "offset")):
        with pytest.raises(LayoutError, match=of) as err:
            regrain(asym(), level, (1, 16), of=of)
        assert err.value.code == "Q-LAYOUT-GROUP"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_const_to_code_keeps_every_weight(bits: int) -> None:
    qt = asym(bits, kind="const")
    out = const_to_code(qt)
    assert out.spec.zero == Zero(kind="code", element=f"uint{bits}")
    assert out.zeros.unique().tolist() == [1 << (bits - 1)]
    assert out.zeros.shape == qt.scales[0].shape
    assert same_bits(dequantize(out), dequantize(qt))


def test_no_zero_is_a_constant_of_zero() -> None:
    qt = make(n=3, k=8, element=FP8, scales=(Scale(element="f32", grain=CHANNEL),))
    out = const_to_code(qt)
    assert not out.zeros.any()
    assert same_bits(dequantize(out), dequantize(qt))


def test_const_that_does_not_fit_raises_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        const_to_code(asym(4, kind="const"), "uint3")
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    with pytest.raises(LayoutError):
        const_to_code(asym(4))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["code", "const"])
@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_code_to_offset_is_exact_for_half_scales(bits: int, kind: str, element: str) -> None:
    qt = asym(bits, Scale(element=element, grain=group(32)), kind=kind)
    out = code_to_offset(qt)
    assert out.zeros is None
    assert out.spec.zero.levels[0] == Scale(element="f32", grain=group(32))
    assert torch.equal(dequantize(out), dequantize(qt))


def test_code_to_offset_with_two_levels_lands_on_their_common_grid() -> None:
    qt = asym(4, Scale(element="fp8_e4m3", grain=group(16)), Scale(element="f16", grain=(4, 0)))
    out = code_to_offset(qt)
    assert out.spec.zero.levels[0].grain == (1, 16)
    assert torch.equal(dequantize(out), dequantize(qt))


def test_code_to_offset_negative_scale_loses_only_the_sign_of_zero() -> None:
    qt = asym(4)
    qt = replace(qt, scales=(-qt.scales[0],))
    a, b = dequantize(code_to_offset(qt)), dequantize(qt)
    assert torch.equal(a, b)
    assert torch.signbit(b[b == 0]).all()
    assert not torch.signbit(a[a == 0]).any()


def test_code_to_offset_refuses_what_an_element_cannot_hold() -> None:
    qt = asym(8)  # f16 scale times an 8-bit zero: 19 bits, too many for f16
    with pytest.raises(LayoutError) as err:
        code_to_offset(qt, "f16")
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    assert err.value.actual == "f16"
    powers = replace(qt, scales=(torch.full_like(qt.scales[0], 0.25),))
    assert torch.equal(dequantize(code_to_offset(powers, "f16")), dequantize(powers))


def test_code_to_offset_refuses_float32_scales_that_round() -> None:
    qt = asym(4, Scale(element="f32", grain=group(32)))
    with pytest.raises(LayoutError) as err:
        code_to_offset(qt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
    # negative control: the refused rewrite would indeed change weights
    s = qt.scales[0].repeat_interleave(32, 1)[:, :70]
    z = qt.zeros.float().repeat_interleave(32, 1)[:, :70]
    codes = dequantize(replace(qt, spec=replace(qt.spec, scales=(), zero=None), zeros=None))
    assert not torch.equal(codes * s + -z * s, dequantize(qt))


def test_code_to_offset_refuses_products_that_round_beside_an_exact_offset() -> None:
    qt = asym(4, Scale(element="f32", grain=group(32)), kind="const")  # -8 * s is always exact
    with pytest.raises(LayoutError) as err:
        code_to_offset(qt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_code_to_offset_refuses_inverse_scales_and_floats() -> None:
    inverse = asym(4, Scale(element="f32", grain=group(32), inverse=True))
    fp8 = make(n=2, k=8, element=FP8, scales=(Scale(element="f16", grain=CHANNEL),))
    for qt in (inverse, fp8):
        with pytest.raises(LayoutError) as err:
            code_to_offset(qt)
        assert err.value.code == "Q-LAYOUT-REPRESENT"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(qt=tensors())
def test_fold_scales_rounds_like_the_oracle(qt: QuantizedTensor) -> None:
    before = snapshot(qt)
    out = fold_scales(qt, allow_inexact=True)
    assert len(out.spec.scales) <= 1 or len(qt.spec.scales) < 2
    assert same_bits(dequantize(out), dequantize(qt))
    assert unchanged(qt, before)


def two_levels(fine: str, coarse: str, *, inverse: bool = False) -> QuantizedTensor:
    return make(
        n=4,
        k=64,
        element=Element.uint(4),
        scales=(
            Scale(element=fine, grain=group(16)),
            Scale(element=coarse, grain=TENSOR, inverse=inverse),
        ),
        zero=Zero(kind="code", element="uint4"),
    )


@pytest.mark.parametrize(("fine", "coarse"), [("fp8_e4m3", "e8m0"), ("uint6", "f16")])
def test_fold_scales_exact_products_fold(fine: str, coarse: str) -> None:
    qt = two_levels(fine, coarse)
    out = fold_scales(qt)
    assert out.spec.scales == (Scale(element="f32", grain=group(16)),)
    assert same_bits(dequantize(out), dequantize(qt))


@pytest.mark.parametrize(("coarse", "inverse"), [("f32", False), ("f32", True)])
def test_fold_scales_refuses_products_that_round(coarse: str, inverse: bool) -> None:
    qt = two_levels("fp8_e4m3", coarse, inverse=inverse)
    with pytest.raises(LayoutError, match="allow_inexact") as err:
        fold_scales(qt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_fold_scales_inverse_power_of_two_is_exact() -> None:
    qt = two_levels("fp8_e4m3", "f32", inverse=True)
    qt = replace(qt, scales=(qt.scales[0], torch.full((1, 1), 64.0)))
    assert same_bits(dequantize(fold_scales(qt)), dequantize(qt))


def test_fold_scales_refuses_a_quotient_that_rounds() -> None:
    qt = two_levels("f32", "f32", inverse=True)
    qt = replace(qt, scales=(torch.ones_like(qt.scales[0]), torch.full((1, 1), 3.0)))
    with pytest.raises(LayoutError) as err:
        fold_scales(qt)
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_fold_scales_of_one_factor_is_the_same_tensor() -> None:
    qt = asym()
    assert fold_scales(qt) is qt
