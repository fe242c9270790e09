"""New weights that an engine hands over tensor by tensor, read as if they were a checkpoint.

An engine that loads again gives its layers stored tensors one at a time, from a file or from
memory. They wait here until a layer is complete, and are then read through the plan that the
layer was first loaded with: same names, sizes and types, other values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.errors import LayoutError, printable
from quant_core.ledger import missing_error
from quant_core.plan import Member, Plan, member_parts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Staged", "cannot_reload", "check_described", "staged_plan", "stored_names"]


class Staged(Checkpoint):
    """Some tensors of ``like``, with other values."""

    def __init__(self, like: Checkpoint, values: Mapping[str, Tensor]) -> None:
        self.path, self.folder, self.container = like.path, like.folder, like.container
        self.tensors, self.config, self.metadata = like.tensors, like.config, like.metadata
        self.warnings, self.values, self._like = [], values, like

    def read(self, name: str, index: Index = ()) -> Tensor:
        """As the checkpoint would, on the cpu.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` if it was not handed over.
            LayoutError: ``Q-ENGINE-RELOAD`` for another shape or dtype.
        """
        import torch

        value = self.values.get(name)
        if value is None:
            raise missing_error(self, [name], "the new weights of a layer that runs")
        info = self.tensors[name]
        want = (getattr(torch, info.dtype, torch.uint8), tuple(info.shape))
        if (value.dtype, tuple(value.shape)) != want:
            raise cannot_reload(
                f"tensor {printable(name)!r} is now {value.dtype} {tuple(value.shape)} and was "
                f"{want[0]} {want[1]}",
                tensor=name,
            )
        if index:
            value = value[tuple(slice(*i) if isinstance(i, tuple) else i for i in index)]
        return value.detach().to("cpu", copy=True).contiguous()

    def public_name(self, stored: str) -> str:
        return self._like.public_name(stored)


def staged_plan(plan: Plan, values: Mapping[str, Tensor]) -> Plan:
    """The same plan, reading ``values``.

    Raises:
        LayoutError: ``Q-ENGINE-RELOAD`` as ``check_described``.
    """
    for name, value in values.items():
        check_described(plan, name, value)
    return replace(plan, checkpoint=Staged(plan.checkpoint, values))


def check_described(plan: Plan, name: str, value: Tensor) -> None:
    """A tensor that describes others (sizes, a text) is as it was when the plan was made.

    Raises:
        LayoutError: ``Q-ENGINE-RELOAD``.
    """
    if name not in plan.checkpoint.described_by:
        return
    old = plan.checkpoint.read(name)
    if old.shape != value.shape or not bool((old == value.detach().to("cpu", old.dtype)).all()):
        raise cannot_reload(f"tensor {printable(name)!r}, which describes others, changed")


def stored_names(plan: Plan, members: Iterable[Member], *, bias: bool = False) -> list[str]:
    """Stored names of everything that packed layers read.

    Args:
        bias: as in ``bind_linear``: a layer's own too. Experts always read theirs.
    """
    out: dict[str, None] = {}
    for member in members:
        if not member.quantized:
            out[plan.dense[f"{member.layer.name}.weight"]] = None
            continue
        for param, name, _, _ in member_parts(member):
            mine = param.name != "bias" or bias or member.layer.experts
            if mine and param.need != "ignored" and name in plan.checkpoint.tensors:
                out[name] = None
    return list(out)


def cannot_reload(why: str, **parts: Any) -> LayoutError:
    return LayoutError(
        f"weights cannot replace those of a running engine: {why}; expected the same names, shapes "
        "and types as loaded. Restart the engine with the new checkpoint.",
        code="Q-ENGINE-RELOAD",
        **parts,
    )
