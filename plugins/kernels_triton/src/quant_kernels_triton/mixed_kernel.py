"""The mixed kernels behind core's contract: 4- and 8-bit weights by 8-bit activations on Hopper.

gluon_a8         activations under a scale per token; shares the buffers of "tiles16"
gluon_a8_stored  under a stored scale, which is one more buffer, as core's rounding has it
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.storage import Tiles16, misused
from quant_core.spec import OpSpec
from quant_kernels_triton.costs import BUCKETS
from quant_kernels_triton.gluon_stack_a8 import stack_a8_us
from quant_kernels_triton.mixed_plan import MixedPlan, costs, describe_mixed
from quant_kernels_triton.wna16 import gluon_missing

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.kernels.rounded import RoundedInput
    from quant_core.tensors import LayerTensors

__all__ = ["Mixed", "MixedStored"]


def _plan(op: OpSpec, static: bool) -> MixedPlan | Rejected:
    if op.device[0] != "cuda":
        return Rejected(axis="device", have=op.device[0], need="cuda")
    if not op.device[1].startswith("9."):
        have = op.device[1] or "unknown"
        return Rejected(axis="compute capability", have=have, need="9.0 (Hopper)")
    p = describe_mixed(op)
    if isinstance(p, Rejected):
        return p
    if p.static != static:
        have = "a stored scale" if p.static else "run-time scales"
        return Rejected(axis="input", have=have, need="the other")
    if missing := gluon_missing():
        return Rejected(axis="triton", have=missing, need="Triton 3.6 or newer")
    return p


_MOST_ROWS = 8192  # what the bucket without a limit stands for


def _accepted(p: MixedPlan) -> Accepted:
    if p.recipe.experts and p.sub == 1:
        table = tuple((b, round(stack_a8_us(p, min(b, _MOST_ROWS)), 1)) for b in BUCKETS)
    else:
        table = costs(p, BUCKETS)
    kind = "int8" if p.integer else "fp8_e4m3"
    note = f"multiplied as {kind}; activations quantized in one kernel"
    return Accepted(costs=table, cost=table[0][1], note=note)


def _bound(name: str, op: OpSpec, static: bool) -> Callable[..., Tensor]:
    from quant_kernels_triton import mixed_ops

    p = _plan(op, static)
    if isinstance(p, Rejected):
        raise misused(name, p)
    run = mixed_ops.bound_grouped if op.op == "grouped_linear" else mixed_ops.bound_linear
    return functools.partial(run, p.text(), p.recipe.k_in)


class Mixed(Tiles16):
    """See ``mixed_ring`` and ``mixed_ws``."""

    name = "gluon_a8"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = _plan(op, False)
        return p if isinstance(p, Rejected) else _accepted(p)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return _bound(self.name, op, False)

    def bind_experts(self, ops: Sequence[OpSpec]) -> Callable[..., Tensor | None] | None:
        """Routed experts as one call; ``quant_core.kernels.routed``."""
        plans = [_plan(op, False) for op in ops]
        if any(isinstance(p, Rejected) or p.sub != 1 for p in plans):
            return None
        from quant_kernels_triton.gluon_experts_a8_run import bound_experts_a8

        texts = tuple(p.text() for p in plans if isinstance(p, MixedPlan))
        return functools.partial(bound_experts_a8, texts)


class MixedStored(Tiles16):
    """The same under a stored activation scale."""

    name = "gluon_a8_stored"
    layout = "tiles16+input"

    def _storage(self) -> RoundedInput:
        from quant_core.kernels.rounded import RoundedInput

        return RoundedInput(Mixed(), stored=True, quantizer=self)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = _plan(op, True)
        return p if isinstance(p, Rejected) else _accepted(p)

    def allocate(self, op: OpSpec, device: str = "cpu") -> dict[str, Tensor]:
        return self._storage().allocate(op, device)

    def load_(
        self, buffers: dict[str, Tensor], op: OpSpec, part: LayerTensors, at: Mapping[str, int]
    ) -> None:
        self._storage().load_(buffers, op, part, at)

    def restore(self, buffers: Mapping[str, Tensor], op: OpSpec) -> LayerTensors:
        return self._storage().restore(buffers, op)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return _bound(self.name, op, True)
