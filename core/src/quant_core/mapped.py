"""A ``Builder`` that uses weights where the checkpoint's files have them.

For each layer, kernels that read the order in which its codes are stored are asked first
(``Kernel.adopt``); their buffers are then pages of the file. A layer that none of them runs, and
whatever has to be moved or converted, is loaded as by ``Builder``: from the pages of the file
into memory of its own. Float parameters in the model's own dtype are pages of the file too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quant_core.build import Builder
from quant_core.kernels.choose import Choice, choose_in_place
from quant_core.load import read_matrix, read_parameter
from quant_core.nn import BoundMember, QuantModule
from quant_core.plan import Member
from quant_core.prepared.pages import MAPPED_BYTES
from quant_core.spec import OpSpec
from quant_core.tensors import LayerTensors

__all__ = ["MappedBuilder"]


@dataclass(slots=True, kw_only=True)
class MappedBuilder(Builder):
    """Builds as ``Builder`` does, on the cpu, without copies where that can be.

    Attributes:
        places: who runs an operation in place, by operation and names allowed.
    """

    places: dict[tuple[OpSpec, frozenset[str]], Choice | None] = field(default_factory=dict)

    def matrix(self, member: Member) -> LayerTensors:
        return read_matrix(self.plan, member, mapped=True)

    def parameter(self, name: str) -> Tensor:
        stored = self.plan.dense[name]
        if self.plan.checkpoint.tensors[stored].nbytes >= MAPPED_BYTES:
            value = self.plan.checkpoint.mapped_parameter(stored)
            if value is not None:
                self.plan.ledger.load((stored, ()))
                return value
        return read_parameter(self.plan, name)

    def _bind(
        self, cls: type[QuantModule], name: str, op: OpSpec, lt: LayerTensors,
        members: Sequence[BoundMember],
    ) -> QuantModule:  # fmt: skip
        chooser = self._chooser(name)
        choice = choose_in_place(
            op, self.plan.registry, kernels=self.kernels, module=name, memo=self.places
        )
        if choice is not None:
            buffers = choice.kernel.adopt(choice.op, lt)  # type: ignore[attr-defined]
            if buffers is not None:
                self.choices.append((name, choice))
                return cls(choice, buffers, members, chooser)
        return super(MappedBuilder, self)._bind(cls, name, op, lt, members)
