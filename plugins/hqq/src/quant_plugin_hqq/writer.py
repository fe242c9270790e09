"""The config block of a plan, as transformers writes it; for saving in this format."""

from __future__ import annotations

import json
from typing import Any

from quant_core.describe import float_matrices
from quant_core.errors import LayoutError
from quant_plugin_hqq.config import HqqConfig
from quant_plugin_hqq.scheme import HqqScheme

__all__ = ["config_for"]


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan``; the block it was read from, if there is one.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what the config states once.
    """
    config = plan.match.config if plan.match is not None else None
    if isinstance(config, HqqConfig) and config.stored:
        stored: dict[str, Any] = json.loads(config.stored)
        return stored
    members = plan.members.values()
    found = {
        (m.scheme.meta.bits, m.scheme.meta.group_size)
        for m in members
        if isinstance(m.scheme, HqqScheme)
    }
    if len(found) != 1:
        raise LayoutError(
            f"plan: the HQQ layers have (nbits, group_size) of {sorted(found)}, expected one pair, "
            "because the config holds one for all layers. Write all layers alike.",
            code="Q-LAYOUT-REPRESENT",
            tensor="nbits",
            actual=sorted(found),
            plugin="hqq",
        )
    bits, group_size = next(iter(found))
    return {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": {
                "nbits": bits,
                "group_size": group_size,
                "axis": 1,
                "channel_wise": True,
                "view_as_float": False,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": float_matrices(plan),
    }
