"""Quantized activations for kernels that take float ones: round x first, as the reference does.

    x -> codes of the "input" operand and back -> kernel of the weights alone

The result is what the operation means: the kernel only multiplies the rounded values in the dtype
of x instead of their codes. So every element type of activations runs on every weight kernel of a
shared storage order, also where the chip has no product of such codes; the trace says "emulated".
Rounding is one opaque op, ``quant_core::round_input``.

Offered for kernels that declare a ``layout`` only. A stored scale becomes a buffer behind those of
the kernel, under a layout name of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.kernels.activations import fake_quantize, static_shape, unsupported_input
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.measured import answer as answer_of
from quant_core.spec import OpSpec, QuantSpec
from quant_core.spec_json import from_text, to_text

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["RoundedInput", "without_input"]

_STORED = ("input_scale", "input_zero")
_FIXED_US = 25.0  # a dozen small launches in a CUDA graph
_BYTES_PER_ELEMENT = 50.0  # of x, in passes of torch's own ops
_GBS = 2500.0

_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("round_input(Tensor x, Tensor? scale, Tensor? zero, str spec) -> Tensor")


@functools.lru_cache(maxsize=512)
def _spec(text: str) -> QuantSpec:
    spec: QuantSpec = from_text(text)
    return spec


def _round(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: str) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    rounded = fake_quantize(flat, _spec(spec), scale, zero)
    return (rounded.clone() if rounded is flat else rounded).view(x.shape)


def _fake(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: str) -> Tensor:
    return x.new_empty(x.shape)


_lib.impl("round_input", _round, "CompositeExplicitAutograd")
torch.library.register_fake("quant_core::round_input", _fake, lib=_lib)


def without_input(op: OpSpec) -> OpSpec:
    """``op`` for float activations."""
    return replace(
        op,
        operands=tuple((r, s) for r, s in op.operands if r != "input"),
        features=op.features - frozenset(_STORED),
    )


class RoundedInput:
    """``inner`` behind the rounding of its activations."""

    def __init__(self, inner: Kernel, *, stored: bool) -> None:
        self.inner = inner
        self.name = f"{inner.name}@rounded"
        layout = str(getattr(inner, "layout", ""))
        self.layout = f"{layout}+input" if stored else layout

    @staticmethod
    def of(inner: Kernel, op: OpSpec) -> RoundedInput | None:
        """The wrapped kernel where it is of use: float activations accepted, these rejected."""
        spec = op.operand("input")
        if spec is None or not getattr(inner, "layout", "") or op.op == "embedding":
            return None
        return RoundedInput(inner, stored=bool(static_shape(op)))

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        spec = op.operand("input")
        if spec is None:
            return Rejected(axis="operands", have="no input", need="quantized activations")
        if odd := unsupported_input(op):
            return odd
        if odd_sums := sorted({"out_scale", "acc_bias"} & op.features):
            return Rejected(axis="features", have=", ".join(odd_sums), need="sums of their own")
        said = answer_of(self.inner, without_input(op))
        if isinstance(said, Rejected):
            return said
        per_row = op.size("k") * _BYTES_PER_ELEMENT / _GBS / 1e3

        def more(rows: int, cost: float) -> float:
            return cost + _FIXED_US + min(rows, 1 << 16) * per_row

        note = f"{spec.element.name} activations emulated: rounded to codes and back"
        return replace(
            said,
            cost=more(1, said.cost),
            costs=tuple((m, more(m, c)) for m, c in said.costs),
            note=f"{said.note}; {note}" if said.note else note,
        )

    def _names(self, op: OpSpec) -> tuple[str, ...]:
        return tuple(static_shape(op))

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        out = self.inner.allocate(without_input(op), device)
        lead = (op.size("experts"),) if op.size("experts", 0) else ()
        for name, (shape, dtype) in static_shape(op).items():
            empty = torch.empty((*lead, *shape), dtype=dtype, device=device)
            poison = float("nan") if dtype.is_floating_point else -1 if dtype.is_signed else 255
            out[name] = empty.fill_(poison)
        return out

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        own = self._names(op)
        weights = {n: t for n, t in buffers.items() if n not in own}
        bare = replace(part, input_scale=None, input_zero=None)
        self.inner.load_(weights, without_input(op), bare, at)
        for name in own:
            target = buffers[name][at["expert"]] if "expert" in at else buffers[name]
            target.copy_(getattr(part, name))

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        own = self._names(op)
        weights = {n: t for n, t in buffers.items() if n not in own}
        back = self.inner.restore(weights, without_input(op))
        return replace(back, **{n: buffers[n].clone() for n in own})  # type: ignore[arg-type]

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        inner, spec = self.inner.bind(without_input(op)), op.operand("input")
        if self._names(op) and op.size("experts", 0):
            return functools.partial(_run_experts, inner, to_text(spec), self._names(op))
        return functools.partial(_run, inner, to_text(spec), self._names(op))


def _run(
    inner: Callable[..., Tensor], spec: str, own: tuple[str, ...], values: list[Tensor], x: Tensor,
    *rest: Tensor,
) -> Tensor:  # fmt: skip
    weights = values[: len(values) - len(own)]
    held = dict(zip(own, values[len(weights) :]))
    scale, zero = held.get("input_scale"), held.get("input_zero")
    return inner(weights, torch.ops.quant_core.round_input(x, scale, zero, spec), *rest)


def _run_experts(
    inner: Callable[..., Tensor], spec: str, own: tuple[str, ...], values: list[Tensor], x: Tensor,
    experts: Tensor,
) -> Tensor:  # fmt: skip
    """Stored scales of experts: each token under its own expert's."""
    weights = values[: len(values) - len(own)]
    held = dict(zip(own, values[len(weights) :]))
    rounded = x.clone()
    for e in range(held["input_scale"].shape[0]):
        zero = held["input_zero"][e] if "input_zero" in held else None
        mine = torch.ops.quant_core.round_input(x, held["input_scale"][e], zero, spec)
        rounded = torch.where((experts == e).unsqueeze(1), mine, rounded)
    return inner(weights, rounded, experts)
