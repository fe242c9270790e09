"""A ``Builder`` that takes modules from prepared weights, or builds them and writes them down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.build import Builder
from quant_core.checkpoint.ahead import reading_ahead
from quant_core.checkpoint.files import io_error
from quant_core.errors import CheckpointError, ConfigError, QuantError, printable
from quant_core.kernels.choose import Choice, allowed_names
from quant_core.memory import empty, written_whole
from quant_core.nn import (
    BoundMember,
    Mould,
    QuantComposite,
    QuantEmbedding,
    QuantGrouped,
    QuantLinear,
    QuantModule,
)
from quant_core.plan import Member, Plan, member_parts
from quant_core.prepared.entry import Entry, Module, Part, entry_error, write_entry
from quant_core.prepared.folder import BUFFERS, folder_for, make_room, remove
from quant_core.prepared.key import Key, key_of
from quant_core.prepared.pages import mapping_wanted

if TYPE_CHECKING:
    from quant_core.mapped import MappedBuilder

__all__ = ["PreparedBuilder", "builder_for"]

log = logging.getLogger("quant_core")

_CLASSES: Mapping[str, type[QuantModule]] = {
    "linear": QuantLinear,
    "embedding": QuantEmbedding,
    "grouped_linear": QuantGrouped,
}
_BUSY = ("Q-CKPT-LOCKED", "Q-CKPT-EXISTS")  # another process writes, or wrote, the same


@dataclass(slots=True)
class _Kind:
    """What layers of an entry share that are the same operation, under the same names allowed.

    Attributes:
        forms: dtype and shape of each buffer, as the kernel allocates them.
        made: on a CPU, makes modules like the first one, which was bound.
    """

    choice: Choice
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    made: Mould | None = None


@dataclass(kw_only=True)
class PreparedBuilder(Builder):
    """Builds as ``Builder`` does; each module comes from the entry where there is one.

    Attributes:
        path: the entry's folder.
        entry: None while there is none that can be used.
        maps: whether entries are mapped; then they hold floats too.
    """

    path: Path
    key: Key
    entry: Entry | None = None
    maps: bool = False

    def __post_init__(self) -> None:
        self.built: dict[str, nn.Module] = {}
        self.floats: dict[str, Tensor] = {}
        self._kinds: dict[Hashable, _Kind] = {}
        self.fresh = 0  # modules that did not come from the entry

    # ------------------------------------------------------------------------------- the modules

    def linear(
        self, name: str, members: Sequence[Member], *, n: int | None = None, k: int | None = None
    ) -> nn.Module:
        found = self._take(name, members, n, k)
        if found is not None:
            return found
        return self._built(name, super().linear(name, members, n=n, k=k))

    def embedding(
        self, name: str, member: Member, *, n: int | None = None, k: int | None = None
    ) -> QuantEmbedding:
        found = self._take(name, [member], n, k)
        if found is None:
            found = self._built(name, super().embedding(name, member, n=n, k=k))
        assert isinstance(found, QuantEmbedding), "the operation decides the class"
        return found

    def _stack(self, name: str, member: Member) -> QuantGrouped:
        found = self._take(name, [member], None, None)
        if found is None:
            found = self._built(name, super()._stack(name, member))
        assert isinstance(found, QuantGrouped), "the operation decides the class"
        return found

    def _built(self, name: str, module: nn.Module) -> nn.Module:
        self.fresh += 1
        self.built[name] = module
        return module

    def taken(self, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if self.entry is None or self.device != "cpu":
            return None
        try:
            found = self.entry.floats(parameter, shape, dtype)
        except QuantError as err:
            self._give_up(err)
            return None
        if found is not None:
            self.floats[parameter] = found
        return found

    def filled(self, parameter: str, value: Tensor) -> None:
        if self.maps and self.device == "cpu":
            self.floats[parameter] = value

    # ---------------------------------------------------------------------------- from the entry

    def _take(
        self, name: str, members: Sequence[Member], n: int | None, k: int | None
    ) -> nn.Module | None:
        """The module as the entry has it; None to build it, which also reports what is wrong."""
        if self.entry is None:
            return None
        loaded: list[QuantModule] = []
        try:
            stored = self.entry.module(name)
            self._check(name, stored, members)
            rows = sum(p.op.size("n") for p in stored.parts)
            if (n, k) not in ((None, None), (rows, stored.parts[0].op.size("k"))):
                return None
            for i, part in enumerate(stored.parts):
                loaded.append(self._load(name, i, part, stored))
        except QuantError as err:
            self._give_up(err)
            return None
        module: nn.Module = loaded[0]
        if len(loaded) > 1:
            module = QuantComposite(loaded, stored.reason)  # type: ignore[arg-type]
        self.built[name] = module
        tensors = self.plan.checkpoint.tensors
        for member in members:
            for param, source, _, ledger_part in member_parts(member):
                if source in tensors and param.need != "ignored":
                    self.plan.ledger.load(ledger_part)
        return module

    def _check(self, name: str, stored: Module, members: Sequence[Member]) -> None:
        assert self.entry is not None
        found = [member for part in stored.parts for member, *_ in part.members]
        expected = [member.layer.name for member in members]
        if found != expected:
            what = f"members {found} in module {printable(name)!r}"
            raise entry_error(self.entry.path, what, str(expected))

    def _load(self, name: str, index: int, part: Part, stored: Module) -> QuantModule:
        assert self.entry is not None
        rows = ""
        if len(stored.parts) > 1:
            start = sum(p.op.size("n") for p in stored.parts[:index])
            rows = f"[{start}:{start + part.op.size('n')}]"
        chooser = self._chooser(name + rows)
        kind = self._kind(name + rows, part, chooser)
        fresh, buffers = self._allocated(kind), {}
        for buffer, (dtype, shape) in kind.forms.items():
            info = self.entry.found(name, index, buffer, dtype, shape)
            value = self.entry.mapped(info, dtype, shape) if self.device == "cpu" else None
            if value is None:
                value = fresh[buffer] if buffer in fresh else empty(shape, dtype)
                self.entry.read_into(info, value)
            buffers[buffer] = value
        self.choices.append((name + rows, kind.choice))
        members = tuple(
            BoundMember(name=m, start=a, stop=b, packing=p) for m, a, b, p in part.members
        )
        if kind.made is not None:
            return kind.made(buffers, members, chooser)
        module = _CLASSES[part.op.op](kind.choice, buffers, members, chooser)
        if self.device == "cpu":
            kind.made = Mould(module)
        return module

    def _kind(self, where: str, part: Part, chooser: Callable[..., Choice]) -> _Kind:
        """What ``part`` has in common with others; the choice is the one that the entry names."""
        assert self.entry is not None
        key = (id(part.op), part.kernel, allowed_names(self.kernels, part.op.op, where))
        known = self._kinds.get(key)  # an entry keeps its operations: no other has this address
        if known is not None:
            return known
        choice = chooser(part.op, self.memo)
        if choice.kernel.name != part.kernel or choice.op != part.op:
            what = f"buffers of kernel {part.kernel!r} for {printable(where)!r}"
            raise entry_error(self.entry.path, what, f"those of {choice.kernel.name!r}")
        made = self._kinds[key] = _Kind(choice, {})
        return made

    def _allocated(self, kind: _Kind) -> dict[str, Tensor]:
        """Buffers as the kernel allocates them; on a CPU none once their forms are known.

        Every byte of them is read, or they are replaced.
        """
        if kind.forms and self.device == "cpu":
            return {}
        with written_whole(0):
            buffers = kind.choice.kernel.allocate(kind.choice.op, self.device)
        kind.forms = {n: (t.dtype, tuple(t.shape)) for n, t in buffers.items()}
        return buffers if self.device != "cpu" else {}

    def _give_up(self, err: QuantError) -> None:
        """The entry is of no use: say so once, delete it, and build everything from here on."""
        assert self.entry is not None
        log.warning("prepared weights are built again: %s", err)
        self.entry.close()
        self.entry = None
        remove(self.path)

    # -------------------------------------------------------------------------------- to the disk

    def finish(self) -> None:
        """After a load: note the entry's use, or write one. A cache that refuses is no error."""
        if self.entry is not None:
            self.entry.touch()
            self.entry.close()
        if not self.fresh:
            return
        modules = {name: _described(module) for name, module in self.built.items()}
        held = [t for _, parts in modules.values() for part in parts for t in part.values()]
        held += self.floats.values()
        nbytes = sum(t.numel() * t.element_size() for t in held)
        try:
            if problem := make_room(self.path.parent, nbytes, self.path.name):
                log.warning("prepared weights are not kept in %s: %s", self.path.parent, problem)
                return
            write_entry(self.path, self.key, modules, self.floats)
        except CheckpointError as err:
            if err.code not in _BUSY:
                log.warning("prepared weights are not kept: %s", err)
        except OSError as err:
            log.warning("prepared weights are not kept: %s", io_error(self.path, err))


