"""The int8-activation kernel against its own rule in plain torch; nobody gets it unasked."""

from __future__ import annotations

import pytest
import torch

from cpu_made import SPECS, make_layer, make_op
from quant_core.dequantize import dense_weight
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.choose import choose
from quant_core.registry import registry
from quant_kernels_cpu.kernel import W4A8, WnA16
from quant_kernels_cpu.library import library, unavailable

pytestmark = pytest.mark.skipif(
    bool(unavailable()) or not library().vnni, reason="this processor has no AVX512-VNNI"
)
SMALL = [name for name in SPECS if name.startswith(("uint4", "uint3", "uint2"))]
NAMES = [name for name in SMALL if not name.endswith("float zero")]


def bind(kernel, lt, op):
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    run, values = kernel.bind(op), list(buffers.values())
    return lambda *inputs: run(values, *inputs)


def rounded(x, lt):
    """x as the kernel sees it, in stored column order: q * s per group of at most 128."""
    qt = lt.weight
    if qt.gather is not None:
        x = torch.nn.functional.pad(x, (0, 1))[:, qt.gather.long()]
    size = min(qt.spec.scales[0].grain[1] or qt.shape[1], 128)
    parts = []
    for part in x.float().split(size, dim=1):
        top = part.abs().amax(1, keepdim=True)
        # not 127 / top, which torch computes as a reciprocal times 127
        inverse = torch.where(top > 0, torch.full_like(top, 127).div(top), 0)
        q = torch.round(part * inverse)
        parts.append(q * (top / 127))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 1056), (96, 96)])
def test_result_is_the_product_with_rounded_activations(name, n, k):
    lt = make_layer(SPECS[name], n, k, bias=torch.float16 if n == 40 else None)
    run = bind(W4A8(), lt, make_op("linear", lt, k))
    w = lt.weight.dequantize().double()
    g = torch.Generator().manual_seed(3)
    for m in (1, 2, 3, 7, 8, 9, 33):
        for dtype, ulp in ((torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)):
            x = torch.randn(m, k, generator=g).to(dtype)
            used = rounded(x, lt).double()
            want = used @ w.t() + (0 if lt.bias is None else lt.bias.double())
            # float32 sums over groups of exact integer dot products, then one rounding
            allowed = 1e-6 * (used.abs() @ w.abs().t() + used.abs().sum(1, keepdim=True) * 0.1)
            allowed = allowed + ulp * want.abs() + 1e-30
            assert ((run(x).double() - want).abs() <= allowed).all(), (m, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_error_against_float_activations_is_that_of_int8(name):
    lt = make_layer(SPECS[name], 64, 1024)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    got = bind(W4A8(), lt, make_op("linear", lt, 1024))(x)
    want = x @ dense_weight(lt.weight, 1024).t()
    error = ((got - want).norm() / want.norm()).item()
    assert 1e-4 < error < 2e-2  # a step of max/127: rounds, but no more than that


def test_one_group_of_large_activations_leaves_the_others_alone():
    lt = make_layer(SPECS["uint4 g32 f16 code"], 64, 1024)
    run = bind(W4A8(), lt, make_op("linear", lt, 1024))
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
    spiked = x.clone()
    spiked[0, 5] = 1e4
    only = torch.zeros_like(x)
    only[:, :32] = spiked[:, :32]
    rest = x.clone()
    rest[:, :32] = 0
    got = run(spiked).double() - run(only).double()
    assert torch.allclose(got, run(rest).double(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_give_nan_for_their_token_only(bad):
    lt = make_layer(SPECS["uint4 two-level offset"], 40, 96)
    x = torch.randn(3, 96).bfloat16()
    x[1, 50] = bad
    got = bind(W4A8(), lt, make_op("linear", lt, 96))(x)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_weights_and_zero_activations_give_exact_zeros(name):
    lt = make_layer(SPECS[name], 40, 96)
    run = bind(W4A8(), lt, make_op("linear", lt, 96))
    assert (run(torch.zeros(2, 96)) == 0).all()
    if lt.weight.zeros is None or name.startswith("uint2"):
        return
    group = lt.weight.spec.scales[0].grain[1]
    codes = lt.weight.codes.clone()
    one = lt.weight.zeros[7].repeat_interleave(group)[: lt.weight.shape[1]]
    codes[7] = one[0::2] | (one[1::2] << 4)  # every code equals its zero point
    tensors = {**lt.weight.tensors(), "codes": codes}
    lt.operands["weight"] = lt.weight.with_tensors(tensors)
    got = bind(W4A8(), lt, make_op("linear", lt, 96))(torch.randn(5, 96))
    assert (got[:, 7] == 0).all()
    assert (got[:, 8] != 0).all()


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    lt = make_layer(SPECS["uint4 g32 f16 code"], 232, 1040)
    run = bind(W4A8(), lt, make_op("linear", lt, 1040))
    for m in (1, 9):
        x = torch.randn(m, 1040).bfloat16()
        threads(1)
        one = run(x)
        threads(2)
        assert torch.equal(one, run(x))


def test_grouped_linear_rounds_the_same_way():
    experts = [make_layer(SPECS["uint4 g32 f16 code"], 40, 96, seed=s) for s in range(3)]
    op = make_op("grouped_linear", experts[0], 96, experts=3)
    kernel = W4A8()
    buffers = kernel.allocate(op)
    for e, lt in enumerate(experts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    x, index = torch.randn(6, 96), torch.tensor([2, 0, 2, 3, 1, 0])
    got = kernel.bind(op)(list(buffers.values()), x, index)
    for t, e in enumerate(index.tolist()):
        if e == 3:
            assert (got[t] == 0).all()
        else:
            own = bind(kernel, experts[e], make_op("linear", experts[e], 96))(x[t])
            assert torch.allclose(got[t], own, rtol=1e-5, atol=1e-6)


def test_never_chosen_unless_named(monkeypatch):
    op = make_op("linear", make_layer(SPECS["uint4 g32 f16 code"], 40, 96), 96)
    answer = W4A8().accepts(op)
    assert isinstance(answer, Accepted)
    assert not answer.exact
    assert choose(op, registry()).kernel.name == "cpu_wna16"
    assert choose(op, registry(), kernels="cpu_w4a8").kernel.name == "cpu_w4a8"
    monkeypatch.setenv("QUANT_KERNELS", "cpu_w4a8,torch_ref")
    assert choose(op, registry()).kernel.name == "cpu_w4a8"


@pytest.mark.parametrize("name", [*SPECS])
def test_runs_nothing_that_the_exact_kernel_does_not_run(name):
    """Else it would be the cheapest kernel left and come unasked."""
    lt = make_layer(SPECS[name], 40, 96)
    for kind in ("linear", "embedding", "grouped_linear"):
        op = make_op(kind, lt, 96)
        if isinstance(W4A8().accepts(op), Accepted):
            exact = WnA16().accepts(op)
            assert isinstance(exact, Accepted)
            assert exact.cost < W4A8().accepts(op).cost


def test_wide_codes_are_refused_with_the_reason():
    op = make_op("linear", make_layer(SPECS["int8 g32 f16"], 40, 96), 96)
    answer = W4A8().accepts(op)
    assert isinstance(answer, Rejected)
    assert (answer.axis, answer.have) == ("element", "int8")
