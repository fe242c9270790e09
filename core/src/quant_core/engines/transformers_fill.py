"""Fill a transformers skeleton from a plan: swap modules, load everything, account for everything.

The skeleton lives on the meta device. Nothing is read until every name has found its place and
every difference is either one of the rules below or an error; so a checkpoint that does not fit
costs a header and no memory.

Rules that allow a difference:
    tied               the config ties it to a parameter that is stored
    computed           a buffer that the model computes (rotary frequencies, position ids)
    further layers     beyond num_hidden_layers, as config.json announces (multi-token prediction)
    listed             the model class itself lists the name as ignorable
    zero bias          an all-zero bias of a layer that has none (old quantization tools write it)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.build import Builder
from quant_core.engines.transformers_names import Layout, Slot, arrange
from quant_core.errors import CheckpointError, LayoutError, printable, summarize
from quant_core.ledger import missing_error, unexpected_error
from quant_core.load import read_parameter
from quant_core.nn import QuantEmbedding, QuantLinear
from quant_core.plan import Member, Plan, member_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Filled", "fill_model"]

log = logging.getLogger("quant_core")

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_INV_FREQ = re.compile(r"(?:^|\.)(?:rotary_emb|rotary_pos_emb)\.inv_freq$")


@dataclass(slots=True)
class Filled:
    """What was done: needed to save the model, and to leave the rest to transformers.

    Attributes:
        slots: public name of each stored float tensor -> the parameter it fills.
        members: name -> member as it was loaded.
        left: parameters that transformers itself is to initialise.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)


def fill_model(
    model: PreTrainedModel, plan: Plan, builder: Builder, dtypes: Mapping[str, torch.dtype]
) -> Filled:
    """Load all of ``plan`` into ``model``, in place.

    Args:
        model: a skeleton on the meta device; parameters have the dtype that is wanted.
        dtypes: name pattern -> dtype of parameters that are kept in another one.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING``, ``Q-TENSOR-UNEXPECTED``, ``Q-TENSOR-DUPLICATE``,
            ``Q-TENSOR-UNREAD``, each naming all tensors.
        LayoutError: ``Q-LAYOUT-SHAPE``, ``Q-ENGINE-MODULE``, ``Q-ENGINE-CONVERTER``.
    """
    layout = arrange(plan, model)
    tied = _Tied(model, layout)
    _Check(plan, model, layout, tied).run()
    filled = Filled(slots=dict(layout.slots), left=tied.left)
    for module in [name for name, _ in model.named_modules()]:
        if module in layout.layers:
            members = [_without_zero_bias(plan, model, module, m) for m in layout.members(module)]
            new = _build(builder, model, module, members)
        elif module in layout.experts:
            roles = layout.experts[module]
            members = list(roles.values())
            new = _build_experts(builder, model, module, roles)
        else:
            continue
        _check_bias(plan, model, module, members)
        model.set_submodule(module, new)
        filled.members |= {m.layer.name: m for m in members}
    _fill_dense(model, plan, layout, builder.device, dtypes)
    tied.apply()
    plan.ledger.check_loaded()
    return filled


# ------------------------------------------------------------------------------- completeness


class _Check:
    """Every parameter is filled and every stored tensor used, or a named rule says why not."""

    def __init__(self, plan: Plan, model: PreTrainedModel, layout: Layout, tied: _Tied) -> None:
        self.plan, self.model, self.layout, self.tied = plan, model, layout, tied
        self.ledger = plan.ledger
        self.computed = {name for name, _ in model.named_non_persistent_buffers()}
        self.listed = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
        self.layers = self._announced_layers()
        self.skipped: dict[str, list[str]] = {}

    def _announced_layers(self) -> range:
        """Numbers of the layers that the file has and the model does not."""
        text = self.model.config.get_text_config()
        first = getattr(text, "num_hidden_layers", None)
        raw: Any = self.plan.checkpoint.config
        raw = raw.get("text_config", raw)
        if not isinstance(raw, Mapping):
            return range(0)
        count, extra = raw.get("num_hidden_layers", first), raw.get("num_nextn_predict_layers", 0)
        if not isinstance(first, int) or not isinstance(count, int) or not isinstance(extra, int):
            return range(0)
        return range(first, count + extra)

    def run(self) -> None:
        missing = sorted(self._missing()) + self.layout.incomplete
        if missing:
            raise missing_error(
                self.plan.checkpoint, missing, f"{type(self.model).__name__} of config.json"
            )
        extra = [name for name in self.layout.strays if not self._skip_tensor(name)]
        for member in self.layout.stray_members:
            extra += [] if self._skip_member(member) else _stored_names(self.plan, member)
        if extra:
            why = f"only what {type(self.model).__name__} of config.json has"
            raise unexpected_error(self.plan.checkpoint, extra, why)
        for rule, names in self.skipped.items():
            log.info("%d tensor(s) not loaded (%s): %s", len(names), rule, summarize(names, 3))

    def _missing(self) -> Iterator[str]:
        there = self.layout.filled | self.tied.targets | self.tied.left
        inside = tuple(f"{m}." for m in (*self.layout.layers, *self.layout.experts))
        for name in self.model.state_dict():
            # biases of swapped modules are checked when these are built
            if name not in there and not name.startswith(inside):
                yield name
        for module, roles in self.layout.experts.items():
            known = next(iter(roles.values())).layer.name.rpartition(".")[0]
            for role in {"gate", "up", "down"} - set(roles):
                yield f"{known}.{role} (experts of {module})"

    def _rule(self, name: str) -> str:
        number = _LAYER_NUMBER.search(name)
        if number is not None and int(number[1]) in self.layers:
            return f"layers {self.layers.start}..{self.layers.stop - 1} are not part of the model"
        if _INV_FREQ.search(name) or name in self.computed:
            return "computed by the model"
        if any(p.search(name) for p in self.listed):
            return f"listed as ignorable by {type(self.model).__name__}"
        return ""

    def _skip_tensor(self, name: str) -> bool:
        stored = self.plan.dense[name]
        rule = self._rule(name) or self._zero_bias(name, stored)
        if rule:
            self.ledger.skip(stored, rule)
            self.skipped.setdefault(rule, []).append(stored)
        return bool(rule)

    def _skip_member(self, member: Member) -> bool:
        rule = self._rule(f"{member.layer.name}.weight")
        for stored in _stored_names(self.plan, member) if rule else ():
            self.ledger.skip(stored, rule)
            self.skipped.setdefault(rule, []).append(stored)
        return bool(rule)

    def _zero_bias(self, name: str, stored: str) -> str:
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or f"{module}.weight" not in self.layout.filled:
            return ""
        return _ZERO_BIAS if not bool(self.plan.checkpoint.read(stored).any()) else ""


