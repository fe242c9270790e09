"""PyTorch's products against the reference kernel; on CPU, where torch has the same ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from made_layers import SPECS, make_layer
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.packing import pack
from quant_core.parts import matrices
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_torch import dense
from quant_kernels_torch.codes import group_codes, row_codes
from quant_kernels_torch.kernels import KERNELS, BlockFp8, Dequant, Fp8, GroupedFp8, Int8

FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
ROWS = (0, 1, 2, 7, 16, 17, 33, 64)


class HereDequant(Dequant):
    DEVICES = ("cuda", "cpu")


class HereFp8(Fp8):
    DEVICES = ("cuda", "cpu")


def scale(element, grain, **kw):
    return Scale(element=element, grain=grain, **kw)


def token(element):
    return QuantSpec(element=element, scales=(scale("f32", CHANNEL, static=False),))


def random_layer(spec, n, k, *, seed=0, bias=False):
    """Canonical tensors of any spec, drawn so that no code or scale is NaN."""
    g = torch.Generator().manual_seed(seed)
    high = 1 << spec.element.bits
    codes = torch.randint(0, high, (n, k), dtype=torch.uint8, generator=g)
    if spec.element.name == "fp8_e4m3":
        codes[(codes & 127) == 127] = 0
    levels = spec.zero.levels if spec.zero is not None else ()

    def grid(s):
        r, c = s.grain
        shape = (-(-n // r) if r else 1, -(-k // c) if c else 1)
        if s.element == "e8m0":
            return torch.randint(120, 128, shape, dtype=torch.uint8, generator=g)
        if s.element == "fp8_e4m3":
            return torch.randint(40, 80, shape, dtype=torch.uint8, generator=g)
        if s.element == "uint6":
            return torch.randint(1, 64, shape, dtype=torch.uint8, generator=g)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[s.element]
        return (torch.rand(shape, generator=g) * 0.1 + 0.01).to(dtype)

    zeros = None
    if spec.zero is not None and spec.zero.kind == "code":
        shape = grid(spec.scales[0]).shape
        zeros = torch.randint(0, high, shape, dtype=torch.uint8, generator=g)
    gather = None
    if spec.gather:
        gather = torch.randperm(k, generator=g).int()
        gather[-3:] = -1
    qt = QuantizedTensor(
        spec=spec, shape=(n, k), codes=pack(codes, spec.element.bits, CANONICAL),
        scales=tuple(grid(s) for s in spec.scales), zeros=zeros,
        offset=tuple(grid(s) for s in levels), gather=gather,
    )  # fmt: skip
    b = torch.randn(n, generator=g) if bias else None
    return LayerTensors(operands={"weight": qt}, bias=b)


def op_of(lt, *, kind="linear", acts=None, dtype="float32", features=(), **sizes):
    qt = lt.weight
    names = set(features)
    names |= {"bias", "bias:float32"} if lt.bias is not None else set()
    names |= {"gather"} if qt.spec.gather else set()
    n, k = qt.shape[-2:]
    return OpSpec(
        op=kind,
        operands=(("weight", qt.spec), *((("input", acts),) if acts else ())),
        sizes=(("n", n), ("k", k), ("k_stored", k), *sizes.items()),
        act_dtype=dtype,
        features=frozenset(names),
    )


def loaded(kernel, op, parts):
    buffers = kernel.allocate(op)
    for e, lt in enumerate(parts):
        at = {"row": 0, "expert": e} if "experts" in dict(op.sizes) else {"row": 0}
        kernel.load_(buffers, op, lt, at)
    return buffers


def both(kernel, op, parts, *inputs):
    """(what the kernel gives, what the reference gives)."""
    out = []
    for k in (kernel, ReferenceKernel()):
        buffers = loaded(k, op, parts)
        out.append(k.bind(op)(list(buffers.values()), *inputs))
    return out


def assert_close(got, want, bound):
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error <= bound


# ------------------------------------------------------------------------------- dequantize once

DENSE = {
    "uint4 code zero": QuantSpec(
        element=Element.uint(4), scales=(scale("f16", group(64)),), zero=Zero(kind="code")
    ),
    "uint2 const": QuantSpec(
        element=Element.uint(2), scales=(scale("bf16", group(32)),),
        zero=Zero(kind="const", value=2),
    ),
    "uint3 channel": QuantSpec(
        element=Element.uint(3), scales=(scale("f32", CHANNEL),), zero=Zero(kind="const", value=4)
    ),
    "two levels, offset": QuantSpec(
        element=Element.uint(4),
        scales=(scale("uint6", group(32)), scale("f16", group(128))),
        zero=Zero(
            kind="offset", levels=(scale("uint6", group(32)), scale("f16", group(128)))
        ),
    ),
    "int8 channel": QuantSpec(element=Element.int(8), scales=(scale("f32", CHANNEL),)),
    "fp8 tensor": QuantSpec(element=FP8, scales=(scale("f32", TENSOR),)),
    "fp8 block": QuantSpec(element=FP8, scales=(scale("f32", block(128, 128)),)),
    "mxfp4": QuantSpec(element=FP4, scales=(scale("e8m0", group(32)),)),
    "nvfp4": QuantSpec(
        element=FP4, scales=(scale("fp8_e4m3", group(16)), scale("f32", TENSOR))
    ),
    "gather": QuantSpec(
        element=Element.uint(4), scales=(scale("f16", group(64)),), zero=Zero(kind="code"),
        gather=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("n", "k"), [(80, 192), (200, 256)])
def test_dequantize_once_equals_the_reference(monkeypatch, name, n, k):
    monkeypatch.setattr(dense, "BLOCK_WEIGHTS", 64 * k)  # several blocks of rows
    lt = random_layer(DENSE[name], n, k, bias=True)
    op = op_of(lt)
    kernel = HereDequant()
    assert isinstance(kernel.accepts(op), Accepted), kernel.accepts(op)
    for m in ROWS:
        got, want = both(kernel, op, [lt], torch.randn(m, k))
        assert_close(got, want, 1e-6)  # the same arithmetic, another order of sums


def test_dequantize_once_in_bfloat16_rounds_each_weight_once():
    lt = random_layer(DENSE["uint4 code zero"], 96, 256)
    got, want = both(
        HereDequant(), op_of(lt, dtype="bfloat16"), [lt], torch.randn(33, 256).bfloat16()
    )
    assert_close(got, want, 4e-3)


def test_dequantize_once_emulates_quantized_activations():
    lt = random_layer(DENSE["mxfp4"], 64, 128)
    acts = QuantSpec(element=FP4, scales=(scale("e8m0", group(32), static=False),))
    op, x = op_of(lt, acts=acts), torch.randn(5, 128)
    got, want = both(HereDequant(), op, [lt], x)
    assert_close(got, want, 1e-6)
    plain = ReferenceKernel()
    floats = op_of(lt)
    unrounded = plain.bind(floats)(list(loaded(plain, floats, [lt]).values()), x)
    assert (unrounded - got).norm() / got.norm() > 0.02  # the rounding of x shows


def test_dequantize_once_gives_the_canonical_tensors_back():
    lt = random_layer(DENSE["two levels, offset"], 72, 160, bias=True)
    op, kernel = op_of(lt), HereDequant()
    back = kernel.restore(loaded(kernel, op, [lt]), op)
    for name, value in lt.weight.tensors().items():
        assert torch.equal(back.weight.tensors()[name], value)


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_dequantized_experts_equal_the_reference(monkeypatch, at_once):
    n, k = 64, 128
    monkeypatch.setattr(dense, "EXPERT_BYTES", at_once * n * k * 2)
    parts = [random_layer(DENSE["uint4 code zero"], n, k, seed=s, bias=True) for s in range(4)]
    op = op_of(parts[0], kind="grouped_linear", dtype="bfloat16", experts=4)
    experts = torch.tensor([3, 0, 7, 2, 2, -1, 0, 3, 3])  # expert 1 idle; 7 and -1 are nobody
    got, want = both(HereDequant(), op, parts, torch.randn(9, k).bfloat16(), experts)
    assert_close(got, want, 5e-3)
    assert not got[[2, 5]].any()


@pytest.mark.parametrize("name", ["uint4 code zero", "uint3 channel", "nvfp4", "int8 channel"])
def test_dequantized_embedding_rows_equal_the_reference(name):
    lt = random_layer(DENSE[name], 100, 64)
    op = op_of(lt, kind="embedding", dtype="float16")
    got, want = both(HereDequant(), op, [lt], torch.tensor([[0, 99, 17], [64, 1, 50]]))
    assert torch.equal(got, want)


# ---------------------------------------------------------------------------------- fp8 and int8

WEIGHTS = {
    "row": QuantSpec(element=FP8, scales=(scale("f32", CHANNEL),)),
    "row bf16": QuantSpec(element=FP8, scales=(scale("bf16", CHANNEL),)),
    "tensor": QuantSpec(element=FP8, scales=(scale("f32", TENSOR),)),
}
INPUTS = {
    "token": token(FP8),
    "tensor": QuantSpec(element=FP8, scales=(scale("f32", TENSOR, static=False),)),
    "stored": QuantSpec(element=FP8, scales=(scale("f32", TENSOR),)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("acts", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_fp8_product_equals_the_reference(weight, acts, dtype):
    lt = random_layer(WEIGHTS[weight], 48, 96, bias=True)
    features = ()
    if acts == "stored":
        lt.input_scale, features = torch.tensor([0.01]), ("input_scale",)
    op = op_of(lt, acts=INPUTS[acts], dtype=dtype, features=features)
    assert isinstance(HereFp8().accepts(op), Accepted), HereFp8().accepts(op)
    for m in ROWS:
        x = torch.randn(m, 96).to(getattr(torch, dtype))
        got, want = both(HereFp8(), op, [lt], x)
        assert_close(got, want, 1e-5 if dtype == "float32" else 5e-3)


W8 = {
    "row": QuantSpec(element=Element.int(8), scales=(scale("f32", CHANNEL),)),
    "tensor": QuantSpec(element=Element.int(8), scales=(scale("bf16", TENSOR),)),
}
A8 = {
    "token": token(Element.int(8)),
    "tensor": QuantSpec(element=Element.int(8), scales=(scale("f32", TENSOR, static=False),)),
    "stored": QuantSpec(element=Element.int(8), scales=(scale("f32", TENSOR),)),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("acts", A8)
@pytest.mark.parametrize("weight", W8)
def test_int8_product_equals_the_reference(weight, acts, dtype):
    lt = random_layer(W8[weight], 40, 96, bias=True)
    features = ()
    if acts == "stored":
        lt.input_scale, features = torch.tensor([0.02]), ("input_scale",)
    op = op_of(lt, acts=A8[acts], dtype=dtype, features=features)
    assert isinstance(Int8().accepts(op), Accepted), Int8().accepts(op)
    for m in ROWS:
        x = torch.randn(m, 96).to(getattr(torch, dtype))
        got, want = both(Int8(), op, [lt], x)
        # the reference rounds activations and weights to bfloat16 before it multiplies
        assert_close(got, want, 1e-6 if dtype == "float32" else 6e-3)


def test_int8_product_with_one_combined_scale_is_the_reference_exactly():
    lt = random_layer(W8["row"], 40, 96)
    lt.acc_bias = torch.randint(-1000, 1000, (40,), dtype=torch.int32)
    lt.out_scale = torch.rand(40) * 1e-3
    lt.input_scale, lt.input_zero = torch.tensor([0.02]), torch.tensor([3], dtype=torch.uint8)
    spec = QuantSpec(
        element=Element.int(8), scales=(scale("f32", TENSOR),),
        zero=Zero(kind="code", element="int8"),
    )  # fmt: skip
    features = ("acc_bias", "out_scale", "input_scale", "input_zero")
    op = op_of(lt, acts=spec, features=features)
    assert isinstance(Int8().accepts(op), Accepted), Int8().accepts(op)
    got, want = both(Int8(), op, [lt], torch.randn(7, 96))
    assert_close(got, want, 1e-7)


@pytest.mark.parametrize("element", [FP8, Element.int(8)])
def test_codes_times_scale_are_the_oracles_rounded_activations(element):
    x = torch.randn(9, 256) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    for grain in (CHANNEL, TENSOR):
        spec = QuantSpec(element=element, scales=(scale("f32", grain, static=False),))
        codes, s = row_codes(x, spec, None)
        assert torch.equal(codes.float() * s, fake_quantize(x, spec))
    if element is FP8:
        spec = QuantSpec(element=FP8, scales=(scale("f32", group(128), static=False),))
        codes, s = group_codes(x, spec, 128)
        whole = codes.float() * s.repeat_interleave(128, dim=1)
        assert torch.equal(whole, fake_quantize(x, spec))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["fp8", "int8"])
@pytest.mark.parametrize("acts", ["token", "stored"])
def test_nan_and_infinity_stay_in_their_token(bad, which, acts):
    kernel, spec, inputs = {
        "fp8": (HereFp8(), WEIGHTS["row"], INPUTS),
        "int8": (Int8(), W8["row"], A8),
    }[which]
    lt = random_layer(spec, 32, 64)
    features = ()
    if acts == "stored":
        lt.input_scale, features = torch.tensor([0.02]), ("input_scale",)
    op = op_of(lt, acts=inputs[acts], dtype="bfloat16", features=features)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = bad
    y = kernel.bind(op)(list(loaded(kernel, op, [lt]).values()), x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_weights_with_swapped_scales_are_noticed():
    """Negative control of the comparison above."""
    lt = random_layer(W8["row"], 40, 96)
    op, x = op_of(lt, acts=A8["token"]), torch.randn(4, 96)
    buffers = loaded(Int8(), op, [lt])
    buffers["scales_0"] = buffers["scales_0"].flip(0)
    got = Int8().bind(op)(list(buffers.values()), x)
    _, want = both(Int8(), op, [lt], x)
    assert (got - want).norm() / want.norm() > 0.1


# -------------------------------------------------------------------------------------- refusals


def _fp8_op(n=128, k=128, **changes):
    lt = random_layer(WEIGHTS["row"], n, k)
    return replace(op_of(lt, acts=INPUTS["token"], dtype="bfloat16"), **changes)


CUDA = ("cuda", "9.0")


@pytest.mark.parametrize(
    ("kernel", "op", "axis"),
    [
        (Dequant(), op_of(make_layer(SPECS["uint4_code"])), "device"),
        (Fp8(), _fp8_op(), "device"),
        (Fp8(), _fp8_op(n=40, device=CUDA), "out_features"),
        (Fp8(), _fp8_op(device=("cuda", "8.0")), "device"),
        (Fp8(), _fp8_op(device=CUDA, operands=_fp8_op().operands[:1]), "operands"),
        (Int8(), _fp8_op(device=CUDA), "element"),
        (BlockFp8(), _fp8_op(device=CUDA), "input"),
        (GroupedFp8(), _fp8_op(device=CUDA), "op"),
        (Fp8(), _fp8_op(device=CUDA, features=frozenset({"out_scale"})), "features"),
        (Fp8(), _fp8_op(device=CUDA, features=frozenset({"input_scale"})), "features"),
    ],
)
def test_what_cannot_run_is_rejected_by_name(kernel, op, axis):
    answer = kernel.accepts(op)
    assert isinstance(answer, Rejected)
    assert answer.axis == axis
    assert answer.have
    assert answer.need


def test_accepted_on_a_hopper_with_costs_for_any_number_of_rows():
    block_spec = QuantSpec(element=FP8, scales=(scale("f32", block(128, 128)),))
    acts = QuantSpec(element=FP8, scales=(scale("f32", group(128), static=False),))
    blocked = op_of(random_layer(block_spec, 128, 256), acts=acts, dtype="bfloat16")
    stack = replace(_fp8_op(), op="grouped_linear", sizes=(*_fp8_op().sizes, ("experts", 4)))
    for kernel, op in ((Fp8(), _fp8_op()), (BlockFp8(), blocked), (GroupedFp8(), stack)):
        answer = kernel.accepts(replace(op, device=CUDA))
        assert isinstance(answer, Accepted), answer
        assert answer.costs[-1][0] == ANY_ROWS
        costs = [c for _, c in answer.costs]
        assert costs == sorted(costs)


def test_experts_cost_as_many_matrices_as_the_rows_can_reach():
    def cost(experts: int, rows: int) -> float:
        sizes = (("n", 4096), ("k", 4096), ("experts", experts))
        stack = replace(_fp8_op(device=CUDA), op="grouped_linear", sizes=sizes)
        answer = GroupedFp8().accepts(stack)
        assert isinstance(answer, Accepted), answer
        return answer.cost_at(rows)

    assert cost(64, 64) > 4 * cost(1, 64)
    assert cost(64, 1) == cost(1, 1)


def test_every_kernel_restores_what_it_was_given():
    for kernel, spec, acts in (
        (HereFp8(), WEIGHTS["row"], token(FP8)),
        (Int8(), W8["row"], A8["token"]),
    ):
        lt = random_layer(spec, 48, 96, bias=True)
        op = op_of(lt, acts=acts)
        back = kernel.restore(loaded(kernel, op, [lt]), op)
        for name, value in lt.weight.tensors().items():
            assert torch.equal(back.weight.tensors()[name], value)
    assert len({k.name for k in KERNELS}) == len(KERNELS)
    assert next(iter(matrices(back, 0)))[0] is None


@pytest.mark.parametrize("which", ["fp8", "int8", "dequant"])
def test_ops_trace_as_one_node_each(which):
    kernel, spec, acts = {
        "fp8": (HereFp8(), WEIGHTS["row"], INPUTS["token"]),
        "int8": (Int8(), W8["row"], A8["token"]),
        "dequant": (HereDequant(), DENSE["mxfp4"], None),
    }[which]
    lt = random_layer(spec, 64, 128)
    op = op_of(lt, acts=acts, dtype="bfloat16")
    values, run = list(loaded(kernel, op, [lt]).values()), kernel.bind(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(values, x), backend="eager", fullgraph=True)
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(compiled(x), run(values, x))
