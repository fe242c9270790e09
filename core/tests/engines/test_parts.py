"""Which modules are recognised, with kernels in plain torch that offer one form each."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toy
from quant_core.engines.transformers_parts import attach_norms_and_mlps, equal, parts_of
from quant_core.engines.transformers_swap import Guard, Swapped, original, swap, unswap
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import NORMS

PLAIN, LAST, OFFSET, BOTH = NORMS[0], NORMS[1], NORMS[2], NORMS[3]
calls: list[str] = []


def norm(form, held, x, eps, delta=None):
    """``rms_norm`` of the contract."""
    calls.append("norm")
    total = x if delta is None else x + delta
    h = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + eps)
    weight = held[0] + ("unit_offset" in form)
    if "round_last" in form:
        y = ((held[0].float() + ("unit_offset" in form)) * h).to(x.dtype)
    else:
        y = weight * h.to(x.dtype)
    return y if delta is None else (total, y)


class Norm:
    name = "plain_norm"

    def __init__(self, *forms):
        self.forms = forms

    def accepts(self, op):
        if op.op != "rms_norm" or op.features not in self.forms:
            return Rejected(axis="features", have=str(op.features), need="another form")
        return Accepted(cost=1.0)

    def bind(self, op):
        return functools.partial(norm, op.features)


class Llama(nn.Module):
    def __init__(self, k=64, eps=1e-5):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(k, generator=g).bfloat16())
        self.variance_epsilon = eps

    def hat(self, x, eps):
        return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, hidden):
        return self.weight * self.hat(hidden, self.variance_epsilon).to(hidden.dtype)


class Gemma(Llama):
    def forward(self, x):
        return (self.hat(x, self.variance_epsilon) * (1 + self.weight.float())).type_as(x)


class Mean(Llama):
    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), None, 1e-5).to(x.dtype)


class OtherEpsilon(Llama):
    """Says one epsilon and uses another, which shows on small inputs only."""

    def forward(self, x):
        return self.weight * self.hat(x, 1e-6).to(x.dtype)


class Clamped(Llama):
    """Differs on large inputs only."""

    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class Biased(Llama):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64).bfloat16())  # of no effect until it is trained

    def forward(self, x):
        return super().forward(x) + self.bias


class Summed(Llama):
    """A root of the sum, not of the mean."""

    def forward(self, x):
        eps = self.variance_epsilon
        return self.weight * (
            x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + eps)
        ).to(x.dtype)


def attach(module, *forms):
    registry = toy.toy_registry(toy.toy_module(apply=lambda op: (Norm(*forms),)))
    model = nn.Module()
    model.inner = module
    parts = attach_norms_and_mlps(model, registry, dtype=torch.bfloat16, device="cpu")
    calls.clear()
    assert parts_of(model) is parts
    return parts


@pytest.mark.parametrize("forms", [NORMS, NORMS[::-1]], ids=["all", "reversed"])
@pytest.mark.parametrize(("kind", "form"), [(Llama, PLAIN), (Gemma, OFFSET)])
def test_a_norm_gets_its_own_form(kind, form, forms):
    module, own = kind(), kind()
    assert attach(module, *forms).swapped == {"inner": "plain_norm"}
    assert module._quant_norm.op.features == form
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        assert torch.equal(module(x), own(x))
    assert calls == ["norm"]


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        (Llama, (OFFSET, BOTH)),
        (Gemma, (PLAIN, LAST)),
        (Mean, NORMS),
        (OtherEpsilon, NORMS),
        (Clamped, NORMS),
        (Summed, NORMS),
    ],
)
def test_a_norm_that_computes_something_else_is_left(kind, forms):
    module = kind()
    parts = attach(module, *forms)
    assert type(module) is kind
    assert parts.left == {"inner": "it computes something else than a root-mean-square norm"}


def test_norms_with_more_state_or_another_dtype_are_no_candidates():
    assert not attach(Biased(), *NORMS).swapped
    module = Llama().float()
    assert "torch.float32" in attach(module, *NORMS).left["inner"]
    held = Llama()
    held.forward = lambda x: x
    assert "forward" in attach(held, *NORMS).left["inner"]


def test_without_a_kernel_nothing_is_touched():
    module = Llama()
    parts = attach(module)
    assert type(module) is Llama
    assert not parts.swapped
    assert "another form" in parts.table


@pytest.mark.parametrize("how", ["gradients", "keyword", "tensor"])
def test_the_modules_own_code_runs_where_the_kernel_cannot(how):
    module, own = Llama(), Llama()
    attach(module, *NORMS)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    if how == "gradients":
        module(x).float().sum().backward()
        assert module.weight.grad.abs().max() > 0
    elif how == "keyword":
        with torch.no_grad():
            assert torch.equal(module(hidden=x), own(hidden=x))
    else:
        del module.weight
        module.weight = own.weight.detach() * 2  # a plain attribute, as parametrizations leave it
        with torch.no_grad():
            assert torch.equal(module(x), own(x) * 2)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_means_within_rounding(dtype):
    want = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert equal(want.clone(), want) == 0.0
    one = want.clone()
    one[3, 4] = (
        torch.nextafter(one[3, 4].float(), torch.tensor(9.0)).to(dtype)
        if (dtype == torch.float32)
        else one[3, 4] * (1 + torch.finfo(dtype).eps)
    )
    found = equal(one, want)
    assert found is not None
    assert 0 < found < 1e-3
    assert equal(want * (1 + 20 * torch.finfo(dtype).eps), want) is None
    assert equal(want + 1e-2, want) is None
    assert equal(want.double(), want) is None
    assert equal(want[:1], want) is None
    assert equal(None, want) is None
    assert equal(want, want * torch.nan) is None


# ------------------------------------------------------------------------------------ the swapping


class Twice(Swapped):
    def forward(self, x):
        return super().forward(x) * 2


class Line(nn.Module):
    """A module of a test; its docstring stays."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def test_a_swapped_module_stays_what_it_was():
    module, x = Line(), torch.ones(1, 2)
    want = module(x)
    swap(module, Twice)
    assert torch.equal(module(x), want * 2)
    assert isinstance(module, Line)
    assert original(module) is Line
    assert type(module).__name__ == "Line"
    assert type(module).__doc__ == Line.__doc__
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert torch.equal(other(x), want * 2)
        assert other.inner.weight is not module.inner.weight
    swap(module, Twice)  # again: not twice over
    assert torch.equal(module(x), want * 2)
    unswap(module)
    assert type(module) is Line


def test_guard_sees_replacements_hooks_and_forwards_and_their_end():
    module = Line()
    guard = Guard([(module, "inner")])
    assert guard.holds(module)
    inner = module.inner
    module.inner = nn.Linear(2, 2)
    assert not guard.holds(module)
    module._modules["inner"] = inner
    assert guard.holds(module)
    for target in (module, inner):
        for register in (target.register_forward_hook, target.register_forward_pre_hook):
            handle = register(lambda *a: None)
            assert not guard.holds(module)
            handle.remove()
            assert guard.holds(module)
    inner.forward = lambda x: x
    assert not guard.holds(module)
    del inner.forward
    assert guard.holds(module)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *a: None)
    assert not guard.holds(module)
    handle.remove()
    assert guard.holds(module)


def test_guard_of_a_copy_guards_the_copy():
    module = Line()
    module.guard = Guard([(module, "inner")])
    other = copy.deepcopy(module)
    other.inner = nn.Linear(2, 2)
    assert not other.guard.holds(other)
    assert module.guard.holds(module)
