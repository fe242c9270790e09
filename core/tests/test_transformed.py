"""Kernels between transforms, and Hadamard matrices as factors."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

import toy
from made_layers import SPECS, make_layer, make_op
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.kernels.hadamard import TorchHadamard, factors, matrix
from quant_core.kernels.reference import ReferenceKernel
from quant_core.kernels.transforms import hadamard_orders, transform_features
from quant_core.nn import QuantLinear
from quant_core.spec import CHANNEL, Element, OpSpec, QuantSpec, Scale, Transform
from with_input import with_input

N, K = 40, 96
FP8_TOKEN = QuantSpec(
    element=Element(name="fp8_e4m3", bits=8, kind="float"),
    scales=(Scale(element="f32", grain=CHANNEL, static=False),),
)
SMOOTH = Transform(site="input", kind="scale", key="smooth")
ROOT = Transform(site="input", kind="scale", key="root", inverse=True)
OUT = Transform(site="output", kind="scale", key="out", inverse=True)
# Paley's construction over 11 elements: the quadratic residues are 1 3 4 5 9
PALEY = [1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1]


def turn(block, site="input"):
    return Transform(site=site, kind="matrix", key="turn", block=block)


def sylvester(n):
    i = torch.arange(n)
    parity = torch.tensor([[bin(a & b).count("1") % 2 for b in range(n)] for a in i.tolist()])
    return (1 - 2 * parity).to(torch.int8)


def order_12():
    """Paley's Hadamard matrix of 12."""
    h = torch.ones(12, 12, dtype=torch.int8)
    for i in range(11):
        h[1 + i, 0] = -1
        h[1 + i, 1:] = torch.tensor(PALEY).roll(i)
    return h


def signed(h, seed=1):
    g = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randint(0, 2, (h.shape[0],), generator=g) * 2 - 1 for _ in range(2))
    return (h * rows[:, None] * cols).to(torch.int8)


MATRICES = {
    "16": sylvester(16),
    "32, random signs": signed(sylvester(32)),
    "12 x 16": torch.kron(order_12(), sylvester(16)),
    "12 x 16, random signs": signed(torch.kron(order_12(), sylvester(16))),
}


def test_order_12_is_a_hadamard_matrix():
    h = order_12().float()
    assert torch.equal(h @ h.T, 12 * torch.eye(12))


@pytest.mark.parametrize("name", MATRICES)
def test_factors_give_the_matrix_back_and_are_small(name):
    h = MATRICES[name]
    f = factors(h)
    assert f is not None
    assert f.core.shape[0] == (12 if "12" in name else 1)
    assert torch.equal(matrix(f), h)


def test_other_matrices_have_no_factors():
    flipped = MATRICES["12 x 16"].clone()
    flipped[5, 7] *= -1
    zero = sylvester(16)
    zero[3, 3] = 0
    for other in (flipped, zero, sylvester(16).float(), order_12(), torch.ones(2, 16, 16)):
        assert factors(other) is None
    columns = sylvester(32)[:, torch.randperm(32, generator=torch.Generator().manual_seed(2))]
    assert factors(columns.contiguous()) is None


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_reference_equals_the_product_with_the_matrix(name, root):
    h = MATRICES[name]
    f, n = factors(h), h.shape[0]
    x = torch.randn(3, 2, 2 * n)
    divisor = torch.tensor([n**0.5]) if root else None
    run = TorchHadamard().bind(None)
    got = run([], x, f.rows, f.core, f.cols, divisor)
    want = (x.double().unflatten(-1, (2, n)) @ h.double()).flatten(-2) / (n**0.5 if root else 1)
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)  # float32 sums of n terms
    half = run([], x.bfloat16(), f.rows, f.core, f.cols, divisor)
    assert half.dtype == torch.bfloat16
    assert not torch.allclose(run([], x, -f.rows, f.core, f.cols, divisor), got)


class FloatsOnly(ReferenceKernel):
    """The reference without transforms or quantized activations, on buffers of a layout."""

    name = "floats"
    layout = "rows"
    TRANSFORMS = False

    def accepts(self, op):
        assert not op.transforms
        if op.op != "linear":
            return Rejected(axis="op", have=op.op, need="linear")
        if op.operand("input") is not None:
            return Rejected(axis="operands", have="input, weight", need="weight only")
        return Accepted(cost=5.0)


def _registry(*kernels):
    return toy.toy_registry(toy.toy_module(apply=lambda op: list(kernels)))


def _layer(*transforms, spec="fp8_block"):
    return replace(make_layer(SPECS[spec], n=N, k=K, bias=True), transforms=transforms)


def _op(lt):
    op = make_op("linear", lt, k=K)
    return replace(
        op,
        features=op.features | transform_features(lt.transforms),
        transforms=tuple(t for t, _ in lt.transforms),
    )


