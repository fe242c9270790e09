"""The kernels on an emulation of torch_npu's operators, against the reference kernel.

The reference runs the same layer on the same activations in float32; results are float16 or
bfloat16, so one unit of their last place is the bound.
"""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace

import fake_torch_npu
import pytest
import torch
from torch import Tensor

from quant_core.errors import KernelError, LayoutError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.reference import ReferenceKernel
from quant_core.packing import pack
from quant_core.registry import registry
from quant_core.spec import (
    CANONICAL,
    CHANNEL,
    TENSOR,
    Element,
    OpSpec,
    QuantSpec,
    Scale,
    Transform,
    Zero,
    group,
)
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_kernels_npu.kernel import KERNELS

BY_NAME = {k.name: k for k in KERNELS}
PER_TOKEN = {b: QuantSpec(element=Element.int(b), scales=(
    Scale(element="f32", grain=CHANNEL, static=False),)) for b in (4, 8)}  # fmt: skip
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
MX = QuantSpec(element=FP8, scales=(Scale(element="e8m0", grain=group(32)),))
MX_INPUT = QuantSpec(
    element=FP8, scales=(Scale(element="e8m0", grain=group(32), static=False, rule="floor"),)
)
STATIC = QuantSpec(
    element=Element.int(8),
    scales=(Scale(element="f32", grain=TENSOR),),
    zero=Zero(kind="code", element="int8"),
)
N, K, M = 40, 192, 5
LAST_PLACE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ELEMENT = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _integer(
    bits: int, *, zero: str = "const", size: int = 0, scale=torch.float32, n: int = N, k: int = K
) -> QuantizedTensor:
    """Random integer weights: ``zero`` "none" (two's complement), "const" or "code"."""
    raw = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    kind = {"none": None, "const": Zero(kind="const", value=1 << (bits - 1))}
    kind["code"] = Zero(kind="code", element=f"uint{bits}")
    groups = k // size if size else 1
    scales = (torch.rand(n, groups) * 0.02 + 0.001).to(scale)
    spec = QuantSpec(
        element=Element.int(bits) if zero == "none" else Element.uint(bits),
        scales=(Scale(element=ELEMENT[scale], grain=group(size) if size else CHANNEL),),
        zero=kind[zero],
    )
    zeros = torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8) if zero == "code" else None
    codes = raw if bits == 8 else pack(raw, bits, CANONICAL)
    return QuantizedTensor(spec=spec, shape=(n, k), codes=codes, scales=(scales,), zeros=zeros)


