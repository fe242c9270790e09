"""PyTorch's int4 op on the CPU against the reference kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.packing import pack
from quant_core.spec import CANONICAL, Element, OpSpec, QuantSpec, Scale, Zero, group
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_torch.int4_cpu import MOST_ROWS, Int4Cpu

N, K = 48, 256


def layer(element="f16", size=64, zero=None, seed=0, rows=N):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, K), dtype=torch.uint8, generator=g)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[element]
    zero = zero or Zero(kind="code")
    zeros = None
    if zero.kind == "code":
        zeros = torch.randint(0, 16, (rows, K // size), dtype=torch.uint8, generator=g)
    spec = QuantSpec(
        element=Element.uint(4), scales=(Scale(element=element, grain=group(size)),), zero=zero
    )
    qt = QuantizedTensor(
        spec=spec, shape=(rows, K), codes=pack(codes, 4, CANONICAL), zeros=zeros,
        scales=((torch.rand(rows, K // size, generator=g) * 0.1 + 0.01).to(dtype),),
    )  # fmt: skip
    return LayerTensors(operands={"weight": qt}, bias=torch.randn(rows, generator=g))


def op_of(lt, dtype="float32", n=N):
    return OpSpec(
        op="linear", operands=(("weight", lt.weight.spec),), act_dtype=dtype,
        sizes=(("n", n), ("k", K), ("k_stored", K)), features=frozenset({"bias", "bias:float32"}),
    )  # fmt: skip


def run(kernel, op, parts, x):
    buffers, row = kernel.allocate(op), 0
    for lt in parts:
        kernel.load_(buffers, op, lt, {"row": row})
        row += lt.weight.shape[0]
    return buffers, kernel.bind(op)(list(buffers.values()), x)


CONST = Zero(kind="const", value=8)


@pytest.mark.parametrize(
    ("element", "zero", "dtype", "bound"),
    [
        ("f16", None, "float32", 2e-6),
        ("bf16", Zero(kind="const", value=5), "float32", 2e-6),
        ("bf16", CONST, "bfloat16", 6e-3),  # both sides round weights to bfloat16
        ("f16", CONST, "float16", 1e-3),
    ],
)
@pytest.mark.parametrize("size", [32, 128])
def test_product_equals_the_reference_at_every_number_of_rows(element, zero, dtype, bound, size):
    lt = layer(element, size, zero)
    op = op_of(lt, dtype)
    assert isinstance(Int4Cpu().accepts(op), Accepted), Int4Cpu().accepts(op)
    for m in (0, 1, 3, MOST_ROWS, MOST_ROWS + 1, 17):
        x = torch.randn(m, K).to(getattr(torch, dtype))
        _, got = run(Int4Cpu(), op, [lt], x)
        _, want = run(ReferenceKernel(), op, [lt], x)
        assert got.shape == want.shape
        if m:
            assert (got.double() - want.double()).norm() / want.double().norm() <= bound


def test_members_loaded_one_by_one_are_packed_with_the_last():
    parts = [layer(seed=1, rows=16), layer(seed=2, rows=32)]
    op, x = op_of(parts[0]), torch.randn(2, K)
    buffers, got = run(Int4Cpu(), op, parts, x)
    _, want = run(ReferenceKernel(), op, parts, x)
    assert (got - want).norm() / want.norm() < 2e-6
    back = Int4Cpu().restore(buffers, op).weight
    assert torch.equal(back.codes, torch.cat([p.weight.codes for p in parts]))
    assert torch.equal(back.scales[0], torch.cat([p.weight.scales[0] for p in parts]))


def test_what_would_be_rounded_or_cannot_run_is_rejected():
    lt = layer("bf16", 64, CONST)
    op = op_of(lt, "bfloat16")
    cases = {
        "scales": op_of(layer("f16", 64, CONST), "bfloat16"),
        "zero": op_of(layer("bf16", 64), "bfloat16"),
        "device": replace(op, device=("cuda", "9.0")),
        "out_features": op_of(lt, "bfloat16", n=40),
        "op": replace(op, op="embedding"),
        "features": replace(op, features=frozenset({"out_scale"})),
    }
    for axis, wrong in cases.items():
        answer = Int4Cpu().accepts(wrong)
        assert isinstance(answer, Rejected)
        assert answer.axis == axis
