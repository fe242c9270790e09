"""The config block of a plan, as transformers writes it; for saving in this format."""

from __future__ import annotations

import json
from typing import Any

from quant_core.errors import LayoutError
from quant_plugin_bitsandbytes.config import BnbConfig
from quant_plugin_bitsandbytes.scheme import FourBitScheme, Int8Scheme

__all__ = ["config_for"]


def _one(values: set[Any], what: str) -> Any:
    if len(values) == 1:
        return next(iter(values))
    shown = sorted(map(str, values)) or ["none"]
    raise LayoutError(
        f"plan: {what} of the bitsandbytes layers: {', '.join(shown)}; expected one value, because "
        "the config holds one for all layers. Write all layers alike.",
        code="Q-LAYOUT-REPRESENT",
        tensor=what,
        actual=shown,
        plugin="bitsandbytes",
    )


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
    bits = _one({4 if isinstance(s, FourBitScheme) else 8 for s in schemes}, "bits")
    block: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": [
            m.layer.name
            for m in members
            if not m.quantized and m.layer.kind != "embedding" and _has_matrix(plan, m)
        ]
        or None,
    }
    if bits == 4:
        block |= {
            "bnb_4bit_quant_type": _one({s.state.quant_type for s in four}, "quant_type"),
            "bnb_4bit_use_double_quant": _one(
                {bool(s.state.nested_block) for s in four}, "double quantization"
            ),
            "bnb_4bit_quant_storage": _one({s.storage for s in four}, "storage dtype"),
        }
    return block


def _has_matrix(plan: Any, member: Any) -> bool:
    tensors = plan.checkpoint.tensors
    return any(n.endswith(".weight") and len(tensors[n].shape) == 2 for n in member.stored)
