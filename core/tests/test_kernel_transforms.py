"""Transforms around the matmul in the reference kernels: maths, buffers, restore, refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from made_layers import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.errors import KernelError, LayoutError
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.transforms import apply_transforms, transform_features
from quant_core.parts import matrices
from quant_core.rewrites.join import same_bytes
from quant_core.spec import CHANNEL, Element, QuantSpec, Scale, Transform
from quant_core.spec_json import op_from_text, to_text
from with_input import with_input

K, N = 96, 40
FP8_TOKEN = QuantSpec(
    element=Element(name="fp8_e4m3", bits=8, kind="float"),
    scales=(Scale(element="f32", grain=CHANNEL, static=False),),
)
SMOOTH = Transform(site="input", kind="scale", key="smooth")
ROTATE = Transform(site="input", kind="matrix", key="rotate", block=32)
OUT = Transform(site="output", kind="scale", key="out", inverse=True)


def vector(k=K, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(3)
    return (torch.rand(k, generator=g) * 2 + 0.1).to(dtype)


def blocks(count=3, b=32):
    g = torch.Generator().manual_seed(4)
    return torch.randn(count, b, b, generator=g)


def layer(*transforms):
    lt = make_layer(SPECS["fp8_block"], n=N, k=K, bias=True)
    return replace(lt, transforms=transforms)


def op_of(lt, kind="linear", **sizes):
    op = make_op(kind, lt, k=K, **sizes)
    return replace(
        op,
        features=op.features | transform_features(lt.transforms),
        transforms=tuple(t for t, _ in lt.transforms),
    )


def run(lt, op, x):
    kernel = ReferenceKernel()
    assert isinstance(kernel.accepts(op), Accepted)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    return kernel.bind(op)(list(buffers.values()), x), kernel.restore(buffers, op)


X = torch.randn(7, K, generator=torch.Generator().manual_seed(5))


def dense(lt, x):
    return F.linear(x, dense_weight(lt.weight, K), lt.bias.float())


@pytest.mark.parametrize("inverse", [False, True])
def test_input_scale_is_applied_before_the_activation_is_quantized(inverse):
    v = vector()
    lt = layer((replace(SMOOTH, inverse=inverse), (v,)))
    x = X / v.float() if inverse else X * v.float()
    got, _ = run(lt, with_input(op_of(lt), FP8_TOKEN), X)
    want = dense(lt, fake_quantize(x, FP8_TOKEN))
    # same float32 products, summed in another order over K=96
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-3)
    other = fake_quantize(X, FP8_TOKEN)
    other = other / v.float() if inverse else other * v.float()
    for wrong in (dense(lt, x), dense(lt, other), dense(lt, fake_quantize(X, FP8_TOKEN))):
        assert (got - wrong).abs().max() > 1e-2  # not quantized, quantized first, not scaled


def test_blocks_of_a_matrix_and_an_output_scale_follow_the_formula():
    m, v = blocks(), vector(N, torch.float32)
    lt = layer((ROTATE, (m,)), (OUT, (v,)))
    got, _ = run(lt, op_of(lt), X)
    turned = torch.cat([X[:, 32 * i : 32 * i + 32] @ m[i] for i in range(3)], dim=1)
    want = dense(lt, turned) / v
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-2)  # two sums in another order
    assert not torch.allclose(got, dense(lt, X) / v, rtol=1e-2, atol=1e-1)


def test_one_shared_block_and_a_whole_matrix_follow_the_formula():
    shared, whole = blocks(1)[0], blocks(1, K)[0]
    got = apply_transforms(X, ((ROTATE, (shared,)),), "input")
    want = torch.cat([X[:, 32 * i : 32 * i + 32] @ shared for i in range(3)], dim=1)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)
    got = apply_transforms(X, ((replace(ROTATE, block=0), (whole,)),), "input")
    assert torch.allclose(got, X @ whole, rtol=1e-5, atol=1e-4)


def test_transforms_of_a_site_are_applied_in_order_in_float32():
    v, m = vector(dtype=torch.float32), blocks(1)[0]
    x = X.bfloat16()
    got = apply_transforms(x, ((SMOOTH, (v,)), (ROTATE, (m,))), "input")
    want = (x.float() * v).unflatten(-1, (3, 32)) @ m
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.flatten(-2).bfloat16())
    assert not torch.equal(got, apply_transforms(x, ((ROTATE, (m,)), (SMOOTH, (v,))), "input"))
    assert torch.equal(apply_transforms(x, ((OUT, (v,)),), "input"), x)


def test_restore_gives_transforms_back_exactly():
    lt = layer((SMOOTH, (vector(),)), (ROTATE, (blocks(),)), (OUT, (vector(N),)))
    op = op_of(lt)
    assert op_from_text(to_text(op)) == op  # the key of compiled graphs
    _, back = run(lt, op, X)
    assert [t for t, _ in back.transforms] == [SMOOTH, ROTATE, OUT]
    for (_, got), (_, want) in zip(back.transforms, lt.transforms, strict=True):
        assert all(map(same_bytes, got, want))


def test_more_than_ten_transforms_keep_their_order():
    many = tuple((replace(SMOOTH, key=str(i)), (torch.full((K,), i + 1.0),)) for i in range(12))
    _, back = run(layer(*many), op_of(layer(*many)), X)
    assert [v[0][0].item() for _, v in back.transforms] == [i + 1.0 for i in range(12)]


def test_each_expert_has_its_own_transform():
    kernel = ReferenceKernel()
    parts = [layer((SMOOTH, (vector() * (e + 1),))) for e in range(3)]
    parts = [replace(p, bias=None) for p in parts]
    op = with_input(op_of(parts[0], "grouped_linear", experts=3), FP8_TOKEN)
    buffers = kernel.allocate(op)
    for e, part in enumerate(parts):
        kernel.load_(buffers, op, part, {"row": 0, "expert": e})
    experts = torch.tensor([2, 0, 1, 2, 7, 0, 1])  # 7: no expert here
    got = kernel.bind(op)(list(buffers.values()), X, experts)
    for i, e in enumerate(experts.tolist()):
        if e == 7:
            assert got[i].eq(0).all()
            continue
        x = fake_quantize(X[i : i + 1] * parts[e].transforms[0][1][0].float(), FP8_TOKEN)
        want = F.linear(x, dense_weight(parts[e].weight, K))
        assert torch.allclose(got[i : i + 1], want, rtol=1e-5, atol=1e-3)
    back = dict(matrices(kernel.restore(buffers, op), 3))
    for e, part in enumerate(parts):
        (transform, values) = back[e].transforms[0]
        assert transform == SMOOTH
        assert same_bytes(values[0], part.transforms[0][1][0])


def test_part_without_the_transform_is_refused():
    lt = layer((SMOOTH, (vector(),)))
    kernel, op = ReferenceKernel(), op_of(lt)
    buffers = kernel.allocate(op)
    with pytest.raises(LayoutError) as err:
        kernel.load_(buffers, op, layer(), {"row": 0})
    assert err.value.code == "Q-LAYOUT-FUSED"
    with pytest.raises(LayoutError) as err:
        kernel.load_(buffers, op, layer((SMOOTH, (vector(48),))), {"row": 0})
    assert err.value.code == "Q-LAYOUT-FUSED" or err.value.code == "Q-LAYOUT-SHAPE"


@pytest.mark.parametrize(
    ("kind", "transform"),
    [("linear", Transform(site="input", kind="hadamard", key="h")),
     ("linear", Transform(site="q", kind="scale", key="q")), ("embedding", SMOOTH)],
)  # fmt: skip
def test_transforms_that_cannot_be_computed_are_rejected(kind, transform):
    lt = layer((transform, (vector(),)))
    answer = ReferenceKernel().accepts(op_of(lt, kind))
    assert isinstance(answer, Rejected)
    assert answer.axis == "transforms"


class Careless:
    """Accepts everything and has never heard of transforms."""

    name = "careless"

    def accepts(self, op):
        return Accepted(cost=0.0)


class OneKernel:
    def call_all(self, hook, **kw):
        return [("test", [Careless()])]


def test_kernels_that_do_not_apply_transforms_are_not_asked_to():
    lt = layer((SMOOTH, (vector(),)))
    op = op_of(lt)
    trace = {d.kernel: d for d in choose(op, OneKernel()).trace}
    assert "transforms: needs none, found scale at input" in str(trace["careless"])
    assert isinstance(trace["careless@transformed"].answer, Accepted)
    assert choose(op_of(layer()), OneKernel()).kernel.name == "careless"
    stack = replace(op, op="grouped_linear", sizes=(*op.sizes, ("experts", 2)))
    assert choose(stack, OneKernel()).kernel.name == "torch_ref"
    with pytest.raises(KernelError):
        choose(stack, OneKernel(), kernels="careless")
