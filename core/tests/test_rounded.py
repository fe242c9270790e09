"""Kernels of float activations behind a rounding of x: the reference's own results."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.quantizer import TorchRound
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.rounded import RoundedInput, without_input
from quant_core.nn import QuantLinear
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale, Zero, group

K = 96
FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
FP4 = Element(name="fp4_e2m1", bits=4, kind="float")


def acts(element, grain, *, scale="f32", static=False, zero=None):
    return QuantSpec(
        element=element, scales=(Scale(element=scale, grain=grain, static=static),), zero=zero
    )


DYNAMIC = {
    "fp8 token": acts(FP8, CHANNEL),
    "int8 token": acts(Element.int(8), CHANNEL),
    "mxfp4": acts(FP4, group(32), scale="e8m0"),
}
STORED = {
    "fp8": acts(FP8, TENSOR, static=True),
    "int8 with zero": acts(
        Element.int(8), TENSOR, static=True, zero=Zero(kind="code", element="int8")
    ),
}


class FloatsOnly(ReferenceKernel):
    """The reference without quantized activations, on buffers of a layout."""

    name = "floats"
    layout = "rows"

    def accepts(self, op):
        if op.operand("input") is not None:
            return Rejected(axis="operands", have="input, weight", need="weight only")
        return Accepted(cost=5.0)


def _registry(*kernels):
    return toy.toy_registry(toy.toy_module(apply=lambda op: list(kernels)))


def _op(lt, spec, kind="linear", **sizes):
    op = make_op(kind, lt, **sizes)
    names = [n for n in ("input_scale", "input_zero") if getattr(lt, n) is not None]
    return replace(
        op, operands=(*op.operands, ("input", spec)), features=op.features | frozenset(names)
    )


def _layer(spec, seed=0):
    lt = make_layer(SPECS["int8_channel"], seed=seed)
    if spec.scales[0].static:
        lt.input_scale = torch.tensor([0.02 * (seed + 1)])
        if spec.zero is not None:
            lt.input_zero = torch.tensor([3], dtype=torch.uint8)
    return lt


def _bound(kernel, op, parts):
    buffers = kernel.allocate(op)
    for e, lt in enumerate(parts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e} if len(parts) > 1 else {"row": 0})
    return buffers, kernel.bind(op)


@pytest.mark.parametrize("name", [*DYNAMIC, *STORED])
def test_rounded_layer_is_the_references_bit_for_bit(name):
    spec = {**DYNAMIC, **STORED}[name]
    lt = _layer(spec)
    op = _op(lt, spec)
    choice = choose(op, _registry(FloatsOnly()))
    assert choice.kernel.name == "floats@rounded"
    buffers, run = _bound(choice.kernel, op, [lt])
    plain, want = _bound(ReferenceKernel(), op, [lt])
    for m in (0, 1, 5):
        x = torch.randn(2, m, K)
        got = run(list(buffers.values()), x)
        assert torch.equal(got, want(list(plain.values()), x))
        if m:
            floats = ReferenceKernel().bind(without_input(op))
            own = [t for n, t in plain.items() if n not in ("input_scale", "input_zero")]
            assert not torch.equal(got, floats(own, x)), "the rounding shows"


def test_trace_says_that_activations_are_emulated():
    spec = DYNAMIC["mxfp4"]
    op = _op(_layer(spec), spec)
    choice = choose(op, _registry(FloatsOnly()))
    assert [d.kernel for d in choice.trace] == ["torch_ref", "floats", "floats@rounded"]
    assert "fp4_e2m1 activations emulated" in choice.table
    assert choice.trace[2].answer.cost > 5.0
    assert choose(op, _registry(FloatsOnly()), kernels="floats@rounded").kernel.name == (
        "floats@rounded"
    )
    assert choose(op, _registry(FloatsOnly()), kernels="floats").kernel.name == "floats@rounded"


@pytest.mark.parametrize("name", ["fp8 token", "fp8", "int8 with zero"])
def test_experts_round_each_token_under_its_own_scale(name):
    spec = {**DYNAMIC, **STORED}[name]
    parts = [_layer(spec, seed) for seed in range(3)]
    op = _op(parts[0], spec, "grouped_linear", experts=3)
    kernel = choose(op, _registry(FloatsOnly())).kernel
    buffers, run = _bound(kernel, op, parts)
    plain, want = _bound(ReferenceKernel(), op, parts)
    x, index = torch.randn(7, K), torch.tensor([2, 0, 1, 1, 5, 2, 0])
    assert torch.equal(run(list(buffers.values()), x, index), want(list(plain.values()), x, index))


def test_stored_scales_come_back_and_survive_a_pickle():
    spec = STORED["int8 with zero"]
    lt = _layer(spec)
    op = _op(lt, spec)
    choice = choose(op, _registry(FloatsOnly()))
    assert choice.kernel.layout == "rows+input"
    buffers, _ = _bound(choice.kernel, op, [lt])
    back = choice.kernel.restore(buffers, op)
    assert torch.equal(back.input_scale, lt.input_scale)
    assert torch.equal(back.input_zero, lt.input_zero)
    assert torch.equal(back.weight.codes, lt.weight.codes)
    module = QuantLinear(choice, buffers)
    again, x = pickle.loads(pickle.dumps(module)), torch.randn(3, K)
    assert torch.equal(again(x), module(x))


def test_what_cannot_be_rounded_first_is_not_offered():
    spec = DYNAMIC["fp8 token"]
    lt = _layer(spec)
    op = _op(lt, spec)
    assert RoundedInput.of(FloatsOnly(), make_op("linear", lt)) is None  # nothing to round
    combined = replace(op, features=op.features | {"out_scale"})
    answer = RoundedInput(FloatsOnly(), stored=False).accepts(combined)
    assert isinstance(answer, Rejected)
    assert answer.axis == "features"
    never = FloatsOnly()
    never.accepts = lambda op: Rejected(axis="operands", have="x", need="y")
    assert choose(op, _registry(never)).kernel.name == "torch_ref"


def test_kernel_without_a_layout_is_offered_behind_a_rounding_too():
    """As those of the CPU; a stored scale is its buffer all the same."""
    for spec in (*DYNAMIC.values(), *STORED.values()):
        alone = FloatsOnly()
        alone.layout = ""
        lt = _layer(spec)
        op = _op(lt, spec)
        choice = choose(op, _registry(alone))
        assert choice.kernel.name == "floats@rounded"
        buffers, run = _bound(choice.kernel, choice.op, [lt])
        want_buffers, want = _bound(ReferenceKernel(), op, [lt])
        x = torch.randn(4, K)
        values, want_values = list(buffers.values()), list(want_buffers.values())
        assert torch.equal(run(values, x), want(want_values, x))
        back = choice.kernel.restore(buffers, choice.op)
        assert back.input_scale is None or torch.equal(back.input_scale, lt.input_scale)


def test_rounding_is_one_node_of_a_graph():
    spec = DYNAMIC["fp8 token"]
    lt = _layer(spec)
    op = _op(lt, spec)
    kernel = RoundedInput(FloatsOnly(), stored=False)
    buffers, run = _bound(kernel, op, [lt])
    torch._dynamo.reset()
    values, x = list(buffers.values()), torch.randn(4, K)
    compiled = torch.compile(lambda x: run(values, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), run(values, x))


def _doubled(buffers, x, *stored):
    return 2 * TorchRound().bind(_doubled.op)(buffers, x, *stored)


class Doubling(TorchRound):
    """A quantizer whose results can be told from the reference's."""

    name = "doubling"

    def accepts(self, op):
        return Accepted(cost=3.0) if op.op == "quantize" else super().accepts(op)

    def bind(self, op):
        _doubled.op = op
        return _doubled


