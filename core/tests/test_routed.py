"""Experts whose stacks run in one kernel are one call of it, and only then."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from made_layers import SPECS, make_layer, make_op
from quant_core.errors import KernelError
from quant_core.kernels.base import Accepted
from quant_core.kernels.choose import Choice
from quant_core.kernels.family import Family
from quant_core.kernels.reference import ReferenceKernel
from quant_core.nn import QuantExperts, QuantGrouped

EXPERTS = 3


def dense_experts(weights, gating, x, index, amounts):
    """The definition, expert by expert, in float64."""
    gate, up, down = (w.double() for w in weights)
    y = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(index.shape[1]):
            e = int(index[t, j])
            if 0 <= e < EXPERTS:
                h = gating(x[t].double() @ gate[e].t(), x[t].double() @ up[e].t())
                y[t] += amounts[t, j].double() * (h @ down[e].t())
    return y


class Whole(ReferenceKernel):
    """The reference kernel with a call for experts, from ``few`` rows on, that counts."""

    name = "whole"

    def __init__(self, few: int = 1, takes: bool = True) -> None:
        self.few, self.takes, self.calls = few, takes, []

    def accepts(self, op):
        said = super().accepts(op)
        costs = ((self.few - 1, float("inf")), (1 << 62, 0.5)) if self.few > 1 else ()
        return Accepted(cost=0.5, costs=costs) if isinstance(said, Accepted) else said

    def bind_experts(self, ops):
        if not self.takes:
            return None
        return functools.partial(self.run, [self.bind(op) for op in ops])

    def run(self, runs, buffers, gating, x, index, weights):
        self.calls.append(tuple(index.shape))
        flat, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], dim=0)
        sides = [run(held, rows, flat) for run, held in zip(runs[:2], buffers[:2], strict=True)]
        y = runs[2](buffers[2], gating(*sides), flat) * weights.reshape(-1, 1)
        return y.view(*index.shape, -1).sum(1)


def stack(kernel, seed):
    lts = [make_layer(SPECS["uint4_code"], n=96, k=96, seed=seed + i) for i in range(EXPERTS)]
    op = make_op("grouped_linear", lts[0], experts=EXPERTS)
    buffers = kernel.allocate(op)
    for e, lt in enumerate(lts):
        kernel.load_(buffers, op, lt, {"row": 0, "expert": e})
    made = QuantGrouped(Choice(kernel=kernel, op=op, trace=()), buffers)
    return made, torch.stack([lt.dequantize() for lt in lts])


def experts(*kernels):
    stacks = [stack(k, 10 * i) for i, k in enumerate(kernels)]
    module = QuantExperts(*(m for m, _ in stacks), torch.nn.functional.silu, EXPERTS)
    return module, [w for _, w in stacks]


class Broken(Whole):
    """Fails when it is asked for the call, or in it."""

    name = "broken"

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def bind_experts(self, ops):
        if self.when == "bind_experts":
            raise KeyError("inside")
        return super().bind_experts(ops)

    def run(self, *args):
        raise KeyError("inside")


@pytest.mark.parametrize("when", ["bind_experts", "a call of bind_experts"])
def test_call_that_fails_is_named_with_its_kernel(when):
    kernel = Broken(when)
    module, _ = experts(kernel, kernel, kernel)
    with pytest.raises(KernelError, match=f"{when} of kernel 'broken'.*KeyError: 'inside'") as e:
        module(*inputs())
    assert e.value.code == "Q-KERNEL-FAILED"
    assert isinstance(e.value.__cause__, KeyError)


def inputs(tokens=5, top=2):
    torch.manual_seed(3)
    index = torch.randint(-1, EXPERTS + 1, (tokens, top))
    return torch.randn(tokens, 96), index, torch.rand(tokens, top)


def close(y, weights, args):
    want = dense_experts(weights, lambda g, u: torch.nn.functional.silu(g) * u, *args)
    return (y.double() - want).norm() <= 1e-5 * want.norm()  # float32 sums


def test_experts_of_one_kernel_are_one_call_and_compute_the_definition():
    kernel = Whole()
    module, weights = experts(kernel, kernel, kernel)
    args = inputs()
    y = module(*args)
    assert kernel.calls == [(5, 2)]
    assert close(y, weights, args)
    wrong = (args[0], args[1].flip(0), args[2])
    assert not close(y, weights, wrong)


@pytest.mark.parametrize(
    "kernels",
    [
        (Whole(), Whole(), ReferenceKernel()),
        (ReferenceKernel(), Whole(), Whole()),
        (Whole(takes=False),) * 3,
    ],
    ids=["other down", "other gate", "refused"],
)
def test_stacks_of_unlike_kernels_run_one_by_one(kernels):
    module, weights = experts(*kernels)
    args = inputs()
    assert close(module(*args), weights, args)
    assert not any(getattr(k, "calls", []) for k in kernels)


def test_the_number_of_rows_decides_in_a_family():
    kernel, plain = Whole(few=8), ReferenceKernel()
    plain.layout = kernel.layout = "one"
    op = make_op("grouped_linear", make_layer(SPECS["uint4_code"], n=96, k=96), experts=EXPERTS)
    family = Family("one", (kernel, plain), op)
    assert family.member(7).name == "torch_ref"
    assert family.member(8) is kernel
    module, weights = experts(family, family, family)
    for tokens, calls in ((3, []), (4, [(4, 2)])):
        args = inputs(tokens)
        assert close(module(*args), weights, args)
        assert kernel.calls == calls


def test_hooks_and_gradients_leave_the_stacks_single():
    kernel = Whole()
    module, _ = experts(kernel, kernel, kernel)
    args = inputs()
    module(args[0].requires_grad_(), *args[1:]).sum().backward()
    assert args[0].grad.abs().sum() > 0
    seen = []
    handle = module.up.register_forward_hook(lambda *a: seen.append(1))
    module(args[0].detach(), *args[1:])
    assert seen
    assert not kernel.calls
    handle.remove()
    module(args[0].detach(), *args[1:])
    assert len(kernel.calls) == 1


def test_a_copy_makes_its_own_call_and_no_rows_make_none():
    kernel = Whole()
    module, weights = experts(kernel, kernel, kernel)
    args = inputs()
    module(*args)
    twin = copy.deepcopy(module)
    assert close(twin(*args), weights, args)
    x, index, amounts = inputs(0)
    assert module(x, index, amounts).shape == (0, 96)
    assert len(kernel.calls) == 1