def _described(module: nn.Module) -> tuple[Module, list[Mapping[str, Tensor]]]:
    """A module as an entry has it, and the buffers of its parts."""
    parts: list[Any] = [module]
    if isinstance(module, QuantComposite):
        parts = list(module.parts)
    made = (
        Part(
            kernel=m.kernel.name,
            op=m.op,
            members=tuple((x.name, x.start, x.stop, x.packing) for x in m.members),
            buffers=tuple(m.tensors),
        )
        for m in parts
    )
    reason = str(getattr(module, "reason", ""))
    return Module(reason=reason, parts=tuple(made)), [m.tensors for m in parts]


def _parts(plan: Plan) -> list[tuple[str, int, int]]:
    """(path, first byte, bytes) of the stored tensors, about in the order of their use."""
    tensors, folder = plan.checkpoint.tensors, plan.checkpoint.folder
    floats = set(plan.dense.values())

    def turn(name: str) -> list[tuple[bool, int, str]]:  # layer 10 comes after layer 9
        return [(x.isdecimal(), int(x) if x.isdecimal() else 0, x) for x in name.split(".")]

    ordered = sorted(tensors.values(), key=lambda t: (t.name in floats, turn(t.name)))
    return [(str(folder / t.file), t.offset, t.nbytes) for t in ordered]


