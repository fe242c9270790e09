"""The torch ops of the mixed kernels; see ``ops`` for how they are called.

    quant_triton::mixed_linear(x, tensors, plan)            x [..., K] -> [..., N]
    quant_triton::mixed_grouped(x, experts, tensors, plan)  x [T, K], experts [T] -> [T, N]

``plan`` is ``MixedPlan.text()``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_core.kernels.calls import check_input, planned, unobserved
from quant_kernels_triton.mixed_plan import from_text
from quant_kernels_triton.replay import replayed

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
    from quant_kernels_triton.mixed_run import run_mixed_grouped

    return run_mixed_grouped(from_text(plan), x, experts, tensors)


def _fake_linear(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], from_text(plan).recipe.n)


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(x.shape[0], from_text(plan).recipe.n)


for _name, _impl, _fake in (
    ("mixed_linear", _linear, _fake_linear),
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


def bound_grouped(plan: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    """The same for a stack of experts."""
    check_input(x, k)
    if planned.jobs is not None:
        return _grouped(x, experts, tensors, plan)
    return torch.ops.quant_triton.mixed_grouped(x, experts, tensors, plan)  # type: ignore[no-any-return]
