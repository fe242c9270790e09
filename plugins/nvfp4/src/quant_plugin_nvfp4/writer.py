"""The ``quantization_config`` block of a plan: the one it was read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quant_core.describe import float_matrices, schemes_of
from quant_core.errors import LayoutError
from quant_plugin_nvfp4.cache import cache_block
from quant_plugin_nvfp4.config import ModelOptConfig
from quant_plugin_nvfp4.scheme import ModelOptScheme

__all__ = ["config_for", "describe"]


def describe(schemes: Mapping[str, ModelOptScheme], floats: tuple[str, ...] = ()) -> dict[str, Any]:
    """A block in the dialect of config.json.

    Args:
        schemes: stored module path -> scheme.
        floats: stored module paths of float matrices.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if there is no layer.
    """
    entries = {
        name: {
            "quant_algo": s.algo.name,
            **({"group_size": s.group_size} if s.group_size else {}),
        }
        for name, s in schemes.items()
    }
    if not entries:
        raise LayoutError(
            "the plan holds no layer of this format, expected at least one. "
            "Quantize a layer, or save the model without a quantization config.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=0,
            plugin="nvfp4",
        )
    first = next(iter(entries.values()))
    if all(e == first for e in entries.values()):
        return {"quant_method": "modelopt", **first, "ignore": list(floats)}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": entries,
        "ignore": [],
    }


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members are of this format."""
    match = plan.match
    if match is not None and isinstance(match.config, ModelOptConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    block = describe(schemes_of(plan, ModelOptScheme), tuple(float_matrices(plan)))
    caches = [m.scheme for m in plan.attention.values()]
    return block | {"kv_cache_scheme": cache_block(caches)} if caches else block
