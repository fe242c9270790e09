"""The config block of a plan, as AutoAWQ writes it; for saving in this format."""

from __future__ import annotations

from typing import Any

from quant_core.describe import float_matrices, one_value
from quant_plugin_awq.scheme import AwqScheme

__all__ = ["config_for"]


def _group_size(schemes: list[AwqScheme]) -> int:
    sizes = {s.group_size for s in schemes}
    if len(sizes) > 1 and all(s.group_size == s.shape[1] for s in schemes):
        return -1
    return int(one_value(sizes, "group_size", plugin="awq"))


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
    bits = one_value({s.bits for s in schemes}, "bits", plugin="awq")
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": _group_size(schemes),
        "zero_point": one_value({s.zero_point for s in schemes}, "zero_point", plugin="awq"),
        "version": one_value({s.layout for s in schemes}, "version", plugin="awq"),
        "modules_to_not_convert": float_matrices(plan) or None,
    }
    if any(m.layer.name.rpartition(".")[2] == "lm_head" and m.quantized for m in members):
        config["lm_head"] = True
    if bits != 4:  # readers tell the bit order of other widths from the tool's name alone
        interleaved = one_value({s.interleaved for s in schemes}, "channel order", plugin="awq")
        tag = {"provider": "auto-round"} if interleaved else {"meta": {"quantizer": ["gptqmodel"]}}
        config |= tag
    return config
