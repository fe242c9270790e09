"""Activations that pass two small matrices and a clipped run-time scale before the matmul."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.build import _features
from quant_core.errors import LayoutError
from quant_core.kernels.activations import fake_quantize, static_shape
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.transforms import apply_transforms
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, Transform
from quant_core.tensors import LayerTensors, QuantizedTensor

L, R, N, T = 4, 6, 5, 3
KRON = Transform(site="input", kind="kron", key="flat")
DYNAMIC = Scale(element="f32", grain=CHANNEL, static=False)
CLIP = Scale(element="f32", grain=TENSOR)
INPUT = QuantSpec(element=Element.int(4), scales=(DYNAMIC, CLIP))


def data(seed=0):
    rng = torch.Generator().manual_seed(seed)
    left, right = torch.randn(L, L, generator=rng), torch.randn(R, R, generator=rng)
    return torch.randn(T, L * R, generator=rng), left, right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kron_is_the_product_with_the_kronecker_matrix(dtype):
    x, left, right = data()
    x = x.to(dtype)
    want = x.double() @ torch.kron(left.double(), right.double())
    got = apply_transforms(x, ((KRON, (left, right)),), "input")
    assert got.dtype == dtype
    # K sums of products of order 1
    assert (got - want).abs().max() <= 64 * torch.finfo(dtype).eps


def test_kron_with_left_not_transposed_differs():
    x, left, right = data()
    got = apply_transforms(x, ((KRON, (left, right)),), "input")
    other = apply_transforms(x, ((KRON, (left.mT, right)),), "input")
    assert (got - other).abs().max() > 0.1


@pytest.mark.parametrize("ratio", [1.0, 0.75])
def test_scale_of_a_token_is_clipped_by_the_stored_factor(ratio):
    x = torch.tensor([[7.0, -3.0, 0.4, 5.3], [0.7, 0.0, -0.1, 0.35], [0.0] * 4])
    got = fake_quantize(x, INPUT, torch.tensor([ratio]))
    for token, out in zip(x.tolist(), got.tolist()):
        s = max(abs(v) for v in token) * ratio / 7
        want = [max(-8, min(7, round(v / s))) * s if s else 0.0 for v in token]
        assert out == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_clip_without_its_tensor_is_an_error():
    with pytest.raises(LayoutError, match="input_scale is absent"):
        fake_quantize(torch.ones(1, 4), INPUT)


def make_layer():
    x, left, right = data()
    rng = torch.Generator().manual_seed(9)
    weight = QuantizedTensor(
        spec=QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),)),
        shape=(N, L * R),
        codes=torch.randint(0, 256, (N, L * R), generator=rng, dtype=torch.uint8),
        scales=(torch.rand(N, 1, generator=rng) * 0.01,),
    )
    lt = LayerTensors(
        operands={"weight": weight},
        input_scale=torch.tensor([0.9]),
        transforms=((KRON, (left, right)),),
    )
    op = OpSpec(
        op="linear",
        operands=(("weight", weight.spec), ("input", INPUT)),
        sizes=(("n", N), ("k", L * R), ("k_stored", L * R)),
        act_dtype="float32",
        features=_features(lt),
        transforms=(KRON,),
    )
    return x, lt, op


def test_reference_kernel_transforms_then_rounds_then_multiplies():
    x, lt, op = make_layer()
    kernel = ReferenceKernel()
    assert isinstance(kernel.accepts(op), Accepted)
    assert set(static_shape(op)) == {"input_scale"}
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    got = kernel.bind(op)(list(buffers.values()), x)
    moved = apply_transforms(x, lt.transforms, "input")
    want = fake_quantize(moved, INPUT, lt.input_scale) @ lt.dequantize().T
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
    plain = x @ lt.dequantize().T
    assert (got - plain).abs().max() > 0.1
    back = kernel.restore(buffers, op)
    assert back.transforms[0][0] == KRON
    assert all(map(torch.equal, back.transforms[0][1], lt.transforms[0][1]))
    assert torch.equal(back.input_scale, lt.input_scale)


def test_two_float_scales_of_another_kind_are_rejected():
    _, _, op = make_layer()
    for coarse in (replace(CLIP, inverse=True), replace(CLIP, static=False)):
        spec = replace(INPUT, scales=(DYNAMIC, coarse))
        answer = ReferenceKernel().accepts(replace(op, operands=(op.operands[0], ("input", spec))))
        assert isinstance(answer, Rejected)
        assert answer.axis == "input"
