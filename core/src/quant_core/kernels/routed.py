"""Routed experts as one call, where one kernel runs gate, up and down at this number of rows.

    rows sorted by expert once | gate, up | gating | down | each token's rows weighted and added

Stacks run one by one sort the rows three times, copy every token as often as it is routed, and put
rows back between the products only to sort them again. The kernel offers it by ``bind_experts``
(``kernels.base``); which kernel runs how many rows is each stack's own choice, so the call stands
aside where they differ, and the stacks run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quant_core.kernels.failed import Whose
from quant_core.kernels.family import Family
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.kernels.base import Kernel
    from quant_core.kernels.choose import Decision

__all__ = ["ExpertsRun"]

Gating = Callable[["Tensor", "Tensor"], "Tensor"]


class ExpertsRun:
    """The call for three stacks.

    Args:
        kernels, ops: of gate, up and down.
        layer, trace: of gate, for errors.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        ops: Sequence[OpSpec],
        layer: str = "",
        trace: tuple[Decision, ...] = (),
    ) -> None:
        self.kernels, self.ops = tuple(kernels), tuple(ops)
        self.layer, self.trace = layer, trace
        self._runs: dict[tuple[str, ...], tuple[Callable[..., Any], Whose] | None] = {}

    def of(self, kernels: Sequence[Kernel], ops: Sequence[OpSpec]) -> bool:
        """Whether it was made for these."""
        same = all(a is b for a, b in zip(self.kernels, kernels, strict=True))
        return same and self.ops == tuple(ops)

    def _run(self, rows: int) -> tuple[Callable[..., Any], Whose] | None:
        members = [k.member(rows) if isinstance(k, Family) else k for k in self.kernels]
        names = tuple("" if m is None else m.name for m in members)
        if names not in self._runs:
            first, same = members[0], len(set(names)) == 1
            self._runs[names] = None if first is None or not same else self._bound(first)
        return self._runs[names]

    def _bound(self, kernel: Kernel) -> tuple[Callable[..., Any], Whose] | None:
        ask = getattr(kernel, "bind_experts", None)
        if ask is None:
            return None
        whose = Whose(
            kernel=kernel,
            op=self.ops[0],
            layer=self.layer,
            trace=self.trace,
            method="bind_experts",
        )
        with whose.bound():
            run = ask(self.ops)
        return None if run is None else (run, whose)

    def __call__(
        self, buffers: Sequence[list[Tensor]], gating: Gating, x: Tensor, index: Tensor,
        weights: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """sum_j weights[t, j] * down_e(gating(gate_e(x[t]), up_e(x[t]))), e = index[t, j].

        Shapes:  x [T, H], index [T, k] (no expert of these: contributes nothing), weights [T, k]
                 -> [T, H], or None where the stacks have to run one by one
        """
        if torch.compiler.is_compiling() or not index.numel():
            return None
        found = self._run(index.numel())
        if found is None:
            return None
        run, whose = found
        try:
            return run(buffers, gating, x, index, weights)  # type: ignore[no-any-return]
        except Exception as err:
            whose.failed(err, x)
            raise
