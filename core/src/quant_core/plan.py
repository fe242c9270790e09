"""From a checkpoint's header to a plan: which members there are and how each is stored.

    modules of stored tensors -> members (experts stacked) -> make_scheme -> create_weights
      -> header checks: presence, shape, dtype, cohorts, no tensor left over

No tensor data is read and no torch imported. The result answers ``quant inspect`` and is what the
loader follows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from quant_core.answers import ask_scheme
from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.detect import FLOAT_DTYPES, PLAIN_DTYPES, detect
from quant_core.errors import CheckpointError, LayoutError, PluginError, printable, summarize
from quant_core.ledger import Ledger, Part, missing_error, unexpected_error
from quant_core.members import Stored, describe, stored_members, stored_twice, tensor_names
from quant_core.registry import Registry
from quant_core.registry import registry as default_registry
from quant_core.resolve import unmatched
from quant_core.scheme import Scheme
from quant_core.spec import EXPERT, FormatMatch, LayerDesc, ParamSpec, Span, TensorInfo, Unquantized

__all__ = ["Member", "Plan", "member_parts", "param_sources", "part_nbytes", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One logical member: its description, and its scheme or why it has none."""

    layer: LayerDesc
    scheme: Scheme | Unquantized
    params: tuple[ParamSpec, ...] = ()
    stored: tuple[str, ...] = ()  # stored tensors of an unquantized member

    @property
    def quantized(self) -> bool:
        return not isinstance(self.scheme, Unquantized)


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a checkpoint holds. ``members`` and ``dense`` are keyed by public names.

    Attributes:
        match: the owner's claim; None for a plain float checkpoint.
        members: module name -> member, quantized or not.
        dense: parameter name -> stored name of every tensor loaded as it is.
        attention: module name -> member of attention modules whose keys and values are quantized;
            apart from ``members``, because it has no weight.
        warnings: one sentence each; errors when planning strictly.
    """

    checkpoint: Checkpoint
    match: FormatMatch | None
    registry: Registry
    members: Mapping[str, Member]
    dense: Mapping[str, str]
    ledger: Ledger
    attention: Mapping[str, Member] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> dict[str, Member]:
        return {n: m for n, m in self.members.items() if m.quantized}

    def member_nbytes(self, member: Member) -> int:
        """Stored bytes of a member."""
        tensors = self.checkpoint.tensors
        if not member.quantized:
            return sum(tensors[n].nbytes for n in member.stored)
        return sum(
            part_nbytes(tensors[name], index)
            for param, name, index, _ in member_parts(member)
            if name in tensors and param.need != "ignored"
        )


# -------------------------------------------------------------------------------------- sources


def param_sources(
    layer: LayerDesc, param: ParamSpec, expert: int | None
) -> tuple[tuple[str, Index], ...]:
    """Stored names and indices of one param of one matrix; several are concatenated on axis 0."""
    out = []
    if not param.sources:
        stored = layer.stored if expert is None else layer.stored.format(expert=expert)
        return ((f"{stored}.{param.name}", ()),)
    for source in param.sources:
        name = source.name if expert is None else source.name.format(expert=expert)
        index = tuple(expert if i == EXPERT else i for i in source.index)
        out.append((name, index))
    return tuple(out)  # type: ignore[arg-type]


def member_parts(member: Member) -> Iterator[tuple[ParamSpec, str, Index, Part]]:
    """(param, stored name, index, ledger part) of every param of every matrix of a member."""
    layer = member.layer
    for expert in layer.experts or (None,):
        for param in member.params:
            for name, index in param_sources(layer, param, expert):
                yield param, name, index, (name, index)


def _indexed_shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    out = []
    for axis, size in enumerate(shape):
        if axis >= len(index):
            out.append(size)
        elif isinstance(i := index[axis], tuple):
            out.append(len(range(size)[slice(*i)]))
    return tuple(out)


def part_nbytes(info: TensorInfo, index: Index) -> int:
    """Stored bytes of the part of a tensor that ``index`` selects."""
    if not index:
        return info.nbytes
    part, whole = prod(_indexed_shape(info.shape, index)), prod(info.shape)
    return info.nbytes * part // max(whole, 1)


# --------------------------------------------------------------------------------------- checks


class _Checker:
    """Header checks over all members; problems of one kind are raised together."""

    def __init__(self, checkpoint: Checkpoint, ledger: Ledger) -> None:
        self.checkpoint, self.ledger = checkpoint, ledger
        self.missing: list[str] = []
        self.cohorts: dict[tuple[str, str], tuple[list[str], list[str]]] = {}

    def member(self, member: Member) -> None:
        scheme = member.scheme
        assert isinstance(scheme, Scheme)
        for param, name, index, part in member_parts(member):
            info = self.checkpoint.tensors.get(name)
            if param.need == "cohort":
                have, lack = self.cohorts.setdefault((scheme.name, param.name), ([], []))
                (lack if info is None else have).append(name)
            if info is None:
                if param.need == "required":
                    self.missing.append(name)
                continue
            if param.need == "ignored":
                if self.ledger.is_claimed(name):  # a scale of the cache, read by the attention
                    continue
                self.ledger.skip(name, param.rule or f"ignored by {scheme.name}")
                continue
            self._shape(param, info, index)
            self.ledger.claim(part, member.layer.name, shared=param.shared)

    def _shape(self, param: ParamSpec, info: TensorInfo, index: Index) -> None:
        shape = _indexed_shape(info.shape, index)
        fits = len(shape) == len(param.shape) and all(
            want in (size, -1) for size, want in zip(shape, param.shape)
        )
        if fits and info.dtype in param.dtypes:
            return
        where = f"{info.file}: tensor {printable(info.name)!r}"
        if len(param.sources) < 2 and not fits:
            raise LayoutError(
                f"{where} has shape {shape}, expected {param.shape}. The checkpoint was cut short, "
                "or its config describes another layout (bits, group_size).",
                code="Q-LAYOUT-SHAPE",
                path=info.file,
                tensor=info.name,
                expected=param.shape,
                actual=shape,
            )
        if info.dtype not in param.dtypes:
            raise LayoutError(
                f"{where} has dtype {info.dtype}, expected {' or '.join(param.dtypes)}. "
                "The tensor was cast after quantization; export the checkpoint again.",
                code="Q-LAYOUT-DTYPE",
                path=info.file,
                tensor=info.name,
                expected=param.dtypes,
                actual=info.dtype,
            )

    def finish(self) -> None:
        lost = [
            name
            for have, lack in self.cohorts.values()
            if have and lack
            for name in (lack if len(lack) <= len(have) else [])
        ]
        if self.missing or lost:
            raise missing_error(self.checkpoint, self.missing + lost, "the layers they belong to")
        for (scheme, param), (have, lack) in self.cohorts.items():
            if have and lack:
                raise unexpected_error(
                    self.checkpoint,
                    have,
                    f"{param!r} on all {len(have) + len(lack)} layers of scheme {scheme!r} or none",
                )


def _leftovers(checkpoint: Checkpoint, stored: Stored, ledger: Ledger) -> list[str]:
    return [
        name
        for name in tensor_names(checkpoint, stored)
        if not ledger.is_claimed(name) and name not in ledger.skipped
    ]


def _check_scheme(owner: str, layer: LayerDesc, answer: object) -> Scheme | Unquantized:
    if not isinstance(answer, Scheme | Unquantized):
        raise PluginError(
            f"plugin {owner!r}: make_scheme returned {type(answer).__name__} for {layer.name!r}, "
            "expected a Scheme or Unquantized. This is a bug of the plugin; report it there.",
            code="Q-PLUGIN-RESULT",
            plugin=owner,
            tensor=layer.name,
            actual=type(answer).__name__,
        )
    return answer


def _check_float(checkpoint: Checkpoint, info: TensorInfo, why: Unquantized) -> None:
    """Nothing but plain numbers counts as unquantized; a weight must be a float."""
    allowed = FLOAT_DTYPES if info.name.endswith(".weight") else PLAIN_DTYPES
    if info.dtype not in allowed:
        raise CheckpointError(
            f"{info.file}: tensor {printable(info.name)!r} is {info.dtype}, but its layer counts "
            f"as unquantized ({why.rule}); expected plain floats. Export the checkpoint again.",
            code="Q-CKPT-MISMATCH",
            path=info.file,
            tensor=info.name,
            expected=sorted(allowed),
            actual=info.dtype,
        )


def _sized(layer: LayerDesc, scheme: Scheme) -> LayerDesc:
    n, k = scheme.shape  # a third of the time of ``replace``
    return LayerDesc(
        kind=layer.kind, name=layer.name, stored=layer.stored, inp=_whole(k), out=_whole(n),
        experts=layer.experts, role=layer.role, bias=layer.bias, tied_to=layer.tied_to,
        dtype=layer.dtype,
    )  # fmt: skip


_whole = functools.lru_cache(maxsize=256)(Span.whole)  # a model has a few sizes


def plan(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    format: str | None = None,
    registry: Registry | None = None,
) -> Plan:
    """Plan a checkpoint from its header.

    Args:
        checkpoint: from ``open_checkpoint``, or a path, which is opened.
        format: plugin id the user insists on; an error if the checkpoint is something else.
        registry: plugins to ask; default the process-wide registry.

    Raises:
        FormatError, ConfigError: what the checkpoint is cannot be decided or is contradictory.
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED``, ``Q-TENSOR-DUPLICATE``,
            ``Q-CKPT-MISMATCH``.
        LayoutError: a stored tensor has the wrong shape or dtype.
    """
    if isinstance(checkpoint, str | os.PathLike):
        from quant_core.checkpoint.open import open_checkpoint

        checkpoint = open_checkpoint(checkpoint)
    registry = registry or default_registry()
    match = detect(checkpoint, registry, format=format)
    ledger = Ledger(checkpoint)
    for name, rule in checkpoint.ignored.items():
        ledger.skip(name, rule)
    members: dict[str, Member] = {}
    dense: dict[str, str] = {}
    checker = _Checker(checkpoint, ledger)
    pending: list[Stored] = []
    planned = [
        (stored, _plan_member(registry, match, describe(stored), checkpoint))
        for stored in stored_members(checkpoint, _split_modules(registry, match, checkpoint))
    ]
    attention = _attention(registry, match, checkpoint)
    for member in (*attention.values(), *(m for _, m in planned if m.quantized)):
        checker.member(member)
    for stored, member in planned:
        layer, twin = member.layer, members.get(member.layer.name)
        if twin is not None and (twin.quantized or member.quantized):
            raise stored_twice(checkpoint, layer.name, twin.layer.stored, layer.stored)
        if member.quantized:
            pending.append(stored)
        else:
            assert isinstance(member.scheme, Unquantized)
            names = _leftovers(checkpoint, stored, ledger)
            if not names and all(map(ledger.is_claimed, tensor_names(checkpoint, stored))):
                continue  # no module: all of its tensors are parts of quantized members
            for name in names:
                if name.rpartition(".")[2] in member.scheme.ignored:
                    ledger.skip(name, member.scheme.rule)
                    continue
                _check_float(checkpoint, checkpoint.tensors[name], member.scheme)
                ledger.claim((name, ()), layer.name)
                public = checkpoint.public_name(name)
                if public in dense:
                    raise stored_twice(checkpoint, public, dense[public], name)
                dense[public] = name
            kept = tuple(n for n in names if n not in ledger.skipped)
            member = replace(member, stored=(*(twin.stored if twin else ()), *kept))
        members[layer.name] = member
    checker.finish()
    extra = [name for stored in pending for name in _leftovers(checkpoint, stored, ledger)]
    if extra:
        raise unexpected_error(
            checkpoint, dict.fromkeys(extra), "only the tensors of the layer's scheme"
        )
    if lost := ledger.unclaimed():  # of a module that a plugin's answers lose sight of
        raise unexpected_error(checkpoint, lost, "a member for each")
    result = Plan(
        checkpoint=checkpoint,
        match=match,
        registry=registry,
        members=members,
        dense=dense,
        ledger=ledger,
        attention=attention,
        warnings=[*checkpoint.warnings],
    )
    result.warnings += _config_warnings(match, members)
    if match is not None and match.level == "declared" and dense and not result.quantized:
        result.warnings.append(
            f"{match.plugin} is declared ({match.evidence}), but every module is stored as floats"
        )
    return result


def _split_modules(
    registry: Registry, match: FormatMatch | None, checkpoint: Checkpoint
) -> Mapping[str, Sequence[LayerDesc]]:
    if match is None:
        return {}
    answer = registry.call_one(match.plugin, "split_modules", match=match, checkpoint=checkpoint)
    found: Mapping[str, Sequence[LayerDesc]] = {} if answer is None else answer
    return found


def _attention(
    registry: Registry, match: FormatMatch | None, checkpoint: Checkpoint
) -> dict[str, Member]:
    if match is None:
        return {}
    answer = registry.call_one(
        match.plugin, "attention_schemes", match=match, checkpoint=checkpoint
    )
    found: Mapping[str, Scheme] = {} if answer is None else answer
    out = {}
    for path, scheme in found.items():
        name = checkpoint.public_name(f"{path}.weight").removesuffix(".weight")
        layer = LayerDesc(kind="attention", name=name, stored=path)
        out[name] = Member(layer=layer, scheme=scheme, params=ask_scheme(scheme, "params", layer))
    return out


def _plan_member(
    registry: Registry, match: FormatMatch | None, layer: LayerDesc, checkpoint: Checkpoint
) -> Member:
    if match is None:
        return Member(layer=layer, scheme=Unquantized(rule="checkpoint is not quantized"))
    answer = registry.call_one(
        match.plugin, "make_scheme", match=match, layer=layer, checkpoint=checkpoint
    )
    scheme = _check_scheme(match.plugin, layer, answer)
    if isinstance(scheme, Unquantized):
        return Member(layer=layer, scheme=scheme)
    layer = _sized(layer, scheme)
    params = registry.call_one(match.plugin, "create_weights", scheme=scheme, layer=layer)
    if params is None:
        params = ask_scheme(scheme, "params", layer)
    return Member(layer=layer, scheme=scheme, params=params)


def _names(members: Mapping[str, Member]) -> list[str]:
    """Public names, and those of the experts of stacks that are stored one by one."""
    out = list(members)
    for member in members.values():
        if "{expert}" in member.layer.stored:
            out += [member.layer.stored.format(expert=e) for e in member.layer.experts]
    return out


def _config_warnings(match: FormatMatch | None, members: Mapping[str, Member]) -> list[str]:
    """Unknown keys and patterns that match nothing, as the owner's config reports them."""
    config = match.config if match is not None else None
    out = list(getattr(config, "warnings", ()))
    patterns: Sequence[Any] = getattr(config, "name_patterns", tuple)()
    left = unmatched(patterns, _names(members)) if patterns else []
    if left:
        shown = summarize(f"{p.purpose}: {p.label}" for p in left)
        out.append(f"{len(left)} name pattern(s) match no module: {shown}")
    return out
