"""Which part of a transformers model each member and each float tensor of a checkpoint fills.

transformers renames checkpoint keys (``WeightRenaming``) and merges some (``WeightConverter``, e.g.
the matrices of single experts into one 3-D parameter). Its own mapping is asked with the names of
the checkpoint, so that both agree; of the converters, those that put a tensor into a slice of a
parameter are understood, all others are refused by name.

    public name  --rename-->  parameter           Slot(parameter, index)
    member       --rename-->  module's weight     linear, embedding, or gate/up/down of experts

Source: transformers 5.23.0, core_model_loading.py and conversion_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant_core.engines.transformers_experts import weight_leaf
from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.plan import Member, Plan
from quant_core.walk import named_modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Layout", "Slot", "arrange"]

Cut = tuple[int | slice, ...]

_EXPERTS = re.compile(r"^(.*\bexperts)\.(?!\d+\.)(.+)$")
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_NUMBERED = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a stored float tensor goes: a parameter or buffer, and the part of it."""

    target: str
    index: Cut = ()


@dataclass(slots=True)
class Layout:
    """What fills what. Keys are names of the model's modules and of public tensors."""

    layers: dict[str, dict[int, Member]] = field(default_factory=dict)  # linear, embedding: rows
    experts: dict[str, dict[str, Member]] = field(default_factory=dict)  # gate, up, down
    slots: dict[str, Slot] = field(default_factory=dict)  # public name of a float tensor -> part
    strays: list[str] = field(default_factory=list)  # public names the model has no place for
    stray_members: list[Member] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)  # public names that a merge lacks
    state: Mapping[str, Any] = field(default_factory=dict)  # the skeleton's parameters and buffers
    modules: dict[str, Any] = field(default_factory=dict)  # and its own modules, by name

    def members(self, module: str) -> list[Member]:
        """The members of a linear layer or embedding, in row order."""
        rows = self.layers[module]
        return [rows[i] for i in sorted(rows)] if len(rows) > 1 else list(rows.values())

    @property
    def filled(self) -> set[str]:
        """Names of all parameters and buffers that the checkpoint fills, biases excepted."""
        names = {slot.target for slot in self.slots.values()}
        names |= {f"{module}.weight" for module in self.layers}
        for module in self.experts:
            names |= {f"{module}.gate_up_proj", f"{module}.down_proj"}
        return names


@dataclass(slots=True)
class _Found:
    """A name after renaming: its parameter and, if a converter matched, which source it is."""

    target: str
    converter: Any = None
    source: int = 0


class _Renamer:
    """transformers' own renaming for one model."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self.prefix, self.state = model.base_model_prefix, state
        self.renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        self.converters = [t for t in mapping if isinstance(t, WeightConverter)]
        if odd := [t for t in mapping if not isinstance(t, WeightRenaming | WeightConverter)]:
            raise _refused(type(odd[0]).__name__, repr(odd[0]))

    def __call__(self, name: str) -> _Found | None:
        """None if the model has no such parameter."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            name, self.renamings, self.converters, self.prefix, self.state
        )
        if renamed not in self.state and name in self.state:
            renamed, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        if renamed not in self.state:
            return None
        if pattern is None:
            return _Found(renamed)
        # as transformers: of two converters with one source pattern the later one counts
        found = next(c for c in reversed(self.converters) if pattern in c.source_patterns)
        return _Found(renamed, found, found.source_patterns.index(pattern))


def _refused(operation: str, name: str) -> LayoutError:
    return LayoutError(
        f"{printable(name)}: transformers converts it with {operation}, expected a renaming, "
        "MergeModulelist(dim=0) or Concatenate. This engine cannot load this model yet.",
        code="Q-ENGINE-CONVERTER",
        tensor=printable(name),
        expected=("WeightRenaming", "MergeModulelist", "Concatenate"),
        actual=operation,
    )


