"""The kernels on weights in the order "tiles16" behind core's contract.

triton_wna16    plain Triton: every element, any GPU; linear, grouped_linear, embedding
triton_dense    one expansion to 16 bits, then torch's matmul: many rows
gluon_wna16     Gluon on Hopper: 4- and 8-bit codes, two kernels by number of rows; linear
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.storage import Tiles16, misused
from quant_core.spec import OpSpec
from quant_kernels_triton.costs import costs
from quant_kernels_triton.gluon_plan import plan
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.recipe import Recipe, describe, recipe_from_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense", "GluonTiles", "PlainTriton", "TilesKernel"]


_EMULATION_US = 3.5  # of rounding activations in one kernel, besides
_EMULATED_PER_US = 3.5e5  # elements of x: read, held for the scale of their token, written
_MOST_ROWS = 8192  # what the bucket without a limit stands for


@functools.lru_cache(maxsize=512)
def _costs(
    kernel: str, text: str, device: tuple[str, str]
) -> tuple[tuple[tuple[int, float], ...], bool]:
    """``costs``, of which one choice asks several times, and of every layer alike."""
    return costs(kernel, recipe_from_text(text), device)


class TilesKernel(Tiles16, ABC):
    """What the kernels of this package on "tiles16" share: refusals."""

    name = ""
    OPS: tuple[str, ...] = ("linear",)

    def _recipe(self, op: OpSpec) -> Recipe | Rejected:
        if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
            return Rejected(axis="device", have=op.device[0], need="cuda")
        recipe = describe(op, ops=self.OPS)
        if isinstance(recipe, Rejected) or not recipe.input:
            return recipe
        from quant_core.kernels.activations import unsupported_input

        return unsupported_input(op) or recipe

    def _bound(self, op: OpSpec) -> Recipe:
        recipe = self._recipe(op)
        if isinstance(recipe, Rejected):
            raise misused(self.name, recipe)
        return recipe

    def _accepted(self, op: OpSpec, recipe: Recipe) -> Accepted:
        table, measured = _costs(self.name, recipe.text(), op.device)
        notes = [] if measured else ["no measured table for this device"]
        acts = op.operand("input")
        if acts is not None:
            each = recipe.k_in / _EMULATED_PER_US
            table = tuple(
                (bound, round(us + _EMULATION_US + min(bound, _MOST_ROWS) * each, 2))
                for bound, us in table
            )
            notes.append(f"{acts.element.name} activations emulated in {op.act_dtype}")
        return Accepted(cost=table[0][1], costs=table, note="; ".join(notes))

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        recipe = self._recipe(op)
        return recipe if isinstance(recipe, Rejected) else self._accepted(op, recipe)

    @abstractmethod
    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        """The function that runs ``op``."""


class PlainTriton(TilesKernel):
    """See ``plain``. Weights are computed in float32 and rounded once to the type of x."""

    name = "triton_wna16"
    OPS = ("linear", "grouped_linear", "embedding")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_triton import ops

        recipe = self._bound(op)
        text = recipe.text()
        if op.op == "embedding":
            return functools.partial(ops.bound_embedding, text)
        if op.op == "grouped_linear":
            return functools.partial(ops.bound_grouped, text, "plain", recipe.k_in)
        return functools.partial(ops.bound_linear, text, "plain", recipe.k_in)


class Dense(TilesKernel):
    """All weights expanded to the type of x on every call, then ``F.linear``: for many rows."""

    name = "triton_dense"

    def _accepted(self, op: OpSpec, recipe: Recipe) -> Accepted:
        from dataclasses import replace

        width = 4 if op.act_dtype == "float32" else 2
        answer = super()._accepted(op, recipe)
        return replace(answer, workspace_bytes=recipe.n * recipe.k * width)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_triton import ops

        recipe = self._bound(op)
        return functools.partial(ops.bound_linear, recipe.text(), "dense", recipe.k_in)


@functools.cache
def gluon_missing() -> str:
    """What the installed Triton lacks for the Gluon kernels; "" if nothing.

    Read from its files: importing Triton takes longer than all the rest of a choice.
    """
    from importlib.util import find_spec

    found = find_spec("triton")
    if found is None or not found.submodule_search_locations:
        return "no Triton"
    language = Path(found.submodule_search_locations[0]) / "experimental/gluon/language"
    listed = language / "__init__.py"
    if not listed.is_file() or not (language / "nvidia/hopper").exists():
        return "no triton.experimental.gluon"
    names = set(re.findall(r"^ +(\w+),$", listed.read_text("utf-8"), re.MULTILINE))
    lacks = [n for n in ("warp_specialize", "inline_asm_elementwise", "join") if n not in names]
    if not names & {"barrier", "thread_barrier"}:
        lacks.append("barrier")
    return f"Gluon without {', '.join(lacks)}" if lacks else ""


class GluonTiles(TilesKernel):
    """See ``gluon_ring`` and ``gluon_ws``. Weights are rounded once to the type of x."""

    name = "gluon_wna16"
    OPS = ("linear", "grouped_linear")

    def _recipe(self, op: OpSpec) -> Recipe | Rejected:
        if op.device[0] != "cuda":
            return Rejected(axis="device", have=op.device[0], need="cuda")
        if not op.device[1].startswith("9."):
            have = op.device[1] or "unknown"
            return Rejected(axis="compute capability", have=have, need="9.0 (Hopper)")
        recipe = super()._recipe(op)
        if isinstance(recipe, Rejected):
            return recipe
        planned = plan(recipe)
        if isinstance(planned, Rejected):
            return planned
        if missing := gluon_missing():
            return Rejected(axis="triton", have=missing, need="Triton 3.6 or newer")
        return recipe

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_triton import ops

        recipe = self._bound(op)
        bound = ops.bound_grouped if op.op == "grouped_linear" else ops.bound_linear
        return functools.partial(bound, recipe.text(), "gluon", recipe.k_in)

    def bind_experts(self, ops: Sequence[OpSpec]) -> Callable[..., Tensor | None] | None:
        """Routed experts as one call; ``quant_core.kernels.routed``."""
        recipes = [self._recipe(op) for op in ops]
        if any(isinstance(r, Rejected) or r.input for r in recipes):
            return None
        from quant_kernels_triton.gluon_experts_run import bound_experts

        texts = tuple(r.text() for r in recipes if isinstance(r, Recipe))
        return functools.partial(bound_experts, texts)
