"""Rounding to small floats: the tie tables of the peers, torch's own casts, the fnuz variants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core.errors import LayoutError
from quant_core.numerics import (
    decode,
    element_range,
    element_table,
    encode,
    fn_to_fnuz,
    fnuz_to_fn,
    round_to,
)
from quant_core.spec import Element

BITS = {"fp4_e2m1": 4, "fp6_e2m3": 6, "fp6_e3m2": 6}
NAMES = (*BITS, "fp8_e4m3", "fp8_e5m2", "fp8_e4m3_fnuz", "fp8_e5m2_fnuz")
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def element(name: str) -> Element:
    return Element(name=name, bits=BITS.get(name, 8), kind="float")


FP4 = element("fp4_e2m1")
MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
# ModelOpt 0.47 NVFP4, compressed-tensors 0.20 and torchao 0.18 (even), ModelOpt MXFP4 and SGLang
# 0.5.23 MXFP4 (down), SGLang 0.5.23 FP4 KV cache (up), ModelSlim 26.1 (away)
TIES = {
    "even": [0, 2, 2, 4, 4, 6, 6],
    "down": [0, 1, 2, 3, 4, 5, 6],
    "up": [1, 2, 3, 4, 5, 6, 7],
    "away": [1, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("ties", TIES)
def test_fp4_ties_equal_the_producers_codes(ties):
    x = torch.tensor(MIDPOINTS)
    assert encode(x, FP4, ties).tolist() == TIES[ties]
    minus = encode(-x, FP4, ties)
    assert decode(minus, FP4).tolist() == (-decode(encode(x, FP4, ties), FP4)).tolist()
    assert encode(x.double(), FP4, ties).tolist() == TIES[ties]


@pytest.mark.parametrize("ties", TIES)
def test_fp4_beside_a_midpoint_is_the_nearest_whatever_the_tie_rule(ties):
    x = torch.tensor(MIDPOINTS)
    below = torch.nextafter(x, torch.tensor(0.0))
    above = torch.nextafter(x, torch.tensor(math.inf))
    assert encode(below, FP4, ties).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert encode(above, FP4, ties).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_fp4_saturates_and_signs_zero():
    x = torch.tensor([6.0, 6.1, 1e9, math.inf, -math.inf, 0.0, -0.0, -0.1])
    assert encode(x, FP4).tolist() == [7, 7, 7, 7, 15, 0, 0, 8]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ties", TIES)
def test_every_finite_code_encodes_to_itself(name, ties):
    e = element(name)
    codes = torch.arange(2**e.bits, dtype=torch.uint8)
    values = element_table(name)
    keep = torch.isfinite(values) & ~(torch.signbit(values) & (values == 0))
    assert torch.equal(encode(values[keep], e, ties), codes[keep])
    assert torch.equal(round_to(values[keep], e, ties), values[keep])


# OCP OFP8 / MX v1.0 and AMD's fnuz: largest value, smallest normal, smallest subnormal
LIMITS = {
    "fp8_e4m3": (448.0, 2**-6, 2**-9),
    "fp8_e4m3_fnuz": (240.0, 2**-7, 2**-10),
    "fp8_e5m2": (57344.0, 2**-14, 2**-16),
    "fp4_e2m1": (6.0, 1.0, 0.5),
    "fp6_e2m3": (7.5, 1.0, 0.125),
    "fp6_e3m2": (28.0, 0.25, 0.0625),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_equal_the_published_tables(name):
    top, normal, subnormal = LIMITS[name]
    e = element(name)
    assert element_range(e) == (-top, top)
    x = torch.tensor([top * 4, math.inf, -math.inf, normal, subnormal, -subnormal])
    assert round_to(x, e).tolist() == [top, top, -top, normal, subnormal, -subnormal]
    assert round_to(torch.tensor([subnormal * 0.499, subnormal * 0.51]), e).tolist() == [
        0.0,
        subnormal,
    ]


def test_fp8_overflow_saturates_where_a_bare_cast_differs_by_type():
    x = torch.tensor([500.0, 1e6])
    assert x.to(torch.float8_e4m3fnuz).view(torch.uint8).tolist() == [0x80, 0x80]  # NaN
    assert encode(x, element("fp8_e4m3_fnuz")).tolist() == [0x7F, 0x7F]
    assert encode(x, element("fp8_e4m3")).tolist() == [0x7E, 0x7E]
    assert x.to(torch.float8_e5m2).view(torch.uint8).tolist()[1] == 0x7C  # infinity
    assert encode(x, element("fp8_e5m2")).tolist()[1] == 0x7B


def test_fp8_samples_round_half_to_even():
    x = torch.tensor([17.0, 19.0, 0.3, 1.0625, 1.1875])
    assert round_to(x, element("fp8_e4m3")).tolist() == [16.0, 20.0, 0.3125, 1.0, 1.25]


def test_worked_fp8_example_has_the_published_bytes():
    w = torch.tensor([[896.0, -2.0], [1.0, 0.5]])
    assert encode(w / 2.0, element("fp8_e4m3")).tolist() == [[0x7E, 0xB8], [0x30, 0x28]]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3_fnuz", "fp8_e5m2_fnuz"])
@settings(derandomize=True, max_examples=200, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, min_value=-2e5, max_value=2e5)))
def test_table_path_equals_torch_casts_on_clamped_values(name, values):
    dtype = {
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        "fp8_e4m3_fnuz": torch.float8_e4m3fnuz,
        "fp8_e5m2_fnuz": torch.float8_e5m2fnuz,
    }[name]
    x = torch.tensor(values, dtype=torch.float32)
    top = torch.finfo(dtype).max
    want = x.clamp(-top, top).to(dtype)
    assert torch.equal(encode(x, element(name)), want.view(torch.uint8))
    # float64 goes through the table, not through torch's cast
    assert torch.equal(round_to(x.double(), element(name)).float(), want.float())


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    ties=st.sampled_from(sorted(TIES)),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_no_value_of_the_element_is_nearer(name, ties, values):
    x = torch.tensor(values, dtype=torch.float64)
    got = round_to(x, element(name), ties)
    table = element_table(name).double()
    table = table[torch.isfinite(table)]
    best = (x.clamp(table.min(), table.max())[:, None] - table).abs().amin(dim=1)
    assert torch.equal((x.clamp(table.min(), table.max()) - got).abs(), best)


def test_nan_stays_visible_where_there_is_a_code_and_raises_where_there_is_none():
    x = torch.tensor([1.0, math.nan])
    assert encode(x, element("fp8_e4m3")).tolist()[1] & 0x7F == 0x7F
    assert encode(x.double(), element("fp8_e4m3")).tolist()[1] & 0x7F == 0x7F
    assert encode(x.double(), element("fp8_e4m3_fnuz")).tolist() == [0x40, 0x80]
    assert round_to(x, FP4).isnan().tolist() == [False, True]
    for e in (FP4, Element.int(8)):
        with pytest.raises(LayoutError, match="1 NaN") as err:
            encode(x, e)
        assert err.value.code == "Q-VALUE-WEIGHT"


@pytest.mark.parametrize(
    ("ties", "want"),
    [("even", [0, 2, 2, -2, 1, 127, -128]), ("down", [0, 1, 2, -1, 1, 127, -128]),
     ("away", [1, 2, 3, -2, 1, 127, -128])],
)  # fmt: skip
def test_integers_round_by_the_tie_rule_and_saturate(ties, want):
    x = torch.tensor([0.5, 1.5, 2.5, -1.5, 0.75, 300.0, -300.0])
    assert decode(encode(x, Element.int(8), ties), Element.int(8)).tolist() == want
    just_below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    assert round_to(just_below, Element.int(8), ties).item() == 0


def test_four_bit_integers_are_twos_complement():
    assert encode(torch.tensor([-8.0, -1.0, 7.0]), Element.int(4)).tolist() == [8, 15, 7]


def test_unknown_tie_rule_and_exponent_element_raise_layout_error():
    with pytest.raises(LayoutError, match="odd") as err:
        encode(torch.ones(1), FP4, "odd")
    assert err.value.code == "Q-LAYOUT-ELEMENT"
    with pytest.raises(LayoutError, match="mx_scale"):
        encode(torch.ones(1), Element(name="e8m0", bits=8, kind="float"))


# ------------------------------------------------------------------------------- fn and fnuz


def test_same_byte_is_half_the_value_in_fnuz_except_three():
    fn, fnuz = element_table("fp8_e4m3"), element_table("fp8_e4m3_fnuz")
    same = fn == 2 * fnuz
    assert [c for c in range(256) if not same[c]] == [0x7F, 0x80, 0xFF]


def test_fn_to_fnuz_keeps_the_value_under_doubled_scales():
    codes = ALL_BYTES[ALL_BYTES & 0x7F != 0x7F]
    moved = fn_to_fnuz(codes)
    assert moved.tolist() == [0 if c == 0x80 else c for c in codes.tolist()]
    assert torch.equal(2 * element_table("fp8_e4m3_fnuz")[moved.long()], decode_fn(codes))
    assert torch.equal(fnuz_to_fn(moved), moved)


def decode_fn(codes):
    return element_table("fp8_e4m3")[codes.long()]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_do_not_become_numbers_in_fnuz(code):
    with pytest.raises(LayoutError) as err:
        fn_to_fnuz(torch.tensor([1, code], dtype=torch.uint8))
    assert err.value.code == "Q-VALUE-WEIGHT"


@pytest.mark.parametrize("code", [0x7F, 0x80, 0xFF])
def test_codes_without_counterpart_raise_when_leaving_fnuz(code):
    with pytest.raises(LayoutError) as err:
        fnuz_to_fn(torch.tensor([1, code], dtype=torch.uint8))
    assert err.value.code == "Q-VALUE-WEIGHT"
