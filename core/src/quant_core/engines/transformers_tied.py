"""Tied weights as the checkpoint has them: one packed copy, one float copy, or none."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from quant_core.engines.transformers_names import Layout
from quant_core.errors import LayoutError, summarize
from quant_core.nn import QuantEmbedding, QuantLinear
from quant_core.walk import named_modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Tied"]

log = logging.getLogger("quant_core")


class Tied:
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
        for name in layout.state:
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
            raise LayoutError(
                f"{target}: tied to {source}, which is no embedding; expected one. "
                "Store both in the checkpoint.",
                code="Q-ENGINE-MODULE",
                tensor=target,
            )
        self.model.set_submodule(target, QuantLinear.tied(owner))


def _forget_ties(model: PreTrainedModel, gone: set[str]) -> None:
    """Take ``gone`` out of what transformers ties, now and whenever it ties again."""
    for prefix, module in named_modules_of(model).items():
        model_of: Any = module
        ties = module.__dict__.get("all_tied_weights_keys")
        if not isinstance(ties, dict):
            continue
        start = f"{prefix}." if prefix else ""
        kept = {t: s for t, s in ties.items() if start + t not in gone}
        if kept != ties:
            model_of.all_tied_weights_keys = kept
            model_of._tied_weights_keys = dict(kept)
