"""Rounding activations as an operation of its own: any kernel package may offer it.

    op "quantize"    operand "input", size k; features "input_scale", "input_zero" where stored,
                     "starts_early" (``Kernel``) where the kernel behind does;
                     size experts where every expert has stored values of its own
    bind(op)         run([], x [..., K], scale | None, zero | None, experts | None) -> x^

x^ has the shape and dtype of x and holds what the codes of x stand for: bit for bit what
``activations.fake_quantize`` gives, which is the kernel ``torch_round`` that is always there. With
experts x is [T, K], the stored values lie behind each other, [E, ...], and ``experts`` [T] says
whose hold for each token; tokens of no expert may be anything.

``cheapest`` picks among the candidates. A restriction of kernels that names none of them, as one
for matmuls does not, leaves this choice free; "quantize=name" restricts it alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import KernelError
from quant_core.kernels.activations import fake_quantize, static_shape, unsupported_input
from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.between import Weightless
from quant_core.registry import Registry
from quant_core.spec import CANONICAL, OpSpec, QuantSpec
from quant_core.spec_json import from_text, to_text

if TYPE_CHECKING:
    pass

__all__ = ["TorchRound", "Weightless", "cheapest", "quantize_op"]

_ROWS = 16
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


def quantize_op(op: OpSpec, *, starts_early: bool = False) -> OpSpec:
    """What is asked of a quantizer for the activations of ``op``.

    Args:
        starts_early: the kernel behind is one of ``Kernel.starts_early``.
    """
    spec = op.operand("input")
    assert spec is not None, "asked for operations with quantized activations only"
    stored = frozenset(static_shape(op))
    experts = op.size("experts", 0) if stored else 0
    return OpSpec(
        op="quantize",
        operands=(("input", spec),),
        packing=CANONICAL,
        sizes=(("k", op.size("k")), *((("experts", experts),) if experts else ())),
        act_dtype=op.act_dtype,
        device=op.device,
        features=stored | ({"starts_early"} if starts_early else set()),
    )


def cheapest(
    asked: OpSpec,
    registry: Registry,
    *,
    kernels: str | Sequence[str] | None = None,
    module: str = "",
) -> tuple[Kernel, OpSpec, Accepted]:
    """Who runs ``asked``, an operation that helps another one: the cheapest for sixteen rows.

    A restriction of kernels that names none of the candidates leaves this choice free.

    Args:
        kernels, module: as for ``choose``.

    Raises:
        KernelError: ``Q-KERNEL-NONE`` if "<op>=" names kernels that cannot.
    """
    from quant_core.kernels.choose import accepting

    given = os.environ.get("QUANT_KERNELS") if kernels is None else kernels
    names = [n.strip() for n in (given.split(",") if isinstance(given, str) else given or ())]
    own = [n for n in names if n.startswith(f"{asked.op}=")]
    found = accepting(asked, registry, kernels=own, module=module)
    if not found:
        raise KernelError(
            f"{asked.op} [{', '.join(s.label for _, s in asked.operands)}]: {', '.join(own)} names "
            "no kernel that runs it. Name another, or leave it out.",
            code="Q-KERNEL-NONE",
            actual=own,
        )
    bare = [c for c in found if c[0].name in names]
    return min(bare or found, key=lambda c: (c[2].cost_at(_ROWS), c[0].name))


class TorchRound(Weightless):
    """The reference: a dozen torch ops, every spec, every device."""

    name = "torch_round"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if op.op != "quantize":
            return Rejected(axis="op", have=op.op, need="quantize")
        if odd := unsupported_input(op):
            return odd
        per_row = op.size("k") * _BYTES_PER_ELEMENT / _GBS / 1e3
        costs = tuple(
            (m, round(_FIXED_US + min(m, 1 << 16) * per_row, 1))
            for m in (1, 16, 64, 256, 1024, 4096, 16384, 1 << 31)
        )
        return Accepted(cost=costs[0][1], costs=costs, note="a dozen torch operations")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        text = to_text(op.operand("input"))
        if op.size("experts", 0):
            return functools.partial(_run_experts, text)
        return functools.partial(_run, text)


def _run(
    spec: str, buffers: list[Tensor], x: Tensor, scale: Tensor | None = None,
    zero: Tensor | None = None, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.ops.quant_core.round_input(x, scale, zero, spec)  # type: ignore[no-any-return]


def _run_experts(
    spec: str, buffers: list[Tensor], x: Tensor, scale: Tensor, zero: Tensor | None,
    experts: Tensor,
) -> Tensor:  # fmt: skip
    rounded = x.clone()
    for e in range(scale.shape[0]):
        own = None if zero is None else zero[e]
        mine = torch.ops.quant_core.round_input(x, scale[e], own, spec)
        rounded = torch.where((experts == e).unsqueeze(1), mine, rounded)
    return rounded