def _asked_for(folder: Path | None, settings: Mapping[str, Any]) -> MappedBuilder:
    """The builder of ``mmap=True``."""
    from quant_core.mapped import MappedBuilder

    builder = MappedBuilder(**settings)
    problem = "prepared weights" if folder is not None else f"device {builder.device!r}"
    if folder is not None or builder.device != "cpu":
        raise ConfigError(
            f"mmap: given with {problem}, expected it alone and on the cpu: weights are used where "
            "the checkpoint has them. Leave out one of them.",
            code="Q-CFG-CONFLICT",
            tensor="mmap",
            actual=problem,
        )
    return builder


def _by_default(settings: Mapping[str, Any]) -> MappedBuilder | None:
    """The builder of weights in place where they cost little; None where files are not mapped."""
    from quant_core.mapped import PRICE, MappedBuilder, placed_by_default

    builder = MappedBuilder(most=PRICE, **settings)
    checkpoint = builder.plan.checkpoint
    if not placed_by_default(builder.plan, builder.device):
        return None
    try:  # a tensor of each file: none of them turns out not to be mapped halfway
        for name in {info.file: name for name, info in checkpoint.tensors.items()}.values():
            checkpoint.mapped(name)
    except CheckpointError as err:
        if err.code != "Q-CKPT-IO":
            raise
        log.info("weights are copied: %s", err)
        return None
    return builder


@contextmanager
def builder_for(
    prepared: str | None, target: str, *, mmap: bool | None = None, **settings: Any
) -> Iterator[Builder]:
    """The builder of one load; prepared weights are written when the load has succeeded.

    Args:
        prepared, mmap: as in ``load_model``.
        target: what is built, a model class: the same plan is cut into modules in several ways.
        settings: fields of ``Builder``.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for a wrong ``prepared`` or ``QUANT_PREPARED_BYTES``,
            ``Q-CFG-CONFLICT`` for ``mmap`` with prepared weights or on another device.
    """
    folder = folder_for(prepared)
    mapped = None
    if mmap:
        mapped = _asked_for(folder, settings)
    elif mmap is None and folder is None:
        mapped = _by_default(settings)
    if mapped is not None:
        yield mapped
        mapped.finish()
        return
    builder = Builder(**settings)
    if folder is None:
        with reading_ahead(_parts(builder.plan)):
            yield builder
        return
    key = key_of(
        builder.plan, target=target, device=builder.device, dtype=builder.dtype,
        kernels=builder.kernels,
    )  # fmt: skip
    if key is None:
        log.warning("weights are not prepared: a scheme of this checkpoint has no stable text")
        with reading_ahead(_parts(builder.plan)):
            yield builder
        return
    path = folder / key.digest
    ready = PreparedBuilder(path=path, key=key, maps=mapping_wanted(folder), **settings)
    if (path / BUFFERS).exists():
        try:
            ready.entry = Entry(path, key, map_it=ready.maps)
        except QuantError as err:
            log.warning("prepared weights are built again: %s", err)
            remove(path)
    try:
        with reading_ahead([] if ready.entry is not None else _parts(builder.plan)):
            yield ready
    except BaseException:
        if ready.entry is not None:
            ready.entry.close()
        raise
    ready.finish()
