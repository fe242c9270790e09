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

from quant_core.kernels.family import Family
from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.kernels.base import Kernel

__all__ = ["ExpertsRun"]

Gating = Callable[["Tensor", "Tensor"], "Tensor"]


class ExpertsRun:
    """The call for three stacks.

    Args:
        kernels, ops: of gate, up and down.
    """

    def __init__(self, kernels: Sequence[Kernel], ops: Sequence[OpSpec]) -> None:
        self.kernels, self.ops = tuple(kernels), tuple(ops)
        self._runs: dict[tuple[str, ...], Callable[..., Any] | None] = {}

    def of(self, kernels: Sequence[Kernel], ops: Sequence[OpSpec]) -> bool:
        """Whether it was made for these."""
        same = all(a is b for a, b in zip(self.kernels, kernels, strict=True))
        return same and self.ops == tuple(ops)

    def _run(self, rows: int) -> Callable[..., Any] | None:
        members = [k.member(rows) if isinstance(k, Family) else k for k in self.kernels]
        names = tuple("" if m is None else m.name for m in members)
        if names not in self._runs:
            ask = getattr(members[0], "bind_experts", None)
            self._runs[names] = None if ask is None or len(set(names)) != 1 else ask(self.ops)
        return self._runs[names]

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
        run = self._run(index.numel())
        return None if run is None else run(buffers, gating, x, index, weights)
