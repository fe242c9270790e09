"""The config block of a plan, as transformers writes it; for saving in this format."""

from __future__ import annotations

import json
from typing import Any

from quant_core.describe import float_matrices, one_value
from quant_plugin_bitsandbytes.config import BnbConfig
from quant_plugin_bitsandbytes.scheme import FourBitScheme, Int8Scheme

__all__ = ["config_for"]


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan``; the block it was read from, if there is one.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if the layers differ in what the config states once.
    """
    config = plan.match.config if plan.match is not None else None
    if isinstance(config, BnbConfig) and config.stored:
        stored: dict[str, Any] = json.loads(config.stored)
        return stored
    members = plan.members.values()
    schemes = [m.scheme for m in members if isinstance(m.scheme, FourBitScheme | Int8Scheme)]
    four = [s for s in schemes if isinstance(s, FourBitScheme)]
    bits = one_value(
        {4 if isinstance(s, FourBitScheme) else 8 for s in schemes}, "bits", plugin="bitsandbytes"
    )
    block: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": float_matrices(plan) or None,
    }
    if bits == 4:
        block |= {
            "bnb_4bit_quant_type": one_value(
                {s.state.quant_type for s in four}, "quant_type", plugin="bitsandbytes"
            ),
            "bnb_4bit_use_double_quant": one_value(
                {bool(s.state.nested_block) for s in four},
                "double quantization",
                plugin="bitsandbytes",
            ),
            "bnb_4bit_quant_storage": one_value(
                {s.storage for s in four}, "storage dtype", plugin="bitsandbytes"
            ),
        }
    return block
