"""The config block of a plan, as AutoAWQ writes it; for saving in this format."""

from __future__ import annotations

from typing import Any

from quant_core.errors import LayoutError
from quant_plugin_awq.scheme import AwqScheme

__all__ = ["config_for"]


def _one(values: set[Any], what: str) -> Any:
    """The single value of ``values``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``; an AWQ config states one value for all layers.
    """
    if len(values) == 1:
        return next(iter(values))
    shown = sorted(map(str, values)) or ["none"]
    raise LayoutError(
        f"plan: {what} of the AWQ layers: {', '.join(shown)}; expected one value, because the "
        "config holds one for all layers. Choose a target format with per-layer settings.",
        code="Q-LAYOUT-REPRESENT",
        tensor=what,
        actual=shown,
        plugin="awq",
    )


def _group_size(schemes: list[AwqScheme]) -> int:
    sizes = {s.group_size for s in schemes}
    if len(sizes) > 1 and all(s.group_size == s.shape[1] for s in schemes):
        return -1
    return int(_one(sizes, "group_size"))


def _is_linear(plan: Any, member: Any) -> bool:
    """An unquantized matrix that a reader might take for a packed one."""
    if member.layer.kind == "embedding":
        return False
    tensors = plan.checkpoint.tensors
    return any(n.endswith(".weight") and len(tensors[n].shape) == 2 for n in member.stored)


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan``.

    Args:
        plan: has ``members`` (name -> member with ``layer``, ``scheme``, ``stored``) and
            ``checkpoint``, as ``quant_core.plan.Plan``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what the config states once.
    """
    members = plan.members.values()
    schemes = [m.scheme for m in members if isinstance(m.scheme, AwqScheme)]
    bits = _one({s.bits for s in schemes}, "bits")
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": _group_size(schemes),
        "zero_point": _one({s.zero_point for s in schemes}, "zero_point"),
        "version": _one({s.layout for s in schemes}, "version"),
        "modules_to_not_convert": [
            m.layer.name
            for m in members
            if not isinstance(m.scheme, AwqScheme) and _is_linear(plan, m)
        ]
        or None,
    }
    if any(m.layer.name.rpartition(".")[2] == "lm_head" and m.quantized for m in members):
        config["lm_head"] = True
    if bits != 4:  # readers tell the bit order of other widths from the tool's name alone
        interleaved = _one({s.interleaved for s in schemes}, "channel order")
        tag = {"provider": "auto-round"} if interleaved else {"meta": {"quantizer": ["gptqmodel"]}}
        config |= tag
    return config
