"""8-bit activations in Triton's interpreter: codes equal the reference's, results its sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Accepted
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, block, group
from quant_kernels_triton.scaled_kernel import Scaled
from quant_kernels_triton.scaled_plan import describe_scaled
from quant_kernels_triton.scaled_run import codes_of
from triton_made import make_layer, make_op

FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
INT8 = Element.int(8)


def _acts(element: Element, grain: tuple[int, int], **kw: object) -> QuantSpec:
    return QuantSpec(
        element=element, scales=(Scale(element="f32", grain=grain, static=False, **kw),)
    )


CASES = {
    "fp8 token": (FP8, CHANNEL, _acts(FP8, CHANNEL)),
    "fp8 token, matrix": (FP8, TENSOR, _acts(FP8, CHANNEL)),
    "fp8 bounded": (FP8, CHANNEL, _acts(FP8, CHANNEL, least=1e-3, most=2e-3)),
    "int8 token": (INT8, CHANNEL, _acts(INT8, CHANNEL)),
    "fp8 block": (FP8, block(128, 128), _acts(FP8, group(128))),
}


def prepared(name: str, n: int = 72, k: int = 304, bias: bool = True) -> tuple[OpSpec, object]:
    element, grain, acts = CASES[name]
    weight = QuantSpec(element=element, scales=(Scale(element="f32", grain=grain),))
    op = make_op(weight, n, k, act="float32", bias=bias)
    op = replace(op, operands=(("weight", weight), ("input", acts)))
    return op, make_layer(weight, n, k, bias=bias)


def bound(kernel, op, lt):
    assert isinstance(kernel.accepts(op), Accepted), kernel.accepts(op)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run = kernel.bind(op)
    return lambda x: run(list(buffers.values()), x)


@pytest.mark.parametrize("name", CASES)
def test_result_equals_the_reference(name):
    op, lt = prepared(name)
    ours, reference = bound(Scaled(), op, lt), bound(ReferenceKernel(), op, lt)
    for m in (1, 3, 17):
        x = torch.randn(m, 304) * torch.logspace(-3, 2, 304)
        got, want = ours(x), reference(x)
        # the same codes, summed in another order in float32
        assert ((got - want).norm() / want.norm()).item() < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_codes_times_scales_equal_the_reference_bit_for_bit(name):
    op, _ = prepared(name)
    p = describe_scaled(op)
    x = torch.randn(5, 304) * torch.logspace(-6, 3, 304)
    x[2] = 0
    q, s = codes_of(p, x, None)
    codes = q.view(torch.float8_e4m3fn).float() if p.kind != "int8" else q.float()
    s = s.repeat_interleave(128, 1)[:, :304] if p.kind == "block" else s[:, None]
    assert torch.equal(codes * s, fake_quantize(x, op.operand("input")))


def test_nan_and_infinity_reach_their_tokens_only():
    op, lt = prepared("fp8 token")
    x = torch.randn(3, 304)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    y = bound(Scaled(), op, lt)(x)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


def test_no_rows_give_no_rows():
    op, lt = prepared("int8 token")
    assert bound(Scaled(), op, lt)(torch.empty(0, 304)).shape == (0, 72)


def test_negative_control_activations_left_as_they_are_differ():
    op, lt = prepared("int8 token", bias=False)
    x = torch.randn(4, 304) * torch.logspace(-3, 2, 304)
    exact = x @ lt.dequantize().t()
    got = bound(Scaled(), op, lt)(x)
    assert ((got - exact).norm() / exact.norm()).item() > 1e-4
