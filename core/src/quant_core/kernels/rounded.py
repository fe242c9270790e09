"""Quantized activations for kernels that take float ones: round x first, as the reference does.

    x -> codes of the "input" operand and back -> kernel of the weights alone

The result is what the operation means: the kernel only multiplies the rounded values in the dtype
of x instead of their codes. So every element type of activations runs on every weight kernel, also
where the chip has no product of such codes; the trace says "emulated", and by whom: rounding is an
operation of its own (``kernels.quantizer``).

A stored scale becomes a buffer behind those of the kernel, under a layout name of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.kernels.activations import static_shape, unsupported_input
from quant_core.kernels.ahead import begin, standby
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.measured import answer as answer_of
from quant_core.kernels.quantizer import TorchRound, quantize_op
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from quant_core.tensors import LayerTensors

__all__ = ["RoundedInput", "without_input"]

_STORED = ("input_scale", "input_zero")


def without_input(op: OpSpec) -> OpSpec:
    """``op`` for float activations."""
    return replace(
        op,
        operands=tuple((r, s) for r, s in op.operands if r != "input"),
        features=op.features - frozenset(_STORED),
    )


class RoundedInput:
    """``inner`` behind the rounding of its activations by ``quantizer``."""

    def __init__(self, inner: Kernel, *, stored: bool, quantizer: Kernel | None = None) -> None:
        self.inner = inner
        self.quantizer: Kernel = TorchRound() if quantizer is None else quantizer
        self.name = f"{inner.name}@rounded"
        layout = str(getattr(inner, "layout", ""))
        self.layout = f"{layout}+input" if stored and layout else layout

    @staticmethod
    def of(
        inner: Kernel, op: OpSpec, quantizer: Callable[[], Kernel] = TorchRound
    ) -> RoundedInput | None:
        """The wrapped kernel where it is of use: float activations accepted, these rejected.

        Args:
            quantizer: asked for the kernel that rounds, where it is of use.
        """
        spec = op.operand("input")
        if spec is None or op.op == "embedding":
            return None
        if unsupported_input(op):
            return None
        return RoundedInput(inner, stored=bool(static_shape(op)), quantizer=quantizer())

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
        by = answer_of(self.quantizer, self._asked(op))
        if isinstance(by, Rejected):
            return by
        bounds = {m for m, _ in (*said.costs, *by.costs)} if said.costs else set()
        name = self.quantizer.name
        note = f"{spec.element.name} activations emulated: rounded to codes and back by {name}"
        return replace(
            said,
            cost=said.cost + by.cost_at(1),
            costs=tuple((m, said.cost_at(m) + by.cost_at(m)) for m in sorted(bounds)),
            note=f"{said.note}; {note}" if said.note else note,
        )

    def _asked(self, op: OpSpec) -> OpSpec:
        early = bool(getattr(self.inner, "starts_early", False))
        return quantize_op(op, starts_early=early)

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
        inner, own = self.inner.bind(without_input(op)), self._names(op)
        rounds = self.quantizer.bind(self._asked(op))
        if own and op.size("experts", 0):
            return functools.partial(_run_experts, inner, rounds, own)
        return functools.partial(_run, inner, rounds, own)


_Run = Callable[..., Tensor]


def _run(
    inner: _Run, rounds: _Run, own: tuple[str, ...], values: list[Tensor], x: Tensor,
    *rest: Tensor,
) -> Tensor:  # fmt: skip
    cut = len(values) - len(own)
    if not torch.compiler.is_compiling() and standby.idle and not rest:
        begin(("rounded", id(inner)), inner, values[:cut], x)
    if not own:
        return inner(values, rounds([], x), *rest)
    return inner(values[:cut], rounds([], x, *values[cut:]), *rest)


def _run_experts(
    inner: _Run, rounds: _Run, own: tuple[str, ...], values: list[Tensor], x: Tensor,
    experts: Tensor,
) -> Tensor:  # fmt: skip
    """Stored scales of experts: each token under its own expert's."""
    cut = len(values) - len(own)
    zero = values[cut + 1] if len(own) > 1 else None
    return inner(values[:cut], rounds([], x, values[cut], zero, experts), experts)