def _mx(n: int = N, k: int = K) -> QuantizedTensor:
    codes = torch.randn(n, k).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.randint(115, 125, (n, k // 32), dtype=torch.uint8)
    return QuantizedTensor(spec=MX, shape=(n, k), codes=codes, scales=(scales,))


def _op(lt: LayerTensors, acts: QuantSpec | None, dtype: torch.dtype, **changes) -> OpSpec:
    n, k = lt.weight.shape[-2:]
    features = {f for f in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
                if getattr(lt, f) is not None}  # fmt: skip
    if lt.bias is not None:
        features.add(f"bias:{str(lt.bias.dtype).removeprefix('torch.')}")
    op = OpSpec(
        op="linear",
        operands=(("weight", lt.weight.spec), *((("input", acts),) if acts else ())),
        sizes=(("n", n), ("k", k), ("k_stored", k)),
        act_dtype=str(dtype).removeprefix("torch."),
        device=("npu", ""),
        features=frozenset(features),
    )
    return replace(op, **changes)


def _reference(op: OpSpec, parts: list[LayerTensors], *inputs: Tensor) -> Tensor:
    kernel = ReferenceKernel()
    op = replace(op, act_dtype="float32", device=("cpu", ""))
    buffers = kernel.allocate(op)
    for i, lt in enumerate(parts):
        at = {"row": 0, "expert": i} if op.op == "grouped_linear" else {"row": 0}
        kernel.load_(buffers, op, lt, at)
    x, *rest = inputs
    return kernel.bind(op)(list(buffers.values()), x.float(), *rest)


def _held(name: str, op: OpSpec, parts: list[LayerTensors]) -> dict[str, Tensor]:
    kernel = BY_NAME[name]
    assert isinstance(kernel.accepts(op), Accepted), kernel.accepts(op)
    buffers = kernel.allocate(op)
    for i, lt in enumerate(parts):
        at = {"row": 0, "expert": i} if op.op == "grouped_linear" else {"row": 0}
        kernel.load_(buffers, op, lt, at)
    return buffers


def _layer(qt: QuantizedTensor, **sides) -> LayerTensors:
    return LayerTensors(operands={"weight": qt}, **sides)


def _static(qt: QuantizedTensor) -> LayerTensors:
    return _layer(
        qt,
        acc_bias=torch.randint(-5000, 5000, (N,), dtype=torch.int32),
        out_scale=qt.scales[0].view(-1).float() * 0.03,
        input_scale=torch.tensor([0.03]),
        input_zero=torch.tensor([-7], dtype=torch.int8).view(torch.uint8),
    )


HALVES = (torch.bfloat16, torch.float16)
CASES = [
    pytest.param(name, make, acts, dtype, id=f"{name}-{label}-{str(dtype)[6:]}")
    for dtype in HALVES
    for name, label, make, acts in (
        ("npu_int8", "int8", lambda d: _layer(_integer(8, zero="none")), PER_TOKEN[8]),
        ("npu_int8", "uint8", lambda d: _layer(_integer(8), bias=torch.randn(N)), PER_TOKEN[8]),
        ("npu_int8", "int4", lambda d: _layer(_integer(4, scale=torch.bfloat16)), PER_TOKEN[8]),
        ("npu_int8", "static", lambda d: _static(_integer(8, zero="none")), STATIC),
        ("npu_int4", "int4", lambda d: _layer(_integer(4), bias=torch.randn(N)), PER_TOKEN[4]),
        ("npu_weight_only", "row", lambda d: _layer(_integer(8, zero="none", scale=d)), None),
        ("npu_weight_only", "group", lambda d: _layer(_integer(4, size=64, scale=d)), None),
        (
            "npu_weight_only", "zeros",
            lambda d: _layer(_integer(4, zero="code", size=32, scale=d), bias=torch.randn(N)), None,
        ),
        (
            "npu_weight_only", "zeros8",
            lambda d: _layer(_integer(8, zero="code", scale=d), bias=torch.randn(N).to(d)), None,
        ),
        ("npu_mxfp8", "mx", lambda d: _layer(_mx(), bias=torch.randn(N)), MX_INPUT),
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "acts", "dtype"), CASES)
def test_results_are_the_references(npu, name, make, acts, dtype):
    lt = make(dtype)
    op = _op(lt, acts, dtype)
    buffers = _held(name, op, [lt])
    run = BY_NAME[name].bind(op)
    x = (torch.randn(2, M, K) * torch.rand(2, M, 1) * 5).to(dtype)
    x[0, 0] = 0  # a token of zeros
    got, want = run(list(buffers.values()), x), _reference(op, [lt], x)
    assert got.dtype == dtype
    assert got.shape == (2, M, N)
    bound = LAST_PLACE[dtype] * want.abs() + 1e-6 * want.abs().max()
    if name == "npu_int4":  # the product passes through float16 before the bias is added
        bound += 2.0**-11 * (want.abs() + lt.bias.abs().max())
    if name == "npu_weight_only" and lt.bias is not None:  # the operator takes a float16 bias
        bound += 2.0**-11 * lt.bias.float().abs() * (dtype == torch.float16)
    assert ((got.float() - want).abs() <= bound).all()
    assert npu.calls
    off = _reference(op, [lt], x * 1.02)  # negative control
    assert ((off - want).abs() > bound).any()


@pytest.mark.parametrize(("name", "make", "acts", "dtype"), CASES)
def test_restore_gives_back_every_bit(npu, name, make, acts, dtype):
    lt = make(dtype)
    op = _op(lt, acts, dtype)
    back = BY_NAME[name].restore(_held(name, op, [lt]), op)
    want, got = lt.weight.tensors(), back.weight.tensors()
    assert want.keys() == got.keys()
    for key in want:
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (want[key], got[key]))), key
    assert back.weight.spec == lt.weight.spec
    for side in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero"):
        a, b = getattr(lt, side), getattr(back, side)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_of_a_fused_layer_land_in_their_rows(npu, bits):
    whole = _integer(bits)
    parts = [
        replace(
            whole, shape=(stop - start, K), codes=whole.codes[start:stop],
            scales=(whole.scales[0][start:stop],),
        )
        for start, stop in ((0, 24), (24, N))
    ]  # fmt: skip
    acts = PER_TOKEN[bits]
    kernel = BY_NAME[f"npu_int{bits}"]
    op = _op(_layer(whole), acts, torch.float16)
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, _layer(parts[1]), {"row": 24})
    kernel.load_(buffers, op, _layer(parts[0]), {"row": 0})
    assert torch.equal(kernel.restore(buffers, op).weight.codes, whole.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_the_references(npu, bits):
    experts = [_layer(_integer(bits)) for _ in range(3)]
    op = _op(experts[0], PER_TOKEN[8], torch.bfloat16)
    op = replace(op, op="grouped_linear", sizes=(*op.sizes, ("experts", 3)))
    buffers = _held("npu_int8", op, experts)
    x = torch.randn(9, K).bfloat16()
    index = torch.tensor([2, 0, 0, 3, 2, -1, 2, 0, 2])  # none for 1; 3 and -1 are no expert of ours
    got = BY_NAME["npu_int8"].bind(op)(list(buffers.values()), x, index)
    want = _reference(op, experts, x, index)
    assert ((got.float() - want).abs() <= 2.0**-8 * want.abs()).all()
    assert (got[[3, 5]] == 0).all()
    assert "npu_grouped_matmul" in npu.calls
    back = BY_NAME["npu_int8"].restore(buffers, op).weight
    assert all(torch.equal(back.codes[i], e.weight.codes) for i, e in enumerate(experts))
    nobody = BY_NAME["npu_int8"].bind(op)(list(buffers.values()), x[:0], index[:0])
    assert nobody.shape == (0, N)


def test_scales_of_another_type_multiply_the_result(npu):
    """float32 scales of rows, bfloat16 model: the codes' products are scaled, not rounded scales
    used, which would be off by more than the result's last place."""
    lt = _layer(_integer(8, zero="none"))
    op = _op(lt, None, torch.bfloat16)
    answer = BY_NAME["npu_weight_only"].accepts(op)
    assert answer.exact
    buffers = _held("npu_weight_only", op, [lt])
    x = torch.randn(M, K).bfloat16()
    got = BY_NAME["npu_weight_only"].bind(op)(list(buffers.values()), x)
    want = _reference(op, [lt], x)
    assert ((got.float() - want).abs() <= 2 * 2.0**-8 * want.abs() + 1e-6).all()


def test_inexact_kernels_say_how_and_rank_behind_the_reference(npu):
    away = replace(MX_INPUT, ties="away")
    cases = {
        "npu_mxfp8": (_op(_layer(_mx()), away, torch.bfloat16), "halfway"),
        "npu_int4": (_op(_layer(_integer(4)), PER_TOKEN[4], torch.bfloat16), "through float16"),
        "npu_weight_only": (_op(_layer(_integer(4, size=64)), None, torch.bfloat16), "rounded to"),
    }
    for name, (op, note) in cases.items():
        answer = BY_NAME[name].accepts(op)
        assert not answer.exact
        assert note in answer.note
        # int4 activations: the weights' kernel behind an exact rounding of x
        first = "npu_weight_only@rounded" if name == "npu_int4" else "torch_ref"
        assert choose(op, registry()).kernel.name == first
        assert choose(op, registry(), kernels=name).kernel.name == name


def test_chosen_on_an_npu_where_exact(npu):
    op = _op(_layer(_integer(8, zero="none")), PER_TOKEN[8], torch.bfloat16)
    assert choose(op, registry()).kernel.name == "npu_int8"
    assert choose(replace(op, device=("cpu", "")), registry()).kernel.name != "npu_int8"


# ---------------------------------------------------------------------------------------- refusals


def test_elsewhere_it_is_not_offered(monkeypatch):
    """Without torch_npu nothing is imported on a CPU, and an NPU gets the reason."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    op = _op(_layer(_integer(8, zero="none")), PER_TOKEN[8], torch.bfloat16)
    for kernel in KERNELS:
        on_cpu = kernel.accepts(replace(op, device=("cpu", "")))
        assert (on_cpu.axis, on_cpu.need) == ("device", "npu")
    answer = BY_NAME["npu_int8"].accepts(op)
    assert isinstance(answer, Rejected)
    assert answer.axis == "torch_npu"


def test_an_old_torch_npu_is_named(npu, monkeypatch):
    monkeypatch.delattr(npu, "npu_dynamic_mx_quant")
    answer = BY_NAME["npu_mxfp8"].accepts(_op(_layer(_mx()), MX_INPUT, torch.bfloat16))
    assert str(answer) == (
        "torch_npu: needs a version that has them, found 7.2.0.emulated without "
        "npu_dynamic_mx_quant"
    )


def _rejections():
    int8 = _op(_layer(_integer(8, zero="none")), PER_TOKEN[8], torch.bfloat16)
    scale = int8.weight.scales[0]
    peak = replace(PER_TOKEN[8].scales[0], peak=127.5)
    floor = replace(MX_INPUT.scales[0], rule="even")
    yield "act_dtype", replace(int8, act_dtype="float32")
    yield "op", replace(int8, op="embedding")
    yield "sizes", replace(int8, sizes=(("n", 70000), ("k", K), ("k_stored", K)))
    yield "gather", replace(int8, sizes=(("n", N), ("k", K), ("k_stored", K + 1)))
    yield "packing", replace(int8, packing=replace(CANONICAL, word="int32"))
    yield "element", _with(int8, weight=replace(int8.weight, element=Element.int(3)))
    yield "scales", _with(int8, weight=replace(int8.weight, scales=(scale, scale)))
    yield "scales", _with(int8, weight=replace(int8.weight, scales=(replace(scale, inverse=True),)))
    odd_zero = replace(_integer(4).spec, zero=Zero(kind="const", value=7))
    yield "zero", _with(_op(_layer(_integer(4)), None, torch.bfloat16), weight=odd_zero)
    yield "input", _with(int8, input=replace(PER_TOKEN[8], scales=(peak,)))
    yield "input", _with(int8, input=replace(PER_TOKEN[8], ties="away"))
    yield "input", _with(int8, input=STATIC)  # without its output scale
    yield (
        "weight",
        _with(int8, weight=replace(int8.weight, scales=(replace(scale, grain=group(32)),))),
    )
    yield "input", _with(_op(_layer(_mx()), MX_INPUT, torch.bfloat16),
                         input=replace(MX_INPUT, scales=(floor,)))  # fmt: skip
    yield "weight", _op(_layer(_mx(k=96)), MX_INPUT, torch.bfloat16)
    yield "features", replace(int8, features=frozenset({"surprise"}))


def _with(op: OpSpec, **operands: QuantSpec) -> OpSpec:
    return replace(op, operands=tuple({**dict(op.operands), **operands}.items()))


REJECTED = list(_rejections())


@pytest.mark.parametrize(
    ("axis", "op"), REJECTED, ids=[f"{i}-{a}" for i, (a, _) in enumerate(REJECTED)]
)
def test_what_the_operators_cannot_run_is_rejected_with_its_reason(npu, axis, op):
    answers = [k.accepts(op) for k in KERNELS]
    assert all(isinstance(a, Rejected) for a in answers)
    assert axis in {a.axis for a in answers}


def test_transforms_are_left_to_others(npu):
    op = _op(_layer(_integer(8, zero="none")), PER_TOKEN[8], torch.bfloat16)
    op = replace(op, transforms=(Transform(site="input", kind="scale", key="s"),))
    found = choose(op, registry())
    assert found.kernel.name == "npu_int8@transformed"
    assert not [d for d in found.trace if d.kernel == "npu_int8" and isinstance(d.answer, Accepted)]


def test_another_order_of_nibbles_is_found_at_loading(npu, monkeypatch):
    pack_ = fake_torch_npu.npu_convert_weight_to_int4pack
    swapped = lambda w, inner_k_tiles=0: pack_(w.view(*w.shape[:-1], -1, 2).flip(-1).flatten(-2))  # noqa: E731
    monkeypatch.setattr(npu, "npu_convert_weight_to_int4pack", swapped)
    lt = _layer(_integer(4))
    op = _op(lt, PER_TOKEN[4], torch.float16)
    with pytest.raises(KernelError) as caught:
        BY_NAME["npu_int4"].load_(BY_NAME["npu_int4"].allocate(op), op, lt, {"row": 0})
    assert caught.value.code == "Q-KERNEL-WORDS"


def test_a_part_of_another_layout_is_refused(npu):
    lt = _layer(_integer(8, zero="none"))
    op = _op(lt, PER_TOKEN[8], torch.bfloat16)
    kernel = BY_NAME["npu_int8"]
    with pytest.raises(LayoutError) as caught:
        kernel.load_(kernel.allocate(op), op, replace(lt, bias=torch.zeros(N)), {"row": 0})
    assert caught.value.code == "Q-LAYOUT-FUSED"
    short = replace(lt.weight, scales=(lt.weight.scales[0].half(),))
    with pytest.raises(LayoutError) as caught:
        kernel.load_(kernel.allocate(op), op, _layer(short), {"row": 0})
    assert caught.value.code == "Q-LAYOUT-SHAPE"


def test_input_of_another_size_or_type_is_an_error(npu):
    lt = _layer(_integer(8, zero="none"))
    op = _op(lt, PER_TOKEN[8], torch.bfloat16)
    values = list(_held("npu_int8", op, [lt]).values())
    run = BY_NAME["npu_int8"].bind(op)
    for x in (torch.zeros(2, K + 1).bfloat16(), torch.zeros(2, K)):
        with pytest.raises(LayoutError) as caught:
            run(values, x)
        assert caught.value.code == "Q-LAYOUT-INPUT"
    assert run(values, torch.zeros(0, K).bfloat16()).shape == (0, N)


def test_a_bound_kernel_pickles_and_copies(npu):
    lt = _layer(_integer(8, zero="none"))
    op = _op(lt, PER_TOKEN[8], torch.bfloat16)
    values = list(_held("npu_int8", op, [lt]).values())
    x = torch.randn(3, K).bfloat16()
    run = BY_NAME["npu_int8"].bind(op)
    again = pickle.loads(pickle.dumps(run))
    assert torch.equal(again(values, x), run(values, x))
    assert pickle.loads(pickle.dumps(BY_NAME["npu_int8"])) is BY_NAME["npu_int8"]
    assert copy.deepcopy(BY_NAME["npu_int4"]) is BY_NAME["npu_int4"]