_ZERO_BIAS = "all-zero bias of a layer without one"


def _stored_names(plan: Plan, member: Member) -> list[str]:
    names = dict.fromkeys(name for _, name, _, _ in member_parts(member))
    return [n for n in names if n in plan.checkpoint.tensors]


def _stored_biases(plan: Plan, member: Member) -> list[str]:
    names = dict.fromkeys(n for param, n, _, _ in member_parts(member) if param.name == "bias")
    return [n for n in names if n in plan.checkpoint.tensors]


def _without_zero_bias(plan: Plan, model: nn.Module, module: str, member: Member) -> Member:
    """``member`` without a bias that is all zeros and that the model does not have."""
    biases = _stored_biases(plan, member)
    if getattr(model.get_submodule(module), "bias", None) is not None or not biases:
        return member
    for name in biases:
        if bool(plan.checkpoint.read(name).any()):
            return member
    for name in biases:
        plan.ledger.skip(name, _ZERO_BIAS)
    log.info("%d tensor(s) not loaded (%s): %s", len(biases), _ZERO_BIAS, summarize(biases, 3))
    return replace(member, params=tuple(p for p in member.params if p.name != "bias"))


def _check_bias(plan: Plan, model: nn.Module, module: str, members: Sequence[Member]) -> None:
    wanted = getattr(model.get_submodule(module), "bias", None) is not None
    stored = [_stored_biases(plan, m) for m in members]
    if wanted and not all(stored):
        lacking = [f"{m.layer.name}.bias" for m, names in zip(members, stored) if not names]
        raise missing_error(plan.checkpoint, lacking, f"{module}, which has a bias")
    if not wanted and any(stored):
        extra = [name for names in stored for name in names]
        raise unexpected_error(plan.checkpoint, extra, f"no bias, as {module} has none")


# ------------------------------------------------------------------------------------- modules


def _build(builder: Builder, model: nn.Module, module: str, members: Sequence[Member]) -> nn.Module:
    old = model.get_submodule(module)
    if type(old) is nn.Linear:
        return builder.linear(module, members, n=old.out_features, k=old.in_features)
    if type(old) is nn.Embedding and len(members) == 1:
        return builder.embedding(module, members[0], n=old.num_embeddings, k=old.embedding_dim)
    raise LayoutError(
        f"{module}: is a {type(old).__name__} in the model and quantized in the checkpoint, "
        "expected a Linear or an Embedding. Exclude this layer from quantization.",
        code="Q-ENGINE-MODULE",
        tensor=module,
        expected=("Linear", "Embedding"),
        actual=type(old).__name__,
    )