def _hadamard():
    root = torch.tensor([32**0.5])
    return (turn(32), (signed(sylvester(32)),)), (ROOT, (root,))


CHAINS = {
    "scale": ((SMOOTH, (torch.rand(K) + 0.5,)),),
    "matrix and output": ((turn(32), (torch.randn(3, 32, 32),)), (OUT, (torch.rand(N) + 0.5,))),
    "hadamard": _hadamard(),
    "scale, hadamard": ((SMOOTH, (torch.rand(K) + 0.5,)), *_hadamard()),
    "hadamard of the output": ((turn(8, "output"), (torch.randn(8, 8),)), *_hadamard()),
}


@pytest.mark.parametrize("acts", [None, FP8_TOKEN], ids=["float", "fp8"])
@pytest.mark.parametrize("name", CHAINS)
def test_layer_between_transforms_is_the_references(name, acts):
    lt = _layer(*CHAINS[name])
    op = _op(lt) if acts is None else with_input(_op(lt), acts)
    choice = choose(op, _registry(FloatsOnly()))
    want_name = "floats@transformed" if acts is None else "floats@rounded@transformed"
    assert choice.kernel.name == want_name
    assert choice.kernel.layout == "rows+transforms"
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    plain = ReferenceKernel().allocate(op)
    ReferenceKernel().load_(plain, op, lt, {"row": 0})
    run, x = choice.kernel.bind(choice.op), torch.randn(2, 5, K)
    got, want = run(list(buffers.values()), x), ReferenceKernel().bind(op)(list(plain.values()), x)
    if "hadamard" in name:  # the same sums in another order, then fp8 codes may move by one
        assert ((got - want).norm() / want.norm()).item() < (1e-5 if acts is None else 5e-3)
    else:
        assert torch.equal(got, want)
    bare = _layer()
    other = ReferenceKernel().allocate(_op(bare))
    ReferenceKernel().load_(other, _op(bare), bare, {"row": 0})
    assert not torch.allclose(ReferenceKernel().bind(_op(bare))(list(other.values()), x), got)
    back = choice.kernel.restore(buffers, choice.op)
    assert torch.equal(back.weight.codes, lt.weight.codes)
    for (t, values), (u, others) in zip(lt.transforms, back.transforms, strict=True):
        assert t == u
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(values, others))


def test_a_hadamard_matrix_is_kept_as_factors_and_named():
    lt = _layer(*_hadamard())
    op = _op(lt)
    assert hadamard_orders(op) == {0: (32, 1)}
    choice = choose(op, _registry(FloatsOnly()))
    assert "by torch_hadamard" in choice.table
    buffers = choice.kernel.allocate(choice.op)
    own = {n: tuple(t.shape) for n, t in buffers.items() if n.startswith("transform")}
    assert own == {
        "transform_0_0_rows": (32,),
        "transform_0_0_core": (1, 1),
        "transform_0_0_cols": (32,),
        "transform_1_0": (1,),
    }


def test_layer_survives_a_pickle_and_is_traced():
    lt = _layer(*CHAINS["scale, hadamard"])
    choice = choose(_op(lt), _registry(FloatsOnly()))
    buffers = choice.kernel.allocate(choice.op)
    choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
    module, x = QuantLinear(choice, buffers), torch.randn(3, K)
    want = module(x)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), want)
    torch._dynamo.reset()
    run, values = choice.kernel.bind(choice.op), list(buffers.values())
    compiled = torch.compile(lambda x: run(values, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), want)


class Sevenfold(TorchHadamard):
    """A package's transform whose results can be told from the reference's."""

    name = "sevenfold"

    def accepts(self, op):
        return Accepted(cost=1.0) if op.op == "hadamard" else super().accepts(op)

    def bind(self, op: OpSpec):
        assert op.size("n") == 32
        return _sevenfold


def _sevenfold(buffers, x, *tensors):
    return 7 * TorchHadamard().bind(None)(buffers, x, *tensors)


def test_a_package_that_transforms_is_chosen_and_can_be_switched_off():
    lt, x = replace(_layer(*_hadamard()), bias=None), torch.randn(2, K)
    op, registry = _op(lt), _registry(FloatsOnly(), Sevenfold())
    results = []
    for kernels in (None, "floats,hadamard=torch_hadamard"):
        choice = choose(op, registry, kernels=kernels)
        buffers = choice.kernel.allocate(choice.op)
        choice.kernel.load_(buffers, choice.op, lt, {"row": 0})
        results.append(choice.kernel.bind(choice.op)(list(buffers.values()), x))
        assert ("by sevenfold" in choice.table) == (kernels is None)
    assert torch.allclose(results[0], 7 * results[1], rtol=1e-5, atol=1e-4)
