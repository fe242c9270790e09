"""Element tables against torch's own float8 types and the values printed in the OCP documents."""

from __future__ import annotations

import pytest
import torch

from quant_core.errors import LayoutError
from quant_core.numerics import FLOAT_ELEMENTS, decode, decode_scale, element_table, scale_dtype
from quant_core.spec import Element

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def element(name: str, bits: int = 8) -> Element:
    return Element(name=name, bits=bits, kind="float")


def ocp_value(code: int, exp_bits: int, man_bits: int, bias: int) -> float:
    """Sign, exponent, mantissa by the formula of OCP OFP8 / MX v1.0, section 5.3."""
    sign = -1.0 if code >> (exp_bits + man_bits) else 1.0
    exponent = code >> man_bits & (1 << exp_bits) - 1
    mantissa = code & (1 << man_bits) - 1
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - man_bits)
    return sign * ((1 << man_bits) + mantissa) * 2.0 ** (exponent - bias - man_bits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("fp8_e4m3_fnuz", torch.float8_e4m3fnuz),
        ("fp8_e5m2_fnuz", torch.float8_e5m2fnuz),
    ],
)
def test_fp8_tables_equal_torch(name: str, dtype: torch.dtype) -> None:
    expected = ALL_BYTES.view(dtype).float()
    torch.testing.assert_close(element_table(name), expected, rtol=0, atol=0, equal_nan=True)
    decoded = decode(ALL_BYTES, element(name))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    strided = torch.stack([ALL_BYTES, ALL_BYTES], dim=1)[:, 0]
    torch.testing.assert_close(
        decode(strided, element(name)), expected, rtol=0, atol=0, equal_nan=True
    )


def test_fp8_e4m3_equals_ocp_formula() -> None:
    table = element_table("fp8_e4m3")
    for code in range(256):
        if code & 0x7F == 0x7F:
            assert table[code].isnan()
        else:
            assert table[code].item() == ocp_value(code, 4, 3, 7)
    assert table[0x7E].item() == 448.0  # largest finite value, OCP OFP8 table 2
    assert table[0x01].item() == 2.0**-9  # smallest subnormal


def test_fp8_e5m2_limits_equal_ocp_table() -> None:
    table = element_table("fp8_e5m2")
    assert table[0x7B].item() == 57344.0
    assert table[0x01].item() == 2.0**-16
    assert table[0x7C].item() == float("inf")
    assert table[0x7D].isnan()


def test_fp4_e2m1_equals_ocp_table() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP MX v1.0, table 5
    table = element_table("fp4_e2m1")
    assert table.tolist() == positive + [-v for v in positive]
    assert torch.signbit(table[8])


def test_fp6_equals_ocp_formula_and_limits() -> None:
    for name, exp_bits, man_bits, bias, top in [
        ("fp6_e2m3", 2, 3, 1, 7.5),  # OCP MX v1.0, table 4
        ("fp6_e3m2", 3, 2, 3, 28.0),
    ]:
        table = element_table(name)
        assert table.tolist() == [ocp_value(c, exp_bits, man_bits, bias) for c in range(64)]
        assert table.max().item() == top
    assert element_table("fp6_e2m3")[1].item() == 0.125
    assert element_table("fp6_e3m2")[1].item() == 0.0625


def test_e8m0_is_a_power_of_two_and_255_is_nan() -> None:
    table = element_table("e8m0")
    assert [table[i].item() for i in (0, 1, 126, 127, 128, 254)] == [
        2.0**-127,
        2.0**-126,
        0.5,
        1.0,
        2.0,
        2.0**127,
    ]
    assert table[255].isnan()
    assert table[0].item() > 0  # a subnormal float32, not flushed


def test_every_float_element_has_a_table() -> None:
    for name in FLOAT_ELEMENTS:
        assert element_table(name).dtype == torch.float32


def test_unknown_element_raises_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        element_table("fp8_e3m4")
    assert err.value.code == "Q-LAYOUT-ELEMENT"
    assert err.value.actual == "fp8_e3m4"


@pytest.mark.parametrize(
    ("bits", "codes", "values"),
    [
        (8, [0, 1, 127, 128, 255], [0, 1, 127, -128, -1]),
        (4, [0, 7, 8, 15], [0, 7, -8, -1]),
        (6, [31, 32, 63], [31, -32, -1]),
    ],
)
def test_signed_codes_are_twos_complement(bits: int, codes: list[int], values: list[int]) -> None:
    raw = torch.tensor(codes, dtype=torch.uint8)
    assert decode(raw, Element.int(bits)).tolist() == values
    assert decode_scale(raw, f"int{bits}").tolist() == values


def test_unsigned_codes_are_their_value() -> None:
    assert decode(ALL_BYTES, Element.uint(8)).tolist() == list(range(256))


def test_lut_reads_its_codebook() -> None:
    nf = Element(name="nf2", bits=2, kind="lut")
    book = torch.tensor([-1.0, -0.25, 0.5, 1.0])
    assert decode(torch.tensor([[3, 0], [1, 2]], dtype=torch.uint8), nf, (book,)).tolist() == [
        [1.0, -1.0],
        [-0.25, 0.5],
    ]


def test_vector_element_has_no_scalar_reading() -> None:
    with pytest.raises(LayoutError, match="codebooks") as err:
        decode(ALL_BYTES, Element(name="e8p", bits=8, kind="vector", covers=(1, 8)))
    assert err.value.code == "Q-LAYOUT-ELEMENT"


def test_wide_scales_keep_their_value() -> None:
    values = torch.tensor([1.5, -0.0625, 65504.0])
    for name, dtype in [("f16", torch.float16), ("f32", torch.float32)]:
        assert scale_dtype(name) == dtype
        assert torch.equal(decode_scale(values.to(dtype), name), values)
    assert decode_scale(torch.tensor([0.1], dtype=torch.bfloat16), "bf16").item() == 0.10009765625


def test_scale_of_wrong_dtype_raises_layout_error() -> None:
    with pytest.raises(LayoutError) as err:
        decode_scale(torch.ones(2, dtype=torch.bfloat16), "fp8_e4m3")
    assert err.value.code == "Q-LAYOUT-DTYPE"
    assert err.value.actual == "torch.bfloat16"