def _build_experts(
    builder: Builder, model: nn.Module, module: str, roles: Mapping[str, Member]
) -> nn.Module:
    from transformers.integrations.moe import _default_apply_gate

    old: Any = model.get_submodule(module)
    extras = ("is_transposed", "has_bias", "has_post_expert_norm")
    plain = (
        isinstance(getattr(old, "act_fn", None), nn.Module)
        and getattr(type(old), "_apply_gate", _default_apply_gate) is _default_apply_gate
        and getattr(old, "is_concatenated", True)
        and getattr(old, "has_gate", True)
        and not any(getattr(old, name, False) for name in extras)
    )
    if not plain:
        raise LayoutError(
            f"{module}: {type(old).__name__} computes more than down(act(gate(x)) * up(x)) with "
            "[experts, out, in] weights, expected only that. Its experts cannot stay packed yet.",
            code="Q-ENGINE-MODULE",
            tensor=module,
            actual=type(old).__name__,
        )
    experts, rows, hidden = old.gate_up_proj.shape
    sizes = {"gate": (rows // 2, hidden), "up": (rows // 2, hidden)}
    sizes["down"] = tuple(old.down_proj.shape[1:])
    for role, member in roles.items():
        found = (len(member.layer.experts), *member.scheme.shape)  # type: ignore[union-attr]
        if found != (experts, *sizes[role]):
            raise LayoutError(
                f"{member.layer.name}: the checkpoint holds {found[0]} experts of {found[1]} x "
                f"{found[2]}, the model expects {experts} of {sizes[role][0]} x {sizes[role][1]}. "
                "config.json describes another model, or the checkpoint was cut.",
                code="Q-LAYOUT-SHAPE",
                tensor=member.layer.name,
                expected=(experts, *sizes[role]),
                actual=found,
            )
    return builder.experts(module, activation=old.act_fn, **roles)


# --------------------------------------------------------------------------------- float tensors


def _wanted_dtype(name: str, old: Tensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    for pattern, dtype in dtypes.items():
        if re.search(pattern.replace("*", ".*"), name):
            return dtype
    return old.dtype


def _fill_dense(
    model: PreTrainedModel,
    plan: Plan,
    layout: Layout,
    device: str,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Read each float tensor into its parameter: one at a time, merged ones slice by slice."""
    state = model.state_dict(keep_vars=True)
    new: dict[str, Tensor] = {}
    for name, slot in layout.slots.items():
        old = state[slot.target]
        value = read_parameter(plan, name)
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
        dtype = _wanted_dtype(slot.target, old, dtypes)
        if not slot.index:
            _set(model, slot.target, old, value.to(device=device, dtype=dtype))
            continue
        if slot.target not in new:
            new[slot.target] = torch.empty(old.shape, dtype=dtype, device=device)
            _set(model, slot.target, old, new[slot.target])
        new[slot.target][slot.index].copy_(value)


def _set(model: nn.Module, name: str, old: Tensor, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    parent = model.get_submodule(module)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
        parent._parameters[leaf] = value
    else:
        parent._buffers[leaf] = value
    value._is_hf_initialized = True  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------ tied weights


class _Tied:
    """Ties as the checkpoint has them: one packed copy, one float copy, or none."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        self.model, self.left = model, set[str]()
        self.packed: list[tuple[str, str]] = []
        self.dense: list[tuple[str, str]] = []
        self.untied: list[str] = []
        slots = {slot.target for slot in layout.slots.values()}
        quantized = {f"{module}.weight" for module in layout.layers}
        for target, source in model.all_tied_weights_keys.items():
            if target in quantized or (target in slots and source in quantized):
                self.untied.append(target)
            elif target in slots and source not in slots:
                self.dense.append((source, target))
            elif target not in slots and source in quantized:
                self.packed.append((target, source))
            elif target not in slots and source in slots:
                self.dense.append((target, source))
        absent = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
        there = layout.filled | self.targets
        for name in model.state_dict():
            if name not in there and any(p.search(name) for p in absent):
                self.left.add(name)

    @property
    def targets(self) -> set[str]:
        """Parameters that get their value from another one."""
        return {target for target, _ in (*self.packed, *self.dense)}

    def apply(self) -> None:
        model = self.model
        for target, source in self.dense:
            module, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(source))
        for target, source in self.packed:
            self._share(target.rpartition(".")[0], source.rpartition(".")[0])
        if self.untied:
            log.info("%s stored on its own: not tied as the config says", summarize(self.untied))
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
        gone = {target for target, _ in self.packed} | set(self.untied)
        if gone:
            _forget_ties(model, gone)

    def _share(self, target: str, source: str) -> None:
        old, owner = self.model.get_submodule(target), self.model.get_submodule(source)
        if type(old) is not nn.Linear or old.bias is not None:
            raise LayoutError(
                f"{target}: is a {type(old).__name__} tied to the packed {source}, expected a "
                "Linear without bias. This model cannot share packed embeddings.",
                code="Q-ENGINE-MODULE",
                tensor=target,
                actual=type(old).__name__,
            )
        if not isinstance(owner, QuantEmbedding):
            raise CheckpointError(
                f"{target}: tied to {source}, which is no embedding; expected one. "
                "Store both in the checkpoint.",
                code="Q-ENGINE-MODULE",
                tensor=target,
            )
        self.model.set_submodule(target, QuantLinear.tied(owner))


def _forget_ties(model: PreTrainedModel, gone: set[str]) -> None:
    """Take ``gone`` out of what transformers ties, now and whenever it ties again."""
    for prefix, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(ties, dict):
            continue
        start = f"{prefix}." if prefix else ""
        kept = {t: s for t, s in ties.items() if start + t not in gone}
        if kept != ties:
            module.all_tied_weights_keys = kept
            module._tied_weights_keys = dict(kept)
