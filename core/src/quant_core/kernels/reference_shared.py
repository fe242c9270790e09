"""Layers of one x in the reference kernel: every distinct input spec is quantized once.

What the layers have in common is decided by value on every call, so layers whose stored scales
become equal, or unlike, after loading are still right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quant_core.kernels.calls import check_input
from quant_core.kernels.reference import _finish, _multiply, _named, _names, _prepare
from quant_core.kernels.transforms import transform_shapes
from quant_core.spec import OpSpec
from quant_core.spec_json import op_from_text, to_text

__all__ = ["bind_shared"]


def _same_input(
    a: OpSpec, held: Mapping[str, Tensor], b: OpSpec, other: Mapping[str, Tensor]
) -> bool:
    """Whether ``_prepare`` makes the same of one x for both: equal specs, equal stored values."""
    names = {n for op in (a, b) for n in transform_shapes(op)} | {"input_scale", "input_zero"}
    return (
        a.operand("input") == b.operand("input")
        and a.transforms == b.transforms
        and ("out_scale" in a.features) == ("out_scale" in b.features)
        and all((n in held) == (n in other) for n in names)
        and all(torch.equal(held[n], other[n]) for n in names if n in held)
    )


def _linear_shared(x: Tensor, tensors: list[Tensor], op_texts: Sequence[str]) -> list[Tensor]:
    """Layers of one x: every distinct input spec is transformed and quantized once."""
    flat, first = x.reshape(-1, x.shape[-1]), 0
    out: list[Tensor] = []
    made: list[tuple[OpSpec, Mapping[str, Tensor], Tensor]] = []
    for op in map(op_from_text, op_texts):
        count = len(_names(op))
        buffers = _named(op, tensors[first : first + count])
        first += count
        ready = next((r for o, b, r in made if _same_input(op, buffers, o, b)), None)
        if ready is None:
            ready = _prepare(flat, op, buffers)
            made.append((op, buffers, ready))
        y = _finish(_multiply(ready, x.dtype, op, buffers), op, buffers)
        out.append(y.view(*x.shape[:-1], op.size("n")))
    return out


def _fake_shared(x: Tensor, tensors: list[Tensor], op_texts: Sequence[str]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], op_from_text(text).size("n")) for text in op_texts]


_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("linear_shared_ref(Tensor x, Tensor[] tensors, str[] ops) -> Tensor[]")
_lib.impl("linear_shared_ref", _linear_shared, "CompositeExplicitAutograd")
torch.library.register_fake("quant_core::linear_shared_ref", _fake_shared, lib=_lib)


def _run_shared(
    texts: tuple[str, ...], k: int, tensors: list[list[Tensor]], x: Tensor
) -> list[Tensor]:
    check_input(x, k)
    flat = [t for mine in tensors for t in mine]
    return torch.ops.quant_core.linear_shared_ref(x, flat, texts)  # type: ignore[no-any-return]


def bind_shared(ops: Sequence[OpSpec]) -> Callable[..., list[Tensor]] | None:
    """One call for linear layers of one input; None where none of them quantizes it."""
    if not any(op.operand("input") or op.transforms for op in ops):
        return None
    return functools.partial(_run_shared, tuple(map(to_text, ops)), ops[0].size("k"))
