"""The config block of a plan, as transformers and DeepSeek write it; for saving in this format."""

from __future__ import annotations

from typing import Any

from quant_core.errors import LayoutError
from quant_plugin_fp8.scheme import Fp8Scheme

__all__ = ["config_for"]


def _one(values: set[Any], what: str) -> Any:
    """The single value of ``values``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``; an FP8 config states one value for all layers.
    """
    if len(values) == 1:
        return next(iter(values))
    shown = sorted(map(str, values)) or ["none"]
    raise LayoutError(
        f"plan: {what} of the FP8 layers: {', '.join(shown)}; expected one value, because the "
        "config holds one for all layers. Choose a target format with per-layer settings.",
        code="Q-LAYOUT-REPRESENT",
        tensor=what,
        actual=shown,
        plugin="fp8",
    )


def _is_linear(plan: Any, member: Any) -> bool:
    """An unquantized matrix that a reader might take for a quantized one."""
    if member.layer.kind == "embedding":
        return False
    tensors = plan.checkpoint.tensors
    return any(n.endswith(".weight") and len(tensors[n].shape) == 2 for n in member.stored)


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan`` (a ``quant_core.plan.Plan``).

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what the config states once.
    """
    members = plan.members.values()
    schemes = [m.scheme for m in members if isinstance(m.scheme, Fp8Scheme)]
    method = _one({s.method for s in schemes}, "quant_method")
    skip = [
        m.layer.name for m in members if not isinstance(m.scheme, Fp8Scheme) and _is_linear(plan, m)
    ]
    config: dict[str, Any] = {"quant_method": method, "modules_to_not_convert": skip or None}
    if method == "fbgemm_fp8":
        bound = _one({s.upper_bound for s in schemes}, "activation_scale_ub")
        return {**config, "activation_scale_ub": bound}
    size = _one({s.block for s in schemes}, "weight_block_size")
    static = _one({bool(s.input_name) for s in schemes}, "activation_scheme")
    config |= {
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": None if size is None else list(size),
    }
    if _one({s.ue8m0 for s in schemes}, "scale_fmt"):
        config["scale_fmt"] = "ue8m0"
    return config
