"""Online quantization in transformers: which modules can be packed, and how the result is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from quant_core.convert.side_files import model_config
from quant_core.engines.transformers_experts import is_replaceable
from quant_core.engines.transformers_names import arrange
from quant_core.engines.transformers_save import Provenance
from quant_core.errors import summarize
from quant_core.online_plan import NOT_IN_MODEL, OnlinePlan
from quant_core.online_stacks import StackLayout
from quant_core.plan import Member, Plan, member_parts
from quant_core.spec import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["online_provenance", "replaceable_in", "stacks_in"]


def replaceable_in(model: PreTrainedModel, plan: Plan) -> Callable[[Member], str]:
    """Why a packed layer cannot take the place of a member of ``plan``; "" where it can.

    Args:
        model: the skeleton, its own modules still in place.
    """
    layout = arrange(plan, model)
    public = {stored: name for name, stored in plan.dense.items()}
    packed = {m.layer.name: module for module in layout.layers for m in layout.members(module)}
    packed |= {m.layer.name: e for e, roles in layout.experts.items() for m in roles.values()}

    def module_of(member: Member) -> str | None:
        if member.quantized:
            return packed.get(member.layer.name)
        weight = next(n for n in member.stored if n.endswith(".weight"))
        slot = layout.slots.get(public[weight])
        return None if slot is None else slot.target.rpartition(".")[0]

    def why_not(member: Member) -> str:
        name = module_of(member)
        if name is None:
            return NOT_IN_MODEL
        module: Any = model.get_submodule(name)
        if is_replaceable(module) if member.layer.experts else type(module) is nn.Linear:
            return ""
        return f"{type(module).__name__} is no layer that can be packed"

    return why_not


def stacks_in(model: PreTrainedModel, plan: Plan) -> dict[str, StackLayout]:
    """Stacked experts of ``plan`` that packed ones can replace: public module name -> layout.

    Args:
        model: the skeleton, its own modules still in place.
    """
    slots = arrange(plan, model).slots
    out = {}
    for name, slot in slots.items():
        module, _, leaf = name.rpartition(".")
        target = slot.target.rpartition(".")[0]
        if leaf != "gate_up_proj" or not slot.target.endswith(leaf):
            continue
        experts: Any = model.get_submodule(target)
        if is_replaceable(experts):
            out[module] = StackLayout(
                transposed=bool(getattr(experts, "is_transposed", False)),
                in_turn=not getattr(experts, "is_concatenated", True),
            )
    return out


def online_provenance(online: OnlinePlan, loaded: Provenance) -> Provenance:
    """What saving needs, of the format that was quantized to instead of the source's.

    Args:
        loaded: of the plan that was loaded.
    """
    plan, tensors = online.plan, dict(loaded.tensors)
    members = {}
    for name, member in loaded.members.items():
        for _, stored, _, _ in member_parts(plan.members[name]):
            if stored not in loaded.skipped or stored.rpartition(".")[2] == "weight":
                tensors.pop(stored, None)
        members[name] = online.target[name]
        has_bias = member.layer.bias and any(p.name == "bias" for p in member.params)
        tensors |= _infos(members[name], has_bias)
    side_files = {f for p in plan.registry.plugins.values() for f in p.info.side_files}
    config = model_config(plan) | {"quantization_config": online.config}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return replace(
        loaded,
        tensors=tensors,
        members=members,
        files={"config.json": text.encode()},
        dropped=frozenset(side_files),
        refusal=_refusal(online),
    )


def _infos(member: Member, has_bias: bool) -> dict[str, TensorInfo]:
    """What is stored for a member: everything required, and its bias."""
    out = {}
    for param, name, _, _ in member_parts(member):
        if param.need == "required" or (param.name == "bias" and has_bias):
            out[name] = TensorInfo(
                name=name, dtype=param.dtypes[0], shape=param.shape, file="", offset=0, nbytes=0
            )
    return out


def _refusal(online: OnlinePlan) -> str:
    if online.config is None:
        return f"plugin {online.plugin!r} writes no config of its format"
    if online.foreign:
        return f"{summarize(online.foreign)} keep the format of the source"
    return ""