def _operations(found: _Found, name: str) -> tuple[bool, int | None]:
    """(are experts stacked, axis of concatenation or None) of a converter that is understood."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    stacked, axis = False, None
    for i, op in enumerate(found.converter.operations):
        if type(op) is MergeModulelist and op.dim == 0 and i == 0:
            stacked = True
        elif type(op) is Concatenate and axis is None and op.num_shards_attribute is None:
            axis = op.dim
        else:
            raise _refused(repr(op), name)
    if (axis is not None and axis < 0) or (stacked and axis == 0):
        raise _refused(repr(found.converter.operations[-1]), name)
    if len(found.converter.target_patterns) != 1:
        raise _refused(repr(found.converter), name)
    return stacked, axis


def _as_one_expert(name: str) -> str:
    """Name of the first expert's tensor, for a tensor that holds all: experts.up -> experts.0.up"""
    return _EXPERTS.sub(r"\1.0.\2", name)


def arrange(plan: Plan, model: PreTrainedModel) -> Layout:
    """Find the place in ``model`` of everything that ``plan`` holds.

    Args:
        model: the skeleton, on the meta device, its own modules still in place.

    Raises:
        LayoutError: ``Q-ENGINE-CONVERTER`` for a conversion that is not understood.
        CheckpointError: ``Q-TENSOR-DUPLICATE`` if two tensors fill one place,
            ``Q-CKPT-MISMATCH`` if experts are partly quantized.
    """
    from transformers.core_model_loading import dot_natural_key

    state = model.state_dict(keep_vars=True)
    rename = _Renamer(model, state)
    layout = Layout(state=state, modules=dict(named_modules_of(model)))
    for name, member in plan.quantized.items():
        _place_member(rename, layout, name, member)
    merged: dict[str, dict[int, list[tuple[str, _Found]]]] = {}
    for name in sorted(plan.dense, key=dot_natural_key):
        found = rename(name) or rename(_as_one_expert(name))
        if found is None:
            layout.strays.append(name)
        elif found.converter is None:
            layout.slots[name] = Slot(target=found.target)
        else:
            merged.setdefault(found.target, {}).setdefault(found.source, []).append((name, found))
    for target, sources in merged.items():
        _place_merged(plan, layout, target, sources, tuple(state[target].shape))
    _check_unique(plan, layout)
    return layout


def _place_member(rename: _Renamer, layout: Layout, name: str, member: Member) -> None:
    role = member.layer.role
    if member.layer.experts and role and _place_part(rename, layout, name, member, role):
        return  # a part of a stack that is stored as the model has it
    key = f"{_as_one_expert(name) if member.layer.experts else name}.weight"
    found = rename(key)
    role = _ROLES.get(name.rpartition(".")[2], "") if member.layer.experts else ""
    if found is None and role and _place_part(rename, layout, name, member, role):
        return  # stored one by one, where the model has stacks and knows no other storage
    if found is None:
        layout.stray_members.append(member)
        return
    stacked, axis = _operations(found, name) if found.converter is not None else (False, None)
    module, _, leaf = found.target.rpartition(".")
    if member.layer.experts:
        sources = 1 if found.converter is None else len(found.converter.source_patterns)
        roles = {("gate_up_proj", 2): ("gate", "up"), ("down_proj", 1): ("down",)}
        if not stacked or (leaf, sources) not in roles:
            raise _refused(f"{sources} source(s) into {found.target!r}", name)
        _add(layout.experts.setdefault(module, {}), roles[leaf, sources][found.source], member)
        return
    if leaf != "weight" or stacked or axis not in (None, 0):
        raise _refused(f"parameter {found.target!r}", name)
    rows = layout.layers.setdefault(module, {})
    if found.source in rows:
        raise _twice(found.target, rows[found.source].layer.name, member.layer.name)
    rows[found.source] = member


