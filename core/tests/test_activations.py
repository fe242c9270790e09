"""Quantized activations against compressed-tensors, and through the reference kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from made_layers import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import LayoutError
from quant_core.kernels.activations import fake_quantize, static_shape, unsupported_input
from quant_core.kernels.base import Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale, Zero, group
from with_input import with_input

X = torch.tensor(
    [
        [0.3, -1.7, 2.54, 0.01, -0.5, 1.25, -2.5, 0.7],
        [0.0] * 8,
        [1e-3, -3e-3, 5e4, -7.0, 0.25, 0.75, 1.5, -2.25],
        [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.5],
    ]
)
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
INT8_ZERO = Zero(kind="code", element="int8")


def dynamic(element, grain, *, peak=0.0, zero=None):
    scale = Scale(element="f32", grain=grain, static=False, peak=peak)
    return QuantSpec(element=element, scales=(scale,), zero=zero)


RULES = {
    "int8_token": dynamic(Element.int(8), CHANNEL, peak=127.5),
    "int8_token_zero": dynamic(Element.int(8), CHANNEL, zero=INT8_ZERO),
    "int8_group4": dynamic(Element.int(8), group(4), peak=127.5),
    "fp8_token": dynamic(FP8, CHANNEL),
    "int4_token": dynamic(Element.int(4), CHANNEL, peak=7.5),
}
# name -> (scales, zeros, codes) of X from compressed-tensors 0.19.0, compute_dynamic_scales_and_zp
# and quantize of quantization.lifecycle.forward, float32 on CPU
GOLDEN = {
    "int8_token": (
        [
            "0x1.46651e0000000p-6",
            "0x1.0000000000000p-23",
            "0x1.8828280000000p+8",
            "0x1.9191920000000p-4",
        ],
        [0, 0, 0, 0],
        [
            [15, -85, 127, 1, -25, 63, -125, 35],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 127, 0, 0, 0, 0, 0],
            [51, 61, 71, 82, 92, 102, 112, 127],
        ],
    ),
    "int8_token_zero": (
        [
            "0x1.43d3300000000p-6",
            "0x1.0000000000000p-23",
            "0x1.8836360000000p+7",
            "0x1.9191920000000p-5",
        ],
        [-2, 0, -128, -128],
        [
            [13, -88, 127, -1, -27, 61, -128, 33],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [-128, -128, 127, -128, -128, -128, -128, -128],
            [-26, -6, 15, 35, 56, 76, 96, 127],
        ],
    ),
    "int8_group4": (
        [
            "0x1.46651e0000000p-6",
            "0x1.4141420000000p-6",
            "0x1.0000000000000p-23",
            "0x1.0000000000000p-23",
            "0x1.8828280000000p+8",
            "0x1.2121220000000p-6",
            "0x1.0101020000000p-4",
            "0x1.9191920000000p-4",
        ],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [
            [15, -85, 127, 1, -26, 64, -127, 36],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 127, 0, 14, 42, 85, -127],
            [80, 96, 112, 127, 92, 102, 112, 127],
        ],
    ),
    "fp8_token": (
        [
            "0x1.7390d20000000p-8",
            "0x1.0000000000000p-23",
            "0x1.be6db60000000p+6",
            "0x1.c924920000000p-6",
        ],
        [0, 0, 0, 0],
        [
            [52, -288, 448, 1.75, -88, 224, -448, 120],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 448, -0.0625, 0.001953125, 0.005859375, 0.013671875, -0.01953125],
            [176, 208, 256, 288, 320, 352, 384, 448],
        ],
    ),
    "int4_token": (
        [
            "0x1.5acb6e0000000p-2",
            "0x1.0000000000000p-23",
            "0x1.a0aaaa0000000p+12",
            "0x1.aaaaaa0000000p+0",
        ],
        [0, 0, 0, 0],
        [
            [1, -5, 7, 0, -1, 4, -7, 2],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 7, 0, 0, 0, 0, 0],
            [3, 4, 4, 5, 5, 6, 7, 7],
        ],
    ),
}


def _golden(name):
    scales, zeros, codes = GOLDEN[name]
    s = torch.tensor([float.fromhex(v) for v in scales], dtype=torch.float32)
    s, z = s.view(4, -1), torch.tensor(zeros, dtype=torch.float32).view(4, -1)
    wide = [t.repeat_interleave(8 // t.shape[1], dim=1) for t in (s, z)]
    return (torch.tensor(codes, dtype=torch.float32) - wide[1]) * wide[0]


@pytest.mark.parametrize("name", GOLDEN)
def test_run_time_rules_equal_compressed_tensors(name):
    assert torch.equal(fake_quantize(X, RULES[name]), _golden(name))


def test_peak_of_the_element_itself_differs_from_half_the_range():
    plain = dynamic(Element.int(8), CHANNEL)  # 127, not 127.5
    assert not torch.equal(fake_quantize(X, plain), _golden("int8_token"))
    assert torch.equal(fake_quantize(X, plain)[3, -1], X[3, -1])  # the largest value is kept


def test_static_scale_and_zero_equal_compressed_tensors():
    scale = Scale(element="bf16", grain=TENSOR)
    spec = QuantSpec(element=Element.int(8), scales=(scale,), zero=INT8_ZERO)
    s = torch.tensor([0.03125], dtype=torch.bfloat16)
    z = torch.tensor([-37], dtype=torch.int8).view(torch.uint8)
    got = fake_quantize(X, spec, s, z)
    want = [0.3125, -1.6875, 2.53125, 0.0, -0.5, 1.25, -2.5, 0.6875]
    assert got[0].tolist() == want
    assert got[2].tolist() == [0.0, 0.0, 5.125, -2.84375, 0.25, 0.75, 1.5, -2.25]
    assert got[3].tolist() == [5.0] + 7 * [5.125]


def test_static_scale_absent_raises():
    spec = QuantSpec(element=Element.int(8), scales=(Scale(element="bf16", grain=TENSOR),))
    with pytest.raises(LayoutError, match="input_scale") as err:
        fake_quantize(X, spec)
    assert err.value.code == "Q-LAYOUT-SHAPE"


def test_short_last_group_equals_its_own_columns():
    spec = dynamic(Element.int(8), group(5))
    got = fake_quantize(X, spec)
    tail = fake_quantize(X[:, 5:].contiguous(), dynamic(Element.int(8), CHANNEL))
    assert torch.equal(got[:, 5:], tail)


@pytest.mark.parametrize("name", RULES)
def test_dtype_is_kept_zeros_stay_zeros_and_nan_is_seen(name):
    assert fake_quantize(X.bfloat16(), RULES[name]).dtype == torch.bfloat16
    assert fake_quantize(X[:0], RULES[name]).shape == (0, 8)
    bad = X.clone()
    bad[0, 2], bad[3, 0] = float("nan"), float("inf")
    got = fake_quantize(bad, RULES[name])
    assert got[1].eq(0).all()
    assert got[0].isnan().any()
    assert not got[3].isfinite().all()
    assert got[2].isfinite().all()


@pytest.mark.parametrize("name", ["int8_token", "int8_token_zero", "fp8_token"])
def test_linear_multiplies_the_rounded_activations(name):
    lt = make_layer(SPECS["uint4_code"], bias=True)
    kernel = ReferenceKernel()
    op = with_input(make_op("linear", lt), RULES[name])
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    x = torch.randn(3, 5, 96)
    got = kernel.bind(op)(list(buffers.values()), x)
    w = dense_weight(lt.weight, 96)
    want = F.linear(fake_quantize(x.view(15, 96), RULES[name]), w, lt.bias.float())
    # same float32 products, summed in another order over K=96
    assert torch.allclose(got.view(15, -1), want, rtol=1e-5, atol=1e-5 * 96**0.5)
    assert not torch.allclose(got, F.linear(x, w, lt.bias.float()), rtol=1e-5, atol=1e-3)


def test_static_input_comes_back_from_the_buffers():
    spec = QuantSpec(
        element=Element.int(8), scales=(Scale(element="bf16", grain=TENSOR),), zero=INT8_ZERO
    )
    lt = replace(
        make_layer(SPECS["uint4_code"]),
        input_scale=torch.tensor([0.02], dtype=torch.bfloat16),
        input_zero=torch.tensor([219], dtype=torch.uint8),
    )
    kernel = ReferenceKernel()
    op = with_input(make_op("linear", lt), spec, "input_scale", "input_zero")
    assert static_shape(op)["input_scale"] == ((1,), torch.bfloat16)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    back = kernel.restore(buffers, op)
    assert torch.equal(back.input_scale, lt.input_scale)
    assert torch.equal(back.input_zero, lt.input_zero)


NF4 = Element(name="nf4", bits=4, kind="lut")
STATIC_ROWS = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))


@pytest.mark.parametrize(
    "spec",
    [
        dynamic(NF4, CHANNEL),
        replace(RULES["int8_token"], scales=2 * RULES["int8_token"].scales),
        STATIC_ROWS,
        dynamic(Element.int(8), (0, 4)),
        dynamic(FP8, CHANNEL, zero=INT8_ZERO),
    ],
    ids=["element", "two factors", "static per token", "columns", "float with zero"],
)
def test_inputs_that_cannot_be_computed_are_rejected_with_a_reason(spec):
    op = with_input(make_op("linear", make_layer(SPECS["uint4_code"])), spec)
    answer = unsupported_input(op)
    assert isinstance(answer, Rejected)
    assert ReferenceKernel().accepts(op) == answer
