"""Does the checkpoint fit the model? Asked of names and header, before a tensor is read.

Every parameter is filled, every stored tensor used, every size right; or one of these rules says
why not:

    tied               the config ties it to a parameter that is stored
    computed           a buffer that the model computes (rotary frequencies, position ids)
    further layers     beyond num_hidden_layers, as config.json announces (multi-token prediction)
    listed             the model class itself lists the name as ignorable
    zero bias          an all-zero bias of a layer that has none (old quantization tools write it)
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from quant_core.engines.transformers_experts import (
    expert_sizes,
    has_expert_bias,
    is_replaceable,
)
from quant_core.engines.transformers_names import Layout, arrange
from quant_core.engines.transformers_tied import Tied
from quant_core.errors import LayoutError, summarize
from quant_core.ledger import missing_error, unexpected_error
from quant_core.plan import Member, Plan, member_parts, param_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Check", "check_bias", "missing_parameters", "without_zero_bias"]

log = logging.getLogger("quant_core")

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_INV_FREQ = re.compile(r"(?:^|\.)(?:rotary_emb|rotary_pos_emb)\.inv_freq$")
_ZERO_BIAS = "all-zero bias of a layer without one"


class Check:
    """Every parameter is filled and every stored tensor used, or a named rule says why not."""

    def __init__(self, plan: Plan, model: PreTrainedModel, layout: Layout, tied: Tied) -> None:
        self.plan, self.model, self.layout, self.tied = plan, model, layout, tied
        self.ledger = plan.ledger
        self.computed = {
            f"{module}.{name}" if module else name
            for module, own in layout.modules.items()
            for name in own._non_persistent_buffers_set
        }
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
        strays = [name for name in self.layout.strays if not self._skip_tensor(name)]
        extra = [self.plan.dense[name] for name in strays]
        for member in self.layout.stray_members:
            extra += [] if self._skip_member(member) else _stored_names(self.plan, member)
        if extra:
            why = f"only what {type(self.model).__name__} of config.json has"
            raise unexpected_error(self.plan.checkpoint, extra, why)
        self._kinds()
        self._sizes()
        for rule, names in self.skipped.items():
            log.info("%d tensor(s) not loaded (%s): %s", len(names), rule, summarize(names, 3))

    def _missing(self) -> Iterator[str]:
        there = self.layout.filled | self.tied.targets | self.tied.left
        inside = tuple(f"{m}." for m in (*self.layout.layers, *self.layout.experts))
        for name in self.layout.state:
            # biases of swapped modules are checked when these are built
            if name not in there and not name.startswith(inside):
                yield name
        for module, roles in self.layout.experts.items():
            role, member = next(iter(roles.items()))
            known, _, last = member.layer.name.rpartition(".")
            for lacking in sorted({"gate", "up", "down"} - set(roles)):
                name = last.replace(role, lacking) if role in last else lacking
                yield f"{known}.{name} (the {lacking} experts of {module})"

    def _kinds(self) -> None:
        """Packed layers replace plain modules only; a subclass may compute something else."""
        for module in self.layout.layers:
            old, members = self.layout.modules[module], self.layout.members(module)
            if type(old) is nn.Linear or (type(old) is nn.Embedding and len(members) == 1):
                continue
            raise LayoutError(
                f"{module}: is a {type(old).__name__} in the model and quantized in the "
                "checkpoint, expected a Linear or an Embedding. Exclude this layer from "
                "quantization.",
                code="Q-ENGINE-MODULE",
                tensor=module,
                expected=("Linear", "Embedding"),
                actual=type(old).__name__,
            )
        for module in self.layout.experts:
            old = self.layout.modules[module]
            if not is_replaceable(old):
                raise LayoutError(
                    f"{module}: {type(old).__name__} computes more than down(act(gate(x)) * "
                    "up(x)) with [experts, out, in] weights, expected only that. "
                    "Its experts cannot stay packed; exclude them from quantization.",
                    code="Q-ENGINE-MODULE",
                    tensor=module,
                    actual=type(old).__name__,
                )

    def _sizes(self) -> None:
        """Sizes as far as the header tells; exact shapes are checked when a tensor is read."""
        state, wrong = self.layout.state, []
        for name, slot in self.layout.slots.items():
            found, part = self.plan.checkpoint.tensors[self.plan.dense[name]].shape, slot.index
            want = tuple(state[slot.target][part].shape)
            if math.prod(found) != math.prod(want):
                wrong.append((name, found, want))
        for module in self.layout.layers:
            members = self.layout.members(module)
            shapes = [m.scheme.shape for m in members]  # type: ignore[union-attr]
            found = (sum(n for n, _ in shapes), shapes[0][1])
            want = tuple(state[f"{module}.weight"].shape)
            if found != want or len({k for _, k in shapes}) != 1:
                wrong.append((members[0].layer.name, found, want))
        for module, roles in self.layout.experts.items():
            sizes = expert_sizes(self.layout.modules[module])
            for role, member in roles.items():
                found = (len(member.layer.experts), *member.scheme.shape)  # type: ignore[union-attr]
                if found != sizes[role]:
                    wrong.append((member.layer.name, found, sizes[role]))
        if wrong:
            shown = (f"{name} {found} and not {want}" for name, found, want in wrong)
            raise LayoutError(
                f"{self.plan.checkpoint.path}: {len(wrong)} tensor(s) of another size than the "
                f"model expects: {summarize(shown)}. config.json describes another model, or the "
                "checkpoint was cut.",
                code="Q-LAYOUT-SHAPE",
                path=self.plan.checkpoint.path,
                tensor=wrong[0][0],
                expected=wrong[0][2],
                actual=wrong[0][1],
            )

    def rule(self, name: str) -> str:
        """Why the model rightly has no place for a tensor; "" if there is no reason."""
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
        rule = self.rule(name) or self._zero_bias(name, stored)
        if rule:
            self.ledger.skip(stored, rule)
            self.skipped.setdefault(rule, []).append(stored)
        return bool(rule)

    def _skip_member(self, member: Member) -> bool:
        rule = self.rule(f"{member.layer.name}.weight")
        for stored in _stored_names(self.plan, member) if rule else ():
            self.ledger.skip(stored, rule)
            self.skipped.setdefault(rule, []).append(stored)
        return bool(rule)

    def _zero_bias(self, name: str, stored: str) -> str:
        module, _, leaf = name.rpartition(".")
        if leaf != "bias" or f"{module}.weight" not in self.layout.filled:
            return ""
        return _ZERO_BIAS if not bool(self.plan.checkpoint.read(stored).any()) else ""


def missing_parameters(plan: Plan, model: PreTrainedModel) -> list[str]:
    """Parameters of a model's skeleton that the checkpoint does not fill."""
    layout = arrange(plan, model)
    check = Check(plan, model, layout, Tied(model, layout))
    return sorted(check._missing()) + layout.incomplete


