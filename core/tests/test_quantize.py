"""Float weights to codes: values worked out by hand, groups of zeros, outliers, NaN."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import LayoutError
from quant_core.packing import unpack
from quant_core.quantize import check_finite, quantize_weight
from quant_core.spec import CHANNEL, TENSOR, Element, Grain, QuantSpec, Scale, Zero, block, group

FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
FP4 = Element(name="fp4_e2m1", bits=4, kind="float")


def spec(element: Element, *scales: Scale, zero: int | None = None) -> QuantSpec:
    const = None if zero is None else Zero(kind="const", value=zero)
    return QuantSpec(element=element, scales=scales, zero=const)


def scale(element: str, grain: Grain, inverse: bool = False) -> Scale:
    return Scale(element=element, grain=grain, inverse=inverse)


INT4 = spec(Element.uint(4), scale("f32", group(4)), zero=8)
NV = spec(FP4, scale("fp8_e4m3", group(16)), scale("f32", TENSOR))
NV_INVERSE = spec(FP4, scale("fp8_e4m3", group(16)), scale("f32", TENSOR, inverse=True))
SPECS = {
    "int8 channel": spec(Element.int(8), scale("f32", CHANNEL)),
    "int4 group": INT4,
    "fp8 tensor": spec(FP8, scale("f32", TENSOR)),
    "fp8 block": spec(FP8, scale("f32", block(8, 16))),
    "mxfp8": spec(FP8, scale("e8m0", group(32))),
    "mxfp4": spec(FP4, scale("e8m0", group(32))),
    "two levels": NV,
    "two levels, inverse": NV_INVERSE,
}
# largest relative distance of a value from its code, for a value at the top of its group
ERROR = {
    "int8": 1 / 127,
    "int4": 1 / 14,
    "fp8 ": 1 / 16,
    "mxfp8": 1 / 8,
    "mxfp4": 1 / 5,
    "two ": 1 / 5,
}


def codes_of(dense: torch.Tensor, meaning: QuantSpec, **kw: float) -> list[list[int]]:
    qt = quantize_weight("w", dense, meaning, **kw)  # type: ignore[arg-type]
    bits = meaning.element.bits
    return unpack(qt.codes, bits, qt.shape, qt.packing).tolist()  # type: ignore[arg-type]


def test_integers_by_hand() -> None:
    # s = 7 / 7 = 1: v = round half to even, code v + 8
    dense = torch.tensor([[7.0, -7.0, 0.5, 1.5, 0.0, 0.0, 0.0, 0.0]])
    assert codes_of(dense, INT4) == [[15, 1, 8, 10, 8, 8, 8, 8]]


def test_peak_is_the_code_that_the_largest_magnitude_becomes() -> None:
    # s = 7.5 / 7.5 = 1: 7.5 rounds to 8, which saturates at 7; -7.5 rounds to -8
    dense = torch.tensor([[7.5, -7.5, 2.5, 3.5]])
    assert codes_of(dense, INT4, peak=7.5) == [[15, 0, 10, 12]]


def test_exponents_by_hand() -> None:
    # max 12 -> 2^ceil(log2(12/6)) = 2: byte 128; 12/2 = 6 is code 7, 5/2 = 2.5 ties to 2 (code 4)
    dense = torch.zeros(1, 32)
    dense[0, :3] = torch.tensor([12.0, 5.0, -1.0])
    qt = quantize_weight("w", dense, SPECS["mxfp4"])
    assert qt.scales[0].tolist() == [[128]]
    assert codes_of(dense, SPECS["mxfp4"])[0][:4] == [7, 4, 8 + 1, 0]


@pytest.mark.parametrize("inverse", [False, True])
def test_two_levels_by_hand(inverse: bool) -> None:
    # g = 2688 / (6 * 448) = 1; block scales fp8(2688/6) = 448 and fp8(6/6) = 1
    dense = torch.zeros(1, 32)
    dense[0, 0], dense[0, 16], dense[0, 17] = 2688.0, 6.0, -1.5
    meaning = NV_INVERSE if inverse else NV
    qt = quantize_weight("w", dense, meaning)
    assert qt.scales[1].tolist() == [[1.0]]
    assert qt.scales[0].view(torch.float8_e4m3fn).float().tolist() == [[448.0, 1.0]]
    codes = codes_of(dense, meaning)[0]
    assert (codes[0], codes[16], codes[17]) == (7, 7, 8 + 3)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("shape", [(1, 32), (7, 64), (33, 96)])
def test_error_is_that_of_rounding_to_the_nearest(name: str, shape: tuple[int, int]) -> None:
    dense = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    back = quantize_weight("w", dense, SPECS[name]).dequantize()
    bound = next(v for k, v in ERROR.items() if name.startswith(k))
    assert float((back - dense).abs().max()) <= bound * float(dense.abs().max())
    wrong = quantize_weight("w", dense * 1.5, SPECS[name]).dequantize()  # the check can fail
    assert float((wrong - dense).abs().max()) > bound * float(dense.abs().max())


@pytest.mark.parametrize("name", SPECS)
def test_result_does_not_depend_on_row_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    whole = quantize_weight("w", dense, SPECS[name])
    monkeypatch.setattr("quant_core.quantize._BLOCK_ELEMENTS", 64 * 5)
    parts = quantize_weight("w", dense, SPECS[name])
    assert all(
        torch.equal(a, b) for a, b in zip(whole.tensors().values(), parts.tensors().values())
    )


@pytest.mark.parametrize("name", SPECS)
def test_zero_groups_and_outliers_stay_finite(name: str) -> None:
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    dense[:8, :32] = -0.0
    dense[9] = 0
    dense[12, 40] = 1e4
    qt = quantize_weight("w", dense, SPECS[name])
    back = qt.dequantize()
    assert torch.isfinite(back).all()
    assert not back[:8, :32].any()
    assert not back[9].any()
    assert abs(float(back[12, 40]) - 1e4) <= 1e4 / 5
    zero = 0 if qt.spec.zero is None else qt.spec.zero.value
    assert {c for row in codes_of(dense, SPECS[name])[:8] for c in row[:32]} == {zero}
    assert not quantize_weight("w", dense * 0, SPECS[name]).dequantize().any()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e30])
def test_extreme_magnitudes_stay_finite(name: str, size: float) -> None:
    dense = torch.linspace(-1, 1, 64).reshape(2, 32) * size
    assert torch.isfinite(quantize_weight("w", dense, SPECS[name]).dequantize()).all()


def test_nan_and_infinity_are_counted() -> None:
    dense = torch.zeros(4, 32)
    dense[1, 3], dense[2, 0], dense[3, 31] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(LayoutError, match=r"a\.weight: 3 of 128 .* \(first at \(1, 3\)\)") as info:
        quantize_weight("a.weight", dense, SPECS["fp8 tensor"])
    assert (info.value.code, info.value.tensor, info.value.actual) == (
        "Q-VALUE-WEIGHT", "a.weight", 3,
    )  # fmt: skip
    check_finite("w", torch.ones(3, 3))


@pytest.mark.parametrize(
    "meaning",
    [
        spec(Element.int(8), scale("f32", CHANNEL, inverse=True)),
        QuantSpec(element=Element.uint(4), scales=INT4.scales, zero=Zero(kind="code")),
        spec(FP4, scale("fp8_e4m3", group(16)), scale("f32", CHANNEL)),
    ],
)
def test_other_specs_are_refused(meaning: QuantSpec) -> None:
    with pytest.raises(LayoutError) as info:
        quantize_weight("w", torch.ones(2, 32), meaning)
    assert info.value.code == "Q-LAYOUT-REPRESENT"
