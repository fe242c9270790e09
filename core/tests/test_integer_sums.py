"""Layers with a combined output scale: sums in integers, against Python's own integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.reference import ReferenceKernel
from quant_core.spec import CHANNEL, TENSOR, Element, OpSpec, QuantSpec, Scale, Zero
from quant_core.tensors import LayerTensors, QuantizedTensor

N, K = 5, 48
INPUT = QuantSpec(
    element=Element.int(8),
    scales=(Scale(element="f32", grain=TENSOR),),
    zero=Zero(kind="code", element="int8"),
)
WEIGHT = QuantSpec(element=Element.int(8), scales=(Scale(element="f32", grain=CHANNEL),))
KERNEL = ReferenceKernel()


def make_layer(seed=0, zero=-33):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (N, K), generator=rng, dtype=torch.int8)
    out_scale = torch.rand(N, generator=rng) * 1e-4 + 1e-5
    input_scale = torch.tensor([0.03125])
    return LayerTensors(
        operands={
            "weight": QuantizedTensor(
                spec=WEIGHT, shape=(N, K), codes=codes.view(torch.uint8),
                scales=((out_scale / input_scale).unsqueeze(1),),
            )
        },
        acc_bias=torch.randint(-(2**31), 2**31 - 1, (N,), generator=rng, dtype=torch.int32),
        out_scale=out_scale,
        input_scale=input_scale,
        input_zero=torch.tensor([zero], dtype=torch.int8).view(torch.uint8),
    )  # fmt: skip


def op_of(lt, op="linear", **sizes):
    names = ("acc_bias", "out_scale", "input_scale", "input_zero")
    return OpSpec(
        op=op,
        operands=(("weight", lt.weight.spec), ("input", INPUT)),
        sizes=(("n", N), ("k", K), ("k_stored", K), *sizes.items()),
        act_dtype="float32",
        features=frozenset(n for n in names if getattr(lt, n) is not None),
    )


def run(lt, x):
    op = op_of(lt)
    buffers = KERNEL.allocate(op)
    KERNEL.load_(buffers, op, lt, {"row": 0})
    return KERNEL.bind(op)(list(buffers.values()), x)


def by_hand(lt, x):
    """One number at a time, with Python's unbounded integers."""
    codes = lt.weight.codes.view(torch.int8).tolist()
    zero = int(lt.input_zero.view(torch.int8))
    scale = float(lt.input_scale)
    rows = []
    for token in x.tolist():
        q = [max(-128, min(127, round(v / scale + zero))) for v in token]
        sums = [sum(a * b for a, b in zip(q, row)) for row in codes]
        total = [s + int(b) for s, b in zip(sums, lt.acc_bias.tolist())]
        rows.append([t * s for t, s in zip(total, lt.out_scale.tolist())])
    return torch.tensor(rows, dtype=torch.float64)


# tokens in whole steps of the scale and halves: ties, both saturations, zeros
X = torch.arange(3 * K).view(3, K).sub(70).mul(0.09375) + torch.tensor([[0.0], [0.015625], [3.0]])


def test_sums_are_exact_and_rounded_once():
    lt = make_layer()
    want = by_hand(lt, X)
    assert torch.equal(run(lt, X.double()), want)
    assert torch.equal(run(lt, X), want.float())
    assert torch.equal(run(lt, X.bfloat16().float()).bfloat16(), run(lt, X.bfloat16()))


def test_sums_rounded_to_float32_first_would_differ():
    lt = replace(make_layer(), acc_bias=torch.full((N,), 2**30 + 1, dtype=torch.int32))
    assert torch.equal(run(lt, X), by_hand(lt, X).float())
    totals = (by_hand(lt, X) / lt.out_scale.double()).round()
    assert not torch.equal(run(lt, X), totals.float() * lt.out_scale)


def test_zero_point_left_out_of_the_sum_changes_it():
    assert not torch.equal(run(make_layer(zero=0), X), run(make_layer(zero=-33), X))


def test_no_acc_bias_means_zero():
    lt = make_layer()
    zeros = replace(lt, acc_bias=torch.zeros(N, dtype=torch.int32))
    assert torch.equal(run(replace(lt, acc_bias=None), X), run(zeros, X))


def test_experts_have_their_own_scales_and_sums():
    layers = [make_layer(seed, zero) for seed, zero in ((1, -5), (2, 40), (3, 0))]
    op = op_of(layers[0], "grouped_linear", experts=3)
    buffers = KERNEL.allocate(op)
    for i, lt in enumerate(layers):
        KERNEL.load_(buffers, op, lt, {"row": 0, "expert": i})
    x, experts = torch.cat([X, X]), torch.tensor([2, 0, 1, 1, 3, 0])  # 3: no expert here
    got = KERNEL.bind(op)(list(buffers.values()), x, experts)
    for t, e in enumerate(experts.tolist()):
        want = torch.zeros(N) if e == 3 else by_hand(layers[e], x[t : t + 1])[0].float()
        assert torch.equal(got[t], want)


def test_restore_gives_everything_back():
    lt = make_layer()
    op = op_of(lt)
    buffers = KERNEL.allocate(op)
    KERNEL.load_(buffers, op, lt, {"row": 0})
    back = KERNEL.restore(buffers, op)
    for name in ("acc_bias", "out_scale", "input_scale", "input_zero"):
        assert torch.equal(getattr(back, name), getattr(lt, name))


def test_nan_in_the_input_stays_visible():
    x = X.clone()
    x[1, 3] = float("nan")
    y = run(make_layer(), x)
    assert torch.isnan(y[1]).all()
    assert not torch.isnan(y[0]).any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity_is_nan_as_in_layers_without_a_combined_scale(value):
    """One rule for both kinds of stored scale: saturation would hide that x overflowed."""
    x = X.clone()
    x[1, 3] = value
    y = run(make_layer(), x)
    assert torch.isnan(y[1]).all()
    assert not torch.isnan(y[0]).any()
    lt = make_layer()
    elsewhere = fake_quantize(x, INPUT, lt.input_scale, lt.input_zero)
    assert torch.equal(torch.isnan(elsewhere), torch.isinf(x))


def _with_input(op, **changes):
    return replace(op, operands=(op.operands[0], ("input", replace(INPUT, **changes))))


def test_what_cannot_be_summed_is_rejected_by_name():
    op = op_of(make_layer())
    assert isinstance(KERNEL.accepts(op), Accepted)
    dynamic = (Scale(element="f32", grain=CHANNEL, static=False),)
    cases = {
        "acc_bias alone": replace(op, features=op.features - {"out_scale"}),
        "float input": replace(op, operands=op.operands[:1]),
        "input int8": _with_input(op, scales=dynamic, zero=None),
        "weight": replace(
            op,
            operands=(("weight", replace(WEIGHT, zero=Zero(kind="code", element="int8"))),
                      op.operands[1]),
        ),
    }  # fmt: skip
    for found, case in cases.items():
        answer = KERNEL.accepts(case)
        assert isinstance(answer, Rejected)
        assert answer.axis == "features"
        assert found in answer.have


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_any_number_of_tokens(tokens):
    x = torch.linspace(-5, 5, tokens * K).view(tokens, K)
    lt = make_layer()
    assert torch.equal(run(lt, x), by_hand(lt, x).float().view(tokens, N))
