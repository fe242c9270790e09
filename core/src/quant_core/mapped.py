"""A ``Builder`` that uses weights where the checkpoint's files have them.

For each layer, kernels that read the order in which its codes are stored are asked first
(``Kernel.adopt``); their buffers are then pages of the file. A layer that none of them runs, and
whatever has to be moved or converted, is loaded as by ``Builder``: from the pages of the file
into memory of its own. Float parameters in the model's own dtype are pages of the file too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from quant_core.alike import Pattern, pattern_of, unpacking
from quant_core.build import Builder, check_size
from quant_core.finite import Read, check_matrices
from quant_core.kernels.choose import Choice, allowed_names, choose_in_place
from quant_core.kernels.finite import look_of
from quant_core.kernels.unpack import unpack_of
from quant_core.load import read_matrix, read_parameter
from quant_core.nn import BoundMember, QuantLinear, QuantModule
from quant_core.packing import Packed
from quant_core.plan import Member, Plan, param_sources
from quant_core.prepared.pages import MAPPED_BYTES, maps_safely
from quant_core.scheme import Scheme
from quant_core.spec import OpSpec
from quant_core.tensors import LayerTensors

__all__ = ["PRICE", "SMALL", "MappedBuilder", "placed_by_default"]

PRICE = 1.1
"""Weights are used in place by default where that costs at most so many times their own memory."""

SMALL = 256 << 20
"""Bytes of a checkpoint below which all is copied by default: it takes a moment, and what then lies
in caches runs up to 1.4 times as fast as in the order of files."""


def placed_by_default(plan: Plan, device: str) -> bool:
    """Whether a load that does not say ``mmap`` looks for layers that can stay in their files."""
    checkpoint = plan.checkpoint
    if device != "cpu" or sum(t.nbytes for t in checkpoint.tensors.values()) < SMALL:
        return False
    return maps_safely(checkpoint.folder)


@dataclass(frozen=True, slots=True)
class _Kind:
    key: Hashable
    stored: Mapping[str, str]  # param -> stored name
    scheme: Scheme


@dataclass(slots=True, kw_only=True)
class MappedBuilder(Builder):
    """Builds as ``Builder`` does, on the cpu, without copies where that can be.

    Attributes:
        most: in place only at that many times the cost of a layer's own memory, at most; None:
            whatever it costs.
        places: who runs an operation in place, by operation and names allowed.

    Whether numbers are finite is looked at in the end (``finish``), for all layers at once that
    stay where they are, and for others before they are copied.
    """

    most: float | None = None
    places: dict[tuple[OpSpec, frozenset[str]], Choice | None] = field(default_factory=dict)
    _fresh: list[Read] = field(default_factory=list)  # read, and not bound yet
    _unlooked: list[Read] = field(default_factory=list)  # bound where they are
    _packed: list[tuple[Packed, Tensor]] = field(default_factory=list)  # of layers alike
    _patterns: dict[Hashable, Pattern] = field(default_factory=dict)
    _showing: _Kind | None = None  # of the layer that is being built

    def matrix(self, member: Member) -> LayerTensors:
        in_place = not member.scheme.row_order  # type: ignore[union-attr]
        return read_matrix(self.plan, member, mapped=True, in_place=in_place, unlooked=self._fresh)

    def finish(self) -> None:
        """Unpack and look at what is left. Before that, nothing of this load may be used.

        Raises:
            LayoutError: as ``read_matrix``.
        """
        if self._packed:
            unpack_of(self.plan.registry)(self._packed)
            self._packed = []
        self._look([*self._fresh, *self._unlooked])
        self._fresh, self._unlooked = [], []

    def _look(self, read: Sequence[Read]) -> None:
        if read:
            check_matrices(read, look_of(self.plan.registry))

    def _bound(self, lt: LayerTensors | None) -> None:
        """Of what was read, ``lt`` stays where it is."""
        self._unlooked += [r for r in self._fresh if r[1] is lt]
        self._look([r for r in self._fresh if r[1] is not lt])
        self._fresh = []

    def parameter(self, name: str) -> Tensor:
        stored = self.plan.dense[name]
        value = self.plan.checkpoint.mapped_parameter(stored)
        if value is None:
            return read_parameter(self.plan, name)
        self.plan.ledger.load((stored, ()))
        return value if value.nbytes >= MAPPED_BYTES else value.clone()

    def linear(
        self, name: str, members: Sequence[Member], *, n: int | None = None, k: int | None = None
    ) -> nn.Module:
        if len(members) != 1:
            return super(MappedBuilder, self).linear(name, members, n=n, k=k)
        kind = self._kind(name, members[0], n, k)
        module = self._alike(name, members[0], kind)
        if module is not None:
            return module
        self._showing = kind
        try:
            if members[0].scheme.row_order:  # type: ignore[union-attr]
                module = self._in_stored_order(name, members[0], n, k)
            return module or super(MappedBuilder, self).linear(name, members, n=n, k=k)
        finally:
            self._showing = None

    # -------------------------------------------------------------------- layers that are alike

    def _kind(self, name: str, member: Member, n: int | None, k: int | None) -> _Kind | None:
        """What layers share that are built alike; None where each is built by itself."""
        assert isinstance(member.scheme, Scheme)
        pattern = member.scheme.pattern
        if pattern is None:
            return None
        tensors, key, stored = self.plan.checkpoint.tensors, [], {}
        for param in member.params:
            if param.need == "ignored":
                continue
            sources = param_sources(member.layer, param, None)
            info = tensors.get(sources[0][0])
            if len(sources) > 1 or sources[0][1]:
                return None
            if info is not None:
                stored[param.name] = info.name
                key.append((param.name, info.dtype, info.shape))
        allowed = allowed_names(self.kernels, "linear", name)
        return _Kind((type(member.scheme), pattern[0], n, k, allowed, *key), stored, member.scheme)

    def _alike(self, name: str, member: Member, kind: _Kind | None) -> QuantModule | None:
        """The layer, built like the first of its kind; None if there is none, or it is another."""
        pattern = self._patterns.get(kind.key) if kind is not None else None
        if kind is None or pattern is None:
            return None
        stored: dict[str, Tensor] = {}
        for param, source in kind.stored.items():
            value = self.plan.checkpoint.mapped(source)
            if value is None:
                return None
            stored[param] = value
        if not pattern.fits(stored) or not kind.scheme.alike(stored):
            return None
        for source in kind.stored.values():
            self.plan.ledger.load((source, ()))
        sources: Mapping[str, Tensor] = stored
        if pattern.unpacks:
            rooms, work = unpacking(kind.scheme, stored)
            sources = {**stored, **rooms}
            self._packed += work
        lt, module = pattern.layer(sources, member.layer.name, self._chooser(name))
        self._unlooked.append((member.layer, lt, stored))
        self.choices.append((name, pattern.choice))
        return module

    def _show(self, module: QuantModule, choice: Choice, lt: LayerTensors) -> None:
        """Keep what the layer shows that has just been built."""
        kind = self._showing
        if kind is None or kind.key in self._patterns:
            return
        read = next((r for r in self._fresh if r[1] is lt), None)
        found = pattern_of(module, choice, lt, read[2], kind.scheme) if read else None
        if found is not None:
            self._patterns[kind.key] = found

    def _in_stored_order(
        self, name: str, member: Member, n: int | None, k: int | None
    ) -> QuantModule | None:
        """A layer whose rows a file has in another order than the model, if a kernel runs it so."""
        lt, op = self._as_stored("linear", member)
        check_size(name, lt.weight, n, k, member.scheme.shape[1])  # type: ignore[union-attr]
        rows, packing = lt.weight.shape[0], lt.weight.packing
        bound = BoundMember(name=member.layer.name, start=0, stop=rows, packing=packing)
        module = self._adopted(QuantLinear, name, op, lt, [bound])
        self._bound(lt if module is not None else None)
        return module

    def _as_stored(self, kind: str, member: Member) -> tuple[LayerTensors, OpSpec]:
        """A member's tensors and operation, its rows in the order of the file."""
        lt = read_matrix(self.plan, member, mapped=True, in_place=True, unlooked=self._fresh)
        op = self.op_for(kind, lt, member)
        order = member.scheme.row_order  # type: ignore[union-attr]
        return lt, replace(op, features=op.features | {order}) if order else op

    def place_of(self, name: str, member: Member) -> Choice | None:
        """Who would run a layer or an embedding on the file's own pages; None: it is copied."""
        kind = "embedding" if member.layer.kind == "embedding" else "linear"
        lt, op = self._as_stored(kind, member)
        found = self._found(name, op, lt)
        self._bound(None)
        return found[0] if found is not None else None

    def _found(
        self, name: str, op: OpSpec, lt: LayerTensors
    ) -> tuple[Choice, dict[str, Tensor]] | None:
        """Who runs the layer on the tensors where they are, and its buffers; None if nobody."""
        choice = choose_in_place(
            op, self.plan.registry, kernels=self.kernels, module=name, memo=self.places,
            most=self.most,
        )  # fmt: skip
        buffers = choice.kernel.adopt(choice.op, lt) if choice is not None else None  # type: ignore[attr-defined]
        return None if choice is None or buffers is None else (choice, buffers)

    def _adopted(
        self, cls: type[QuantModule], name: str, op: OpSpec, lt: LayerTensors,
        members: Sequence[BoundMember],
    ) -> QuantModule | None:  # fmt: skip
        """The layer on the tensors where they are; None if no kernel runs it so."""
        found = self._found(name, op, lt)
        if found is None:
            return None
        choice, buffers = found
        self.choices.append((name, choice))
        module = cls(choice, buffers, members, self._chooser(name))
        self._show(module, choice, lt)
        return module

    def _bind(
        self, cls: type[QuantModule], name: str, op: OpSpec, lt: LayerTensors,
        members: Sequence[BoundMember],
    ) -> QuantModule:  # fmt: skip
        module = self._adopted(cls, name, op, lt, members)
        self._bound(lt if module is not None else None)
        if module is not None:
            return module
        return super(MappedBuilder, self)._bind(cls, name, op, lt, members)
