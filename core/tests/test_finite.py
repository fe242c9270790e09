"""Codes that are no numbers are found, whatever their place; torch's own float8 types decide."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import LayoutError
from quant_core.finite import check_matrix, odd_codes
from quant_core.spec import CHANNEL, Element, LayerDesc, QuantSpec, Scale, group
from quant_core.tensors import LayerTensors, QuantizedTensor

TYPES = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3_fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2_fnuz": torch.float8_e5m2fnuz,
}
LAYER = LayerDesc(kind="linear", name="up", stored="mlp.up")


@pytest.mark.parametrize("element", TYPES)
def test_every_code_alone_is_judged_as_torch_reads_it(element):
    for code in range(256):
        codes = torch.full((3, 5), 1, dtype=torch.uint8)
        codes[2, 1] = code
        want = ~codes.view(TYPES[element]).float().isfinite()
        found = odd_codes(codes, element)
        if bool(want.any()):
            assert found is not None, code
            assert torch.equal(found, want), code
        else:
            assert found is None, code


def test_every_piece_of_a_large_matrix_is_looked_at():
    codes = torch.full((2048, 520), 0x7E, dtype=torch.uint8)  # two pieces and a remainder
    assert odd_codes(codes, "fp8_e4m3") is None
    for at in ((0, 0), (1023, 7), (2047, 519)):
        codes[at] = 0xFF
        found = odd_codes(codes, "fp8_e4m3")
        assert found is not None
        assert found.nonzero().tolist() == [list(at)]
        codes[at] = 0xFE


def test_no_codes_and_views_are_read():
    assert odd_codes(torch.empty((0, 4), dtype=torch.uint8), "fp8_e4m3") is None
    assert odd_codes(torch.empty((0, 4), dtype=torch.uint8), "fp8_e5m2_fnuz") is None
    codes = torch.zeros((4, 6), dtype=torch.uint8)
    codes[1, 4] = 0x7F
    found = odd_codes(codes.T, "fp8_e4m3")
    assert found is not None
    assert found.nonzero().tolist() == [[4, 1]]
    assert odd_codes(codes[:, ::3], "fp8_e4m3") is None


def matrix(name: str, bits: int, scale: str = "f32", kind: str = "float") -> LayerTensors:
    grain = CHANNEL if scale == "f32" else group(32)
    spec = QuantSpec(
        element=Element(name=name, bits=bits, kind=kind),  # type: ignore[arg-type]
        scales=(Scale(element=scale, grain=grain),),
    )
    one = torch.ones(4, 1) if scale == "f32" else torch.full((4, 1), 127, dtype=torch.uint8)
    codes = torch.zeros((4, 32 * bits // 8), dtype=torch.uint8)
    return LayerTensors(
        operands={"weight": QuantizedTensor(spec=spec, shape=(4, 32), codes=codes, scales=(one,))}
    )


def test_nan_among_codes_is_named_with_tensor_count_and_place():
    lt = matrix("fp8_e4m3", 8)
    stored = {"weight_scale": lt.weight.scales[0], "weight": lt.weight.codes}
    check_matrix(LAYER, lt, stored)
    lt.weight.codes[2, 3], lt.weight.codes[3, 0] = 0x7F, 0xFF
    with pytest.raises(LayoutError, match=r"mlp\.up\.weight: 2 of 128 .*first at \(2, 3\)") as err:
        check_matrix(LAYER, lt, stored)
    assert err.value.code == "Q-VALUE-WEIGHT"
    assert (err.value.tensor, err.value.actual) == ("mlp.up.weight", 2)
    lt.weight.codes[2, 3], lt.weight.codes[3, 0] = 0x7E, 0xFE  # +-448, the largest numbers
    check_matrix(LAYER, lt, stored)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("uint8", 8), ("fp4_e2m1", 4)])
def test_types_without_nan_may_hold_every_byte(name, bits):
    lt = matrix(name, bits, kind="float" if name == "fp4_e2m1" else name.rstrip("8"))
    lt.weight.codes.fill_(0xFF)
    check_matrix(LAYER, lt, {"weight": lt.weight.codes})


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4_e2m1"])
def test_exponent_byte_255_is_refused_and_254_is_not(name):
    lt = matrix(name, 8 if name == "fp8_e4m3" else 4, "e8m0")
    lt.weight.scales[0][1, 0] = 254
    check_matrix(LAYER, lt, {})
    lt.weight.scales[0][1, 0] = 255
    with pytest.raises(LayoutError, match=r"first at \(1, 0\)") as err:
        check_matrix(LAYER, lt, {})
    assert err.value.code == "Q-VALUE-SCALE"


SCALES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, **TYPES}


@pytest.mark.parametrize("element", SCALES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_scale_that_is_no_number_is_found_in_any_place(element, bad):
    dtype = SCALES[element]
    values = torch.full((5000, 4), torch.finfo(dtype).max).to(dtype)
    broken = values.float().clone()
    broken[4999, 3] = bad
    broken = broken.to(dtype)
    if torch.isfinite(broken.float()).all():
        pytest.skip("the type has no infinity: it saturates")
    for held, refused in ((values, False), ((-values.float()).to(dtype), False), (broken, True)):
        held = held if dtype.itemsize > 1 else held.view(torch.uint8)
        for scale in (held, held.t().contiguous().t()):  # in rows, and as a view
            lt = matrix("uint4", 4, element, kind="uint")
            lt.weight.scales = (scale,)
            if not refused:
                check_matrix(LAYER, lt, {})
                continue
            with pytest.raises(LayoutError, match=r"1 of 20000 .*first at \(4999, 3\)") as err:
                check_matrix(LAYER, lt, {})
            assert err.value.code == "Q-VALUE-SCALE"


@pytest.mark.parametrize("element", ["uint4", "uint6", "int8"])
def test_integer_scales_are_numbers_whatever_their_bits(element):
    lt = matrix("uint4", 4, element, kind="uint")
    lt.weight.scales[0].fill_(255)
    check_matrix(LAYER, lt, {})


def test_infinity_in_a_bias_is_refused():
    lt = matrix("int8", 8, kind="int")
    lt.bias = torch.tensor([0.0, 1.0, float("inf"), 2.0], dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match=r"mlp\.up\.bias: 1 of 4 .*first at \(2,\)") as err:
        check_matrix(LAYER, lt, {})
    assert err.value.code == "Q-VALUE-WEIGHT"