@pytest.mark.parametrize("name", ["fp8 token", "int8 with zero"])
def test_a_package_that_rounds_activations_is_chosen_and_named(name):
    spec = {**DYNAMIC, **STORED}[name]
    lt = _layer(spec)
    op = _op(lt, spec)
    registry, x = _registry(FloatsOnly(), Doubling()), torch.randn(3, K)
    choice = choose(op, registry)
    assert "rounded to codes and back by doubling" in choice.table
    answers = {d.kernel: d.answer for d in choice.trace}
    assert answers["floats@rounded"].cost == answers["floats@rounded"].cost_at(1) == 8.0
    buffers, run = _bound(choice.kernel, op, [lt])
    plain = choose(op, registry, kernels="floats,quantize=torch_round")
    assert "by torch_round" in plain.table
    want = plain.kernel.bind(op)(list(buffers.values()), x)
    assert torch.allclose(run(list(buffers.values()), x), 2 * want, rtol=1e-5, atol=1e-5)


def test_a_quantizer_that_does_not_exist_is_an_error():
    spec = DYNAMIC["fp8 token"]
    op = _op(_layer(spec), spec)
    with pytest.raises(KernelError, match="quantize=nobody") as err:
        choose(op, _registry(FloatsOnly()), kernels="quantize=nobody")
    assert err.value.code == "Q-KERNEL-NONE"


def test_a_quantizer_has_no_weights():
    kernel = TorchRound()
    assert kernel.allocate(None) == {}
    with pytest.raises(KernelError, match="no quantized weights"):
        kernel.restore({}, None)


@pytest.mark.parametrize("early", [False, True])
def test_a_rounding_is_told_that_the_kernel_behind_starts_early(early):
    asked = []

    class Rounds(TorchRound):
        def accepts(self, op):
            asked.append(op.features)
            return super().accepts(op)

        def bind(self, op):
            asked.append(op.features)
            return super().bind(op)

    class Product(FloatsOnly):
        starts_early = early

    spec = STORED["fp8"]
    op = _op(_layer(spec), spec)
    kernel = RoundedInput(Product(), stored=True, quantizer=Rounds())
    assert isinstance(kernel.accepts(op), Accepted)
    kernel.bind(op)
    want = {"input_scale", "starts_early"} if early else {"input_scale"}
    assert asked == [want, want]
