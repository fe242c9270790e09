"""Float parameters of a model are finite: norms, biases, routers, embeddings, as they are loaded.

All of a load are looked at in one call (``kernels.finite``), in the end and in the model's dtype:
so what a cast to float16 made infinite is found too. On a CPU those of more than ``MOST`` bytes,
which are embeddings and output layers, are left out: a load whose weights stay in their files does
not read them, and would take three times as long (2.1 GB of a Llama-3-8B: 0.08 s beside 0.05 s);
one that copies took 9 % more. ``quant verify`` looks at everything.

Buffers are left alone; minus infinity is an ordinary number in a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_core.engines.transformers_names import Slot
from quant_core.errors import LayoutError, summarize
from quant_core.finite import float_error
from quant_core.kernels.finite import look_of
from quant_core.plan import Plan

__all__ = ["MOST", "Floats"]

MOST = 4 << 20  # 0.1 ms; routers of 256 experts have 3.7 MB
_LOOKED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(slots=True)
class Floats:
    """The float parameters of a load, each added when it is filled."""

    plan: Plan
    held: dict[str, Tensor] = field(default_factory=dict)  # name in the model -> value

    def add(self, target: str, value: Tensor) -> None:
        """Have ``value`` looked at, unless that takes too long."""
        if value.is_floating_point() and (value.nbytes <= MOST or value.device.type != "cpu"):
            self.held[target] = value

    def check(self, slots: dict[str, Slot]) -> None:
        """Look at all of them.

        Args:
            slots: public name of each stored tensor -> where it went.

        Raises:
            LayoutError: ``Q-VALUE-WEIGHT`` with files, tensors and numbers of values;
                ``Q-ENGINE-DTYPE`` for values that are finite in the file and not in the model.
        """
        if self._finite():
            return
        bad = {name for name, v in self.held.items() if not bool(torch.isfinite(v).all())}
        errors = list(self._errors(bad, slots)) or [_lost(sorted(bad))]
        first = errors[0]
        if len(errors) == 1:
            raise first
        raise LayoutError(
            f"{self.plan.checkpoint.path}: {len(errors)} float tensors are not finite: "
            f"{summarize([str(e.tensor) for e in errors])}. The first: {first}",
            code=first.code,
            path=self.plan.checkpoint.path,
            tensor=first.tensor,
            expected="finite",
            actual=[e.tensor for e in errors],
        )

    def _finite(self) -> bool:
        here = [v for v in self.held.values() if v.device.type == "cpu" and v.dtype in _LOOKED]
        there = [v for v in self.held.values() if v.device.type != "cpu" or v.dtype not in _LOOKED]
        rows = [v.view(1, -1) if v.is_contiguous() else v for v in here]
        if rows and not look_of(self.plan.registry)(rows):
            return False
        return not there or bool(torch.stack([torch.isfinite(v).all() for v in there]).all())

    def _errors(self, bad: set[str], slots: dict[str, Slot]) -> Iterator[LayoutError]:
        for name, slot in slots.items():
            if slot.target not in bad:
                continue
            stored = self.plan.dense[name]
            value = self.plan.checkpoint.read_parameter(stored)
            error = float_error(self.plan, stored, value)
            if error is not None:
                yield error
                continue
            dtype = self.held[slot.target].dtype
            most = float(value.abs().max()) if value.numel() else 0.0
            if most > torch.finfo(dtype).max:
                yield LayoutError(
                    f"{self.plan.checkpoint.tensors[stored].file}: tensor {stored!r} has values of "
                    f"up to {most:g}, expected none beyond {torch.finfo(dtype).max:g}, the "
                    f"largest {str(dtype).removeprefix('torch.')}. Load with dtype=torch.bfloat16 "
                    "or torch.float32.",
                    code="Q-ENGINE-DTYPE",
                    tensor=stored,
                    expected=torch.finfo(dtype).max,
                    actual=most,
                )


def _lost(names: list[str]) -> LayoutError:
    return LayoutError(
        f"{summarize(names)}: NaN or infinite in the model and not in the file, expected what was "
        "read. The file changed meanwhile, or memory is damaged; load again.",
        code="Q-VALUE-WEIGHT",
        tensor=names[0] if names else None,
        expected="finite",
    )
