"""What a writer writes: a plan in the model's own names, and where its values come from.

A target is made from a survey and asked by a writer for one matrix or one float parameter at a
time; each call reads, fits and serializes anew, so that nothing is held in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.answers import ask_scheme
from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.errors import CheckpointError, PluginError
from quant_core.kv_cache import CacheScheme
from quant_core.plan import Member, Plan
from quant_core.scheme import Scheme
from quant_core.spec import LayerDesc, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.convert.fit import Fit
    from quant_core.tensors import LayerTensors

__all__ = ["Outline", "Target", "fit_matrix", "target_layer"]


class Outline(Checkpoint):
    """The header of a checkpoint that is not written yet."""

    container = "outline"

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> None:
        self.path = self.folder = path
        self.tensors, self.config = tensors, config
        self.metadata: Mapping[str, Any] = {}
        self.warnings = []

    def read(self, name: str, index: Index = ()) -> Tensor:
        """Raises: nothing is stored yet."""
        raise CheckpointError(
            f"{self.path}: tensor {name!r} is not written yet, expected only its shape to be "
            "asked for. Open the checkpoint once the conversion is done.",
            code="Q-CKPT-IO",
            path=self.path,
            tensor=name,
        )


def target_layer(layer: LayerDesc) -> LayerDesc:
    """A member of the source in the model's own names, experts stored one by one."""
    stored = layer.name
    if layer.experts:
        before, _, after = stored.rpartition("experts.")
        stored = f"{before}experts.{{expert}}.{after}"
    return replace(layer, stored=stored)


def fit_matrix(
    source: Plan,
    format: str,
    member: Member,
    tensors: LayerTensors,
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """How the target holds one matrix of the source.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if it does not.
    """
    from quant_core.convert.fit import Fit

    assert isinstance(member.scheme, Scheme)
    fit = source.registry.call_one(
        format,
        "fit_scheme",
        layer=target_layer(member.layer),
        tensors=tensors,
        operands=dict(member.scheme.operands),
        options=options,
        allow_inexact=allow_inexact,
    )
    if not isinstance(fit, Fit):
        raise PluginError(
            f"plugin {format!r}: hook fit_scheme returned {type(fit).__name__} for "
            f"{member.layer.name!r}, expected a Fit. This is a bug of the plugin; report it there.",
            code="Q-PLUGIN-RESULT",
            plugin=format,
            tensor=member.layer.name,
            actual=type(fit).__name__,
        )
    return fit


@dataclass(slots=True, kw_only=True)
class Target:
    """A conversion, ready to be written.

    Attributes:
        format: id of the target's plugin.
        plan: members with the target's schemes, by the model's own names; ``dense`` maps every
            float parameter to its own name.
        source: what is converted.
        config: the model's ``config.json`` without any quantization block.
        options: as they were settled.
        float_dtypes: float parameter -> torch dtype name it is written in.
    """

    format: str
    plan: Plan
    source: Plan
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    allow_inexact: bool
    float_dtypes: Mapping[str, str] = field(default_factory=dict)

    def matrix(self, name: str, expert: int | None = None) -> dict[str, Tensor]:
        """Stored tensors of one matrix of the member ``name``: param name -> tensor."""
        from quant_core.load import read_matrix

        tensors = read_matrix(self.source, self.source.members[name], expert)
        fit = fit_matrix(
            self.source,
            self.format,
            self.source.members[name],
            tensors,
            self.options,
            self.allow_inexact,
        )
        member = self.plan.members[name]
        assert isinstance(member.scheme, Scheme)
        made: dict[str, Tensor] = ask_scheme(member.scheme, "serialize", member.layer, fit.tensors)
        return made

    def cache(self, name: str) -> dict[str, Tensor]:
        """Stored name -> tensor of the scales of keys and values of one attention module."""
        from quant_core.load import read_matrix

        member = self.plan.attention[name]
        assert isinstance(member.scheme, CacheScheme)
        tensors = read_matrix(self.source, self.source.attention[name])
        values = member.scheme.serialize(member.layer, tensors)
        return {t.stored: values[t.name] for t in member.scheme.tensors}

    def parameter(self, name: str) -> Tensor:
        """A float parameter by its public name; a quantized weight is dequantized."""
        import torch

        from quant_core.dequantize import dense_weight
        from quant_core.load import read_matrix, read_parameter

        if name in self.source.dense:
            return read_parameter(self.source, name)
        module, _, leaf = name.rpartition(".")
        member = self.source.members[module]
        tensors = read_matrix(self.source, member)
        if leaf == "bias":
            assert tensors.bias is not None
            return tensors.bias
        assert isinstance(member.scheme, Scheme)
        weight = dense_weight(tensors.weight, member.scheme.shape[1])
        return weight.to(getattr(torch, self.float_dtypes[name]))
