"""What the writers of config blocks ask of a plan, and what they may add. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quant_core.errors import LayoutError
from quant_core.plan import Member, Plan
from quant_core.scheme import Scheme
from quant_core.spec import LayerDesc

__all__ = ["Extras", "float_matrices", "module_names", "one_value", "schemes_of"]

S = TypeVar("S", bound=Scheme)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What describes a plan beside, or instead of, a block in config.json.

    Attributes:
        files: name of a JSON file beside the weights -> its content.
        metadata: entries for the header of every file of weights.
    """

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def module_names(layer: LayerDesc) -> list[str]:
    """Stored module paths: one, or one for each expert of a stack stored one by one."""
    if "{expert}" not in layer.stored:
        return [layer.stored]
    return [layer.stored.replace("{expert}", str(e)) for e in layer.experts]


def schemes_of(plan: Plan, kind: type[S]) -> dict[str, S]:
    """Stored module path -> its scheme, of members whose scheme is a ``kind``."""
    return {
        name: member.scheme
        for member in plan.members.values()
        if isinstance(member.scheme, kind)
        for name in module_names(member.layer)
    }


def float_matrices(plan: Plan) -> list[str]:
    """Stored module paths of float weights that a reader might take for quantized ones."""

    def matrix(member: Member) -> bool:
        if member.quantized or member.layer.kind == "embedding":
            return False
        tensors = plan.checkpoint.tensors
        return any(n.endswith(".weight") and len(tensors[n].shape) == 2 for n in member.stored)

    return [n for m in plan.members.values() if matrix(m) for n in module_names(m.layer)]


def one_value(values: set[Any], what: str, *, plugin: str) -> Any:
    """The single value of ``values``, for a config that states it once.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    if len(values) == 1:
        return next(iter(values))
    shown = sorted(map(str, values)) or ["none"]
    raise LayoutError(
        f"plan: {what} of the layers: {', '.join(shown)}; expected one value, because the config "
        "holds one for all layers. Choose a target format with settings for each layer.",
        code="Q-LAYOUT-REPRESENT",
        tensor=what,
        expected=1,
        actual=shown,
        plugin=plugin,
    )