def _place_part(rename: _Renamer, layout: Layout, name: str, member: Member, role: str) -> bool:
    """Whether experts are a role of the model's own stack, which is then noted."""
    found = rename(f"{name.rpartition('.')[0]}.{weight_leaf(role)}")
    if found is None or found.converter is not None:
        return False
    module = found.target.rpartition(".")[0]
    _add(layout.experts.setdefault(module, {}), role, member)
    return True


def _add(roles: dict[str, Member], role: str, member: Member) -> None:
    if role in roles:
        raise _twice(role, roles[role].layer.name, member.layer.name)
    roles[role] = member


def _twice(target: str, first: str, second: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(target)}: filled by both {printable(first)!r} and {printable(second)!r}, "
        "expected one of them. The same parameter is stored twice; remove one.",
        code="Q-TENSOR-DUPLICATE",
        tensor=printable(second),
        expected=first,
        actual=second,
    )


def _place_merged(
    plan: Plan,
    layout: Layout,
    target: str,
    sources: Mapping[int, list[tuple[str, _Found]]],
    size: tuple[int, ...],
) -> None:
    """Slots of the tensors that are merged into one parameter of shape ``size``."""
    start = 0
    converter = next(iter(sources.values()))[0][1].converter
    for source in range(len(converter.source_patterns)):
        stop = start
        for name, found in sources.get(source, []):
            stacked, axis = _operations(found, name)
            shape = plan.checkpoint.tensors[plan.dense[name]].shape
            number = _number(name)
            if stacked and number is not None and number >= size[0]:
                layout.strays.append(name)
                continue
            index: list[int | slice] = []
            if stacked:
                index = [slice(None) if number is None else number]
            if axis is not None:
                inner = axis - (stacked and number is not None)
                if inner >= len(shape):
                    raise _refused(repr(found.converter), name)
                stop = start + shape[inner]
                index += [slice(None)] * (axis - len(index)) + [slice(start, stop)]
            layout.slots[name] = Slot(target=target, index=tuple(index))
        start = stop
    layout.incomplete += _lacking(sources, converter, size[0])


def _number(name: str) -> int | None:
    """3 for ``...experts.3.up_proj.weight``; None if the name has none."""
    found = _NUMBERED.match(name)
    return int(found[2]) if found else None


def _lacking(
    sources: Mapping[int, list[tuple[str, _Found]]], converter: Any, experts: int
) -> list[str]:
    """Names that a merge needs and the checkpoint does not hold."""
    have = {name for found in sources.values() for name, _ in found}
    example = min(have)
    numbered = _NUMBERED.match(example)
    out = []
    for source, pattern in enumerate(converter.source_patterns):
        if numbered is None:
            out += [] if source in sources else [f"{pattern} beside {example}"]
            continue
        leaf = pattern.rpartition("*.")[2]
        out += [f"{numbered[1]}.{e}.{leaf}" for e in range(experts)]
    return [name for name in out if name not in have]


def _check_unique(plan: Plan, layout: Layout) -> None:
    seen: dict[str, str] = {}
    for module, members in layout.layers.items():
        seen[f"{module}.weight"] = next(iter(members.values())).layer.name
    for module, roles in layout.experts.items():
        first = next(iter(roles.values())).layer.name
        seen[f"{module}.gate_up_proj"] = seen[f"{module}.down_proj"] = first
    for name, slot in layout.slots.items():
        key = f"{slot.target}{slot.index or ''}"
        other = seen.get(key) or seen.get(slot.target)
        if other is not None:
            if _partly_quantized(layout, slot.target):
                raise _mixed(plan, name, other)
            raise _twice(slot.target, other, name)
        seen[key] = name


def _partly_quantized(layout: Layout, target: str) -> bool:
    return target.rpartition(".")[0] in layout.experts


def _mixed(plan: Plan, name: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{plan.checkpoint.path}: {printable(name)!r} is stored as float, {printable(other)!r} of "
        "the same experts is quantized; expected all of them alike. Quantize all experts.",
        code="Q-CKPT-MISMATCH",
        path=plan.checkpoint.path,
        tensor=name,
        actual=other,
    )
