"""Where SGLang's own loading meets a packed layer: empty parameters under the stored names.

A model's ``load_weights`` looks every stored tensor up among its parameters. What belongs to a
packed layer finds an empty parameter there. The first time it is passed over: the layer reads its
tensors from the file itself, one matrix at a time. When SGLang loads again, it is kept until the
layer has all of its tensors:

    restore_weights_before_loading    of every layer: a new round
    weight_loader                     keeps a tensor under its stored name
    process_weights_after_loading     first one: is every layer complete? then each refills itself

Where ``sglang_loader`` feeds the model, layers read from the new file themselves again.

Source: SGLang 0.5.23, srt/model_loader/loader.py (postprocess_weights),
srt/model_executor/model_runner_components/weight_updater.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.engines.staged import cannot_reload, staged_plan
from quant_core.ledger import missing_error

if TYPE_CHECKING:
    from quant_core.plan import Plan

__all__ = ["Round", "Slots"]

_WEIGHTS = ("weight", "w13_weight", "w2_weight")

# What SGLang's models make of the ends of stored names before they look them up.
_RENAMED = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


class Round:
    """All packed layers of a model, while weights are loaded again."""

    def __init__(self) -> None:
        self.all: list[Slots] = []
        self.checked = True

    def start(self) -> None:
        self.checked = False

    def reread(self, plan: Plan) -> None:
        """In this round every layer reads from ``plan``."""
        for slots in self.all:
            slots.source = plan

    def check(self, plan: Plan) -> None:
        """Before the first layer takes new weights.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` if any layer lacks any.
        """
        if self.checked:
            return
        self.checked = True
        lacking = [
            name
            for slots in self.all
            if slots.source is None
            for name in slots.names
            if name not in (slots.staged or {})
        ]
        if lacking:
            for slots in self.all:
                slots.staged = None
            raise missing_error(plan.checkpoint, lacking, "all packed layers, which load together")


class Slots:
    """The empty parameters of one layer.

    Args:
        sources: parameter name -> {shard id that SGLang passes (None: none): stored name}.
    """

    def __init__(
        self, layer: nn.Module, sources: Mapping[str, Mapping[Any, str]], around: Round
    ) -> None:
        self.names = list(dict.fromkeys(n for keys in sources.values() for n in keys.values()))
        self.loaded = False
        self.staged: dict[str, Tensor] | None = None
        self.source: Plan | None = None
        self.round = around
        around.all.append(self)
        for name, keys in sources.items():
            for one in {name, _renamed(name)}:
                if one in _WEIGHTS:
                    continue  # see add_weight
                self._add(layer, one, torch.empty(0, dtype=torch.uint8), keys)

    def add_weight(
        self, layer: nn.Module, name: str, dtype: torch.dtype, keys: Mapping[Any, str]
    ) -> str:
        """An empty weight, which other code of SGLang asks for dtype and device; its device."""
        param = self._add(layer, name, torch.empty(0, dtype=dtype), keys)
        return str(param.device)

    def _add(
        self, layer: nn.Module, name: str, value: Tensor, keys: Mapping[Any, str]
    ) -> nn.Parameter:
        param = nn.Parameter(value, requires_grad=False)
        param.weight_loader = partial(self._accept, dict(keys))  # type: ignore[attr-defined]
        layer.register_parameter(name, param)
        return param

    def _accept(
        self, keys: Mapping[Any, str], param: nn.Parameter, loaded: Tensor, *args: Any, **kw: Any
    ) -> None:
        if not self.loaded:
            return
        if self.staged is None:
            raise cannot_reload("they came outside of a weight update")
        key: Any = args[0] if args else None
        if "expert_id" in kw:
            key = (kw["shard_id"], kw["expert_id"])
        if key not in keys:
            raise cannot_reload(f"a tensor for part {key!r} of a layer that has {sorted(keys)}")
        self.staged[keys[key]] = loaded

    def restore(self) -> None:
        """A new round begins."""
        if self.loaded:
            self.round.start()
            self.staged, self.source = {}, None

    def take(self, plan: Plan) -> Plan | None:
        """What to read the layer from; None: nothing new.

        Raises:
            CheckpointError: as ``Round.check``.
        """
        if not self.loaded:
            self.loaded = True
            return plan
        self.round.check(plan)
        staged, source = self.staged, self.source
        self.staged = self.source = None
        if source is not None:
            return source
        return None if staged is None else staged_plan(plan, staged)
