"""The plain kernels in Triton's interpreter against the float64 product with the oracle's weights.

Run by test_interpreted.py in a process of its own. float16 inputs: the interpreter truncates where
it makes bfloat16, so that only its structure, not its rounding, could be checked.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.dequantize import dense_weight
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Accepted
from quant_kernels_triton.wna16 import Dense, PlainTriton
from triton_made import SPECS, make_layer, make_op

# weights rounded to float16 (2^-11 / sqrt 3 each, relative) and the result once more
BOUND = 6e-4


def bind(kernel, op, parts):
    answer = kernel.accepts(op)
    assert isinstance(answer, Accepted), answer
    buffers = kernel.allocate(op)
    for at, lt in parts:
        kernel.load_(buffers, op, lt, at)
    run, values = kernel.bind(op), list(buffers.values())
    return lambda *inputs: run(values, *inputs)


def error(got, x, w, bias=None):
    want = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kernel", [PlainTriton(), Dense()], ids=lambda k: k.name)
def test_linear_equals_the_oracle(kernel, name):
    n, k = 72, 288  # a tail of rows and of columns
    lt = make_layer(SPECS[name], n, k, bias=True)
    run = bind(kernel, make_op(SPECS[name], n, k, bias=True), [({"row": 0}, lt)])
    w = dense_weight(lt.weight, k)
    for m in (1, 17):
        x = torch.randn(m, k).half()
        got = run(x)
        assert got.dtype == torch.float16
        assert error(got, x, w, lt.bias) < BOUND


def test_negative_control_shifted_scales_are_seen():
    spec = SPECS["uint4 g128 f16"]
    lt = make_layer(spec, 64, 256)
    run = bind(PlainTriton(), make_op(spec, 64, 256), [({"row": 0}, lt)])
    lt.weight.scales = (lt.weight.scales[0].roll(1, 1),)
    x = torch.randn(2, 256).half()
    assert error(run(x), x, dense_weight(lt.weight, 256)) > 0.1


def test_linear_without_rows_gives_no_rows():
    spec = SPECS["uint4 g128 f16"]
    run = bind(PlainTriton(), make_op(spec, 64, 128), [({"row": 0}, make_layer(spec, 64, 128))])
    assert run(torch.empty(2, 0, 128).half()).shape == (2, 0, 64)


def test_nan_and_infinity_reach_their_rows_only():
    spec = SPECS["uint4 g128 f16"]
    run = bind(PlainTriton(), make_op(spec, 64, 128), [({"row": 0}, make_layer(spec, 64, 128))])
    x = torch.randn(3, 128).half()
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    y = run(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


@pytest.mark.parametrize(
    "name",
    ["uint4 two-level offset", "nvfp4", "uint3 g128", "int8 channel", "uint4 inverse",
     "uint4 three factors"],
)  # fmt: skip
def test_embedding_equals_the_oracle(name):
    n, k = 72, 288
    lt = make_layer(SPECS[name], n, k)
    op = make_op(SPECS[name], n, k, op="embedding", act="float32")
    ids = torch.tensor([[0, 71], [5, 5]])
    got = bind(PlainTriton(), op, [({"row": 0}, lt)])(ids)
    assert torch.equal(got, lt.dequantize()[ids])


@pytest.mark.parametrize("name", ["uint4 g32 bf16 code", "mxfp4"])
@pytest.mark.parametrize("tokens", [0, 1, 60])
def test_experts_equal_the_oracle(name, tokens):
    n, k, e = 72, 288, 5
    parts = [({"row": 0, "expert": i}, make_layer(SPECS[name], n, k, seed=i)) for i in range(e)]
    run = bind(PlainTriton(), make_op(SPECS[name], n, k, op="grouped_linear", experts=e), parts)
    x, index = torch.randn(tokens, k).half(), torch.randint(-1, e + 1, (tokens,))
    got = run(x, index)
    assert got.shape == (tokens, n)
    for t, i in enumerate(index.tolist()):
        if 0 <= i < e:
            assert error(got[t : t + 1], x[t : t + 1], parts[i][1].dequantize()) < BOUND
        else:
            assert not got[t].any()


@pytest.mark.parametrize("kernel", [PlainTriton(), Dense()], ids=lambda k: k.name)
def test_quantized_activations_are_emulated_as_the_reference_does(kernel):
    e2m1 = SPECS["mxfp4"]
    acts = replace(e2m1, scales=(replace(e2m1.scales[0], static=False),))
    op = make_op(e2m1, 64, 256, act="float16")
    op = replace(op, operands=(*op.operands, ("input", acts)))
    lt = make_layer(e2m1, 64, 256)
    answer = kernel.accepts(op)
    assert "emulated" in answer.note
    x = torch.randn(5, 256).half()
    got = bind(kernel, op, [({"row": 0}, lt)])(x)
    assert error(got, fake_quantize(x, acts), lt.dequantize()) < BOUND
    assert error(got, x, lt.dequantize()) > 1e-2  # negative control: not rounded


def test_ops_pass_opcheck():
    spec = SPECS["uint4 g128 f16"]
    kernel, op = PlainTriton(), make_op(spec, 64, 128)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, make_layer(spec, 64, 128), {"row": 0})
    run, checks = kernel.bind(op), ("test_schema", "test_faketensor")
    args = (torch.randn(3, 128).half(), list(buffers.values()), *run.args[:2])
    torch.library.opcheck(torch.ops.quant_triton.linear, args, test_utils=checks)
    op = make_op(spec, 64, 128, op="embedding")
    text = kernel.bind(op).args[0]
    args = (torch.tensor([1, 5]), list(buffers.values()), text)
    torch.library.opcheck(torch.ops.quant_triton.embedding, args, test_utils=checks)


def test_restore_gives_the_canonical_tensors_back():
    spec = SPECS["uint4 g32 bf16 code"]
    kernel, op = PlainTriton(), make_op(spec, 72, 288)
    lt, buffers = make_layer(spec, 72, 288), kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    back = kernel.restore(buffers, op).weight
    for name, value in lt.weight.tensors().items():
        assert torch.equal(back.tensors()[name], value), name
