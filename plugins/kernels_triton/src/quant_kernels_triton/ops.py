"""The torch ops: one opaque node each under torch.compile, a thin launch otherwise.

    quant_triton::linear(x, tensors, recipe, way) -> y          x [..., K] -> [..., N]
    quant_triton::grouped_linear(x, experts, tensors, recipe, way)  x [T, K], experts [T] -> [T, N]
    quant_triton::scaled_linear(x, tensors, plan) -> y          x [..., K] -> [..., N]
    quant_triton::scaled_ring(x, tensors, plan) -> y            x [..., K] -> [..., N]
    quant_triton::embedding(ids, tensors, recipe) -> rows       ids [...] -> [..., K]

``recipe`` is ``Recipe.text()`` and ``plan`` ``ScaledPlan.text()``; ``tensors`` are the buffers in
the order of their names; ``way`` says which kernels run: "plain", "dense" or "gluon". Activations
that a recipe quantizes to a type the chip does not multiply are rounded to it and back first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant_core.kernels.calls import check_input, unobserved
from quant_kernels_triton.plain_run import run_dense, run_embedding, run_gemm, run_grouped
from quant_kernels_triton.recipe import Recipe, recipe_from_text
from quant_kernels_triton.replay import kind_of, replayable, replayed
from quant_kernels_triton.rounding_run import rounded
from quant_kernels_triton.scaled_plan import scaled_from_text
from quant_kernels_triton.scaled_run import run_scaled

__all__ = ["bound_embedding", "bound_grouped", "bound_linear", "bound_ring", "bound_scaled"]

_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define("linear(Tensor x, Tensor[] tensors, str recipe, str way) -> Tensor")
_lib.define(
    "grouped_linear(Tensor x, Tensor experts, Tensor[] tensors, str recipe, str way) -> Tensor"
)
_lib.define("scaled_linear(Tensor x, Tensor[] tensors, str plan) -> Tensor")
_lib.define("scaled_ring(Tensor x, Tensor[] tensors, str plan) -> Tensor")
_lib.define("embedding(Tensor ids, Tensor[] tensors, str recipe) -> Tensor")


def _gluon(r: Recipe, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    from quant_kernels_triton.gluon_run import run_gluon  # needs the Gluon dialect

    return run_gluon(r, x, tensors)


_WAYS: dict[str, Callable[[Recipe, Tensor, Sequence[Tensor]], Tensor]] = {
    "plain": run_gemm,
    "dense": run_dense,
    "gluon": _gluon,
}


def _emulated(x: Tensor, r: Recipe) -> Tensor:
    """x [T, K] as the recipe's activations represent it."""
    return rounded(r.input, x) if r.input else x


def _linear(x: Tensor, tensors: list[Tensor], recipe: str, way: str) -> Tensor:
    r = recipe_from_text(recipe)
    flat = _emulated(x.reshape(-1, r.k_in), r)
    return _WAYS[way](r, flat, tensors).view(*x.shape[:-1], r.n)


def _grouped_linear(
    x: Tensor, experts: Tensor, tensors: list[Tensor], recipe: str, way: str
) -> Tensor:
    r = recipe_from_text(recipe)
    x = _emulated(x, r)
    if way == "gluon":
        from quant_kernels_triton.gluon_experts_run import run_stack

        return run_stack(r, x, experts, tensors)
    return run_grouped(r, x, experts, tensors)


def _embedding(ids: Tensor, tensors: list[Tensor], recipe: str) -> Tensor:
    r = recipe_from_text(recipe)
    return run_embedding(r, ids, tensors).view(*ids.shape, r.k)


def _scaled_linear(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    p = scaled_from_text(plan)
    return run_scaled(p, x.reshape(-1, p.k), tensors).view(*x.shape[:-1], p.n)


def _scaled_ring(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    from quant_kernels_triton.scaled_ring_run import run_ring  # needs the Gluon dialect

    p = scaled_from_text(plan)
    return run_ring(p, x.reshape(-1, p.k), tensors).view(*x.shape[:-1], p.n)


def _fake_scaled(x: Tensor, tensors: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], scaled_from_text(plan).n)


def _fake_linear(x: Tensor, tensors: list[Tensor], recipe: str, way: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], recipe_from_text(recipe).n)


def _fake_grouped(
    x: Tensor, experts: Tensor, tensors: list[Tensor], recipe: str, way: str
) -> Tensor:
    return x.new_empty(x.shape[0], recipe_from_text(recipe).n)


def _fake_embedding(ids: Tensor, tensors: list[Tensor], recipe: str) -> Tensor:
    r = recipe_from_text(recipe)
    dtype = getattr(torch, r.act_dtype)
    return torch.empty(*ids.shape, r.k, dtype=dtype, device=ids.device)


for _name, _impl, _fake in (
    ("linear", replayable(_linear), _fake_linear),
    ("grouped_linear", _grouped_linear, _fake_grouped),
    ("scaled_linear", replayable(_scaled_linear), _fake_scaled),
    ("scaled_ring", replayable(_scaled_ring), _fake_scaled),
    ("embedding", _embedding, _fake_embedding),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_triton::{_name}", _fake, lib=_lib)


def bound_linear(text: str, way: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    """What ``bind`` gives for a linear layer, with the first three arguments fixed."""
    if unobserved(x):
        return replayed(_linear, (text, way), tensors, x, k)
    check_input(x, k)
    return torch.ops.quant_triton.linear(x, tensors, text, way)  # type: ignore[no-any-return]


def _again(x: Tensor, given: Sequence[Tensor], text: str, way: str, *kind: object) -> Tensor:
    """What ``replay`` runs of a stack; the last one given are the experts of the rows."""
    return _grouped_linear(x, given[-1], list(given[:-1]), text, way)


def bound_grouped(
    text: str, way: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor
) -> Tensor:
    """The same for a stack of experts."""
    if unobserved(x):
        names = (text, way, *kind_of(experts))
        return replayed(_again, names, [*tensors, experts], x, k)
    check_input(x, k)
    return torch.ops.quant_triton.grouped_linear(x, experts, tensors, text, way)  # type: ignore[no-any-return]


def bound_scaled(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    """The same for a linear layer with 8-bit activations."""
    if unobserved(x):
        return replayed(_scaled_linear, (text,), tensors, x, k)
    check_input(x, k)
    return torch.ops.quant_triton.scaled_linear(x, tensors, text)  # type: ignore[no-any-return]


def bound_ring(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    """The same in Gluon."""
    if unobserved(x):
        return replayed(_scaled_ring, (text,), tensors, x, k)
    check_input(x, k)
    return torch.ops.quant_triton.scaled_ring(x, tensors, text)  # type: ignore[no-any-return]


def bound_embedding(text: str, tensors: list[Tensor], ids: Tensor) -> Tensor:
    """The same for an embedding."""
    return torch.ops.quant_triton.embedding(ids, tensors, text)  # type: ignore[no-any-return]
