"""The torch ops of the mixed kernels; see ``ops`` for how they are called.

    quant_triton::mixed_linear(x, tensors, plan)            x [..., K] -> [..., N]
    quant_triton::mixed_grouped(x, experts, tensors, plan)  x [T, K], experts [T] -> [T, N]

``plan`` is ``MixedPlan.text()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_core.kernels.calls import check_input, unobserved
from quant_kernels_triton.mixed_plan import from_text
from quant_kernels_triton.replay import kind_of, replayable, replayed

__all__ = ["bound_grouped", "bound_linear"]

_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define("mixed_linear(Tensor x, Tensor[] tensors, str plan) -> Tensor")
_lib.define("mixed_grouped(Tensor x, Tensor experts, Tensor[] tensors, str plan) -> Tensor")


def _linear(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    from quant_kernels_triton.mixed_run import run_mixed  # needs the Gluon dialect

    p = from_text(plan)
    flat = x.reshape(-1, p.recipe.k_in)
    return run_mixed(p, flat, tensors).view(*x.shape[:-1], p.recipe.n)


def _grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    p = from_text(plan)
    if p.sub == 1:
        from quant_kernels_triton.gluon_experts_a8_run import run_stack_a8

        return run_stack_a8(p, x, experts, tensors)
    from quant_kernels_triton.mixed_run import run_mixed_grouped

    return run_mixed_grouped(p, x, experts, tensors)


def _fake_linear(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], from_text(plan).recipe.n)


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(x.shape[0], from_text(plan).recipe.n)


for _name, _impl, _fake in (
    ("mixed_linear", replayable(_linear), _fake_linear),
    ("mixed_grouped", _grouped, _fake_grouped),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_triton::{_name}", _fake, lib=_lib)


def bound_linear(plan: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    """What ``bind`` gives for a linear layer, with the first two arguments fixed."""
    if unobserved(x):
        return replayed(_linear, (plan,), tensors, x, k)
    check_input(x, k)
    return torch.ops.quant_triton.mixed_linear(x, tensors, plan)  # type: ignore[no-any-return]


def _again(x: Tensor, given: Sequence[Tensor], plan: str, *kind: object) -> Tensor:
    """What ``replay`` runs of a stack; the last one given are the experts of the rows."""
    return _grouped(x, given[-1], list(given[:-1]), plan)


def bound_grouped(plan: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    """The same for a stack of experts."""
    if unobserved(x):
        return replayed(_again, (plan, *kind_of(experts)), [*tensors, experts], x, k)
    check_input(x, k)
    return torch.ops.quant_triton.mixed_grouped(x, experts, tensors, plan)  # type: ignore[no-any-return]
