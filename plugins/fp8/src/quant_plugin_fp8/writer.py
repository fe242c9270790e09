"""The config block of a plan, as transformers and DeepSeek write it; for saving in this format."""

from __future__ import annotations

from typing import Any

from quant_core.describe import float_matrices, one_value
from quant_plugin_fp8.scheme import Fp8Scheme

__all__ = ["config_for"]


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan`` (a ``quant_core.plan.Plan``).

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what the config states once.
    """
    members = plan.members.values()
    schemes = [m.scheme for m in members if isinstance(m.scheme, Fp8Scheme)]
    method = one_value({s.method for s in schemes}, "quant_method", plugin="fp8")
    skip = float_matrices(plan)
    config: dict[str, Any] = {"quant_method": method, "modules_to_not_convert": skip or None}
    if method == "fbgemm_fp8":
        bound = one_value({s.upper_bound for s in schemes}, "activation_scale_ub", plugin="fp8")
        return {**config, "activation_scale_ub": bound}
    size = one_value({s.block for s in schemes}, "weight_block_size", plugin="fp8")
    static = one_value({bool(s.input_name) for s in schemes}, "activation_scheme", plugin="fp8")
    config |= {
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": None if size is None else list(size),
    }
    if one_value({s.ue8m0 for s in schemes}, "scale_fmt", plugin="fp8"):
        config["scale_fmt"] = "ue8m0"
    return config