def _stored_names(plan: Plan, member: Member) -> list[str]:
    names = dict.fromkeys(name for _, name, _, _ in member_parts(member))
    return [n for n in names if n in plan.checkpoint.tensors]


def _stored_biases(plan: Plan, member: Member) -> list[str]:
    names: dict[str, None] = {}
    for param in member.params:
        if param.name == "bias":
            for expert in member.layer.experts or (None,):
                names |= dict.fromkeys(n for n, _ in param_sources(member.layer, param, expert))
    return [n for n in names if n in plan.checkpoint.tensors]


def without_zero_bias(plan: Plan, old: nn.Module, member: Member) -> Member:
    """``member`` without a bias that is all zeros and that the model's own module has not."""
    biases = _stored_biases(plan, member)
    if getattr(old, "bias", None) is not None or not biases:
        return member
    for name in biases:
        if bool(plan.checkpoint.read(name).any()):
            return member
    for name in biases:
        plan.ledger.skip(name, _ZERO_BIAS)
    log.info("%d tensor(s) not loaded (%s): %s", len(biases), _ZERO_BIAS, summarize(biases, 3))
    return replace(member, params=tuple(p for p in member.params if p.name != "bias"))


def check_bias(plan: Plan, old: nn.Module, module: str, members: Sequence[Member]) -> None:
    wanted = getattr(old, "bias", None) is not None
    if not wanted and not isinstance(old, nn.Linear):
        wanted = has_expert_bias(old)
    stored = [_stored_biases(plan, m) for m in members]
    lacking = wanted and [
        f"{m.layer.name}.bias"
        for m, names in zip(members, stored)
        if not names and not any(p.role == "acc_bias" for p in m.params)  # it holds the bias
    ]
    if lacking:
        raise missing_error(plan.checkpoint, lacking, f"{module}, which has a bias")
    if not wanted and any(stored):
        extra = [name for names in stored for name in names]
        raise unexpected_error(plan.checkpoint, extra, f"no bias, as {module} has none")
