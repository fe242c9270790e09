"""Fill a transformers skeleton from a plan: swap modules, load everything, account for everything.

The skeleton lives on the meta device. Nothing is read until every name has found its place and
``transformers_check`` is content; so a checkpoint that does not fit costs a header and no memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.build import Builder
from quant_core.engines.transformers_attention import attach_attention
from quant_core.engines.transformers_cache import CacheMode, attach_caches
from quant_core.engines.transformers_check import Check, check_bias, without_zero_bias
from quant_core.engines.transformers_experts import gating_of
from quant_core.engines.transformers_finite import Floats
from quant_core.engines.transformers_later import attach_parts
from quant_core.engines.transformers_names import Layout, Slot, arrange
from quant_core.engines.transformers_tied import Tied
from quant_core.errors import LayoutError, printable
from quant_core.plan import Member, Plan
from quant_core.shared import share_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Filled", "fill_model"]


@dataclass(slots=True)
class Filled:
    """What was done: needed to save the model, and to leave the rest to transformers.

    Attributes:
        slots: public name of each stored float tensor -> the parameter it fills.
        members: name -> member as it was loaded.
        left: parameters that transformers itself is to initialise.
        modules: the model's own, by name; replaced ones by what replaced them.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


def fill_model(
    model: PreTrainedModel,
    plan: Plan,
    builder: Builder,
    dtypes: Mapping[str, torch.dtype],
    *,
    kv_cache: CacheMode | None = None,
) -> Filled:
    """Load all of ``plan`` into ``model``, in place.

    Args:
        model: a skeleton on the meta device; parameters have the dtype that is wanted.
        dtypes: name pattern -> dtype of parameters that are kept in another one.
        kv_cache: as in ``load_model``.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED``, ``Q-TENSOR-DUPLICATE``,
            ``Q-TENSOR-UNREAD``, each naming all tensors.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-ENGINE-MODULE``, ``Q-ENGINE-CONVERTER``.
    """
    layout = arrange(plan, model)
    tied = Tied(model, layout)
    check = Check(plan, model, layout, tied)
    check.run()
    filled = Filled(slots=dict(layout.slots), left=tied.left, modules=layout.modules)
    for module, old in layout.modules.items():
        if module in layout.layers:
            members = [without_zero_bias(plan, old, m) for m in layout.members(module)]
            new = _build(builder, old, module, members)
        elif module in layout.experts:
            roles = layout.experts[module]
            members = list(roles.values())
            new = _build_experts(builder, old, module, roles)
        else:
            continue
        check_bias(plan, old, module, members)
        parent, _, leaf = module.rpartition(".")
        layout.modules[parent]._modules[leaf] = new  # in place of ``old``
        layout.modules[module] = new
        filled.members |= {m.layer.name: m for m in members}
    attach_caches(model, plan, layout, mode=kv_cache, device=builder.device, beyond=check.rule)
    _fill_dense(plan, layout, builder, dtypes)
    tied.apply()
    share_inputs(model)
    attach_attention(
        model,
        plan.registry,
        dtype=builder.dtype,
        device=builder.device,
        kernels=builder.kernels,
    )
    attach_parts(
        model,
        plan.registry,
        dtype=builder.dtype,
        device=builder.device,
        kernels=builder.kernels,
    )
    plan.ledger.check_loaded()
    return filled


# ------------------------------------------------------------------------------------- modules


def _build(builder: Builder, old: nn.Module, module: str, members: Sequence[Member]) -> nn.Module:
    if isinstance(old, nn.Embedding):
        return builder.embedding(module, members[0], n=old.num_embeddings, k=old.embedding_dim)
    assert isinstance(old, nn.Linear), "Check lets nothing else through"
    return builder.linear(module, members, n=old.out_features, k=old.in_features)


def _build_experts(
    builder: Builder, old: Any, module: str, roles: Mapping[str, Member]
) -> nn.Module:
    gating = gating_of(old)
    return builder.experts(
        module,
        gate=roles["gate"],
        up=roles["up"],
        down=roles["down"],
        activation=None if gating is not None else old.act_fn,
        gating=gating,
    )


# --------------------------------------------------------------------------------- float tensors


def _wanted_dtype(name: str, old: Tensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    for pattern, dtype in dtypes.items():
        if re.search(pattern.replace("*", ".*"), name):
            return dtype
    return old.dtype


def _fill_dense(
    plan: Plan,
    layout: Layout,
    builder: Builder,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Read each float tensor into its parameter: one at a time, merged ones slice by slice."""
    state, device = layout.state, builder.device
    new: dict[str, Tensor] = {}
    floats = Floats(plan)
    taken: dict[str, Tensor | None] = {}
    for name, slot in layout.slots.items():
        old = state[slot.target]
        dtype = _wanted_dtype(slot.target, old, dtypes)
        if slot.target not in taken:
            found = builder.taken(slot.target, tuple(old.shape), dtype)
            taken[slot.target] = found
            if found is not None:
                _set(layout, slot.target, old, found)
        if taken[slot.target] is not None:
            plan.ledger.load((plan.dense[name], ()))
            continue
        value = builder.parameter(name)
        if value.is_floating_point() != old.is_floating_point():
            raise LayoutError(
                f"{plan.checkpoint.path}: tensor {printable(plan.dense[name])!r} is {value.dtype}, "
                f"the model's {slot.target!r} is {old.dtype}; expected both float or both not. "
                "The checkpoint belongs to another model.",
                code="Q-LAYOUT-DTYPE",
                tensor=plan.dense[name],
                expected=str(old.dtype),
                actual=str(value.dtype),
            )
        part = old[slot.index]
        if value.shape != part.shape:
            raise LayoutError(
                f"{plan.checkpoint.path}: tensor {printable(plan.dense[name])!r} has shape "
                f"{tuple(value.shape)}, the model expects {tuple(part.shape)} for "
                f"{slot.target!r}. config.json describes another model, or the checkpoint was cut.",
                code="Q-LAYOUT-SHAPE",
                tensor=plan.dense[name],
                expected=tuple(part.shape),
                actual=tuple(value.shape),
            )
        if not slot.index:
            value = value.to(device=device, dtype=dtype)
            _set(layout, slot.target, old, value)
            if isinstance(old, nn.Parameter):
                floats.add(slot.target, value)
            builder.filled(slot.target, value)
            continue
        if slot.target not in new:
            new[slot.target] = torch.empty(old.shape, dtype=dtype, device=device)
            _set(layout, slot.target, old, new[slot.target])
            builder.filled(slot.target, new[slot.target])
            if isinstance(old, nn.Parameter):
                floats.add(slot.target, new[slot.target])
        new[slot.target][slot.index].copy_(value)
    floats.check(layout.slots)


def _set(layout: Layout, name: str, old: Tensor, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    parent = layout.modules[module]
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
        parent._parameters[leaf] = value
    else:
        parent._buffers[leaf] = value
    value._is_hf_initialized = True  # type: ignore[attr-defined]
