"""The ``quantization_config`` block that describes a plan in GPTQ's words.

A plan read from a GPTQ checkpoint gives back the block it was read from, key by key. Any other
plan is described from its schemes: the most frequent settings become the defaults, the rest
``dynamic`` entries, float members that share a block with quantized ones ``-:`` entries.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quant_core.describe import module_names, schemes_of
from quant_core.errors import LayoutError
from quant_plugin_gptq.config import GptqConfig
from quant_plugin_gptq.scheme import GptqScheme

__all__ = ["config_for", "describe"]

_Settings = tuple[int, int, bool, bool]  # bits, group_size, sym, desc_act


def _settings(scheme: GptqScheme) -> _Settings:
    size = -1 if scheme.groups == 1 else scheme.group_size
    return (scheme.bits, size, scheme.sym is not False, bool(scheme.desc_act))


def _siblings(name: str) -> str:
    """The name without layer and expert numbers: equal for the same module of each layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def describe(schemes: Mapping[str, GptqScheme], floats: Iterable[str] = ()) -> dict[str, Any]:
    """A config block.

    Args:
        schemes: stored module path -> scheme.
        floats: stored module paths of float weights; those whose siblings in other layers are
            quantized get a ``-:`` entry.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if no scheme is given, or they mix v1, v2 and planar.
    """
    dialects = {(s.v1, s.planar) for s in schemes.values()}
    if len(dialects) != 1:
        raise LayoutError(
            f"the plan holds {len(dialects)} GPTQ dialects (v1 zeros, planar), expected one for "
            "all layers. Write all layers in one format.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=len(dialects),
            plugin="gptq",
        )
    ((v1, planar),) = dialects
    default = Counter(_settings(s) for s in schemes.values()).most_common(1)[0][0]
    checkpoint_format = "gptq_p" if planar else "gptq" if v1 else "gptq_v2"
    keys = ("bits", "group_size", "sym", "desc_act")
    out: dict[str, Any] = {
        "quant_method": "gptq",
        **dict(zip(keys, default, strict=True)),
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": any(n.rpartition(".")[2] == "lm_head" for n in schemes),
    }
    quantized = {_siblings(name) for name in schemes}
    dynamic: dict[str, Any] = {
        f"-:{re.escape(name)}$": {} for name in floats if _siblings(name) in quantized
    }
    dynamic |= {
        f"+:{re.escape(name)}$": dict(zip(keys, _settings(scheme), strict=True))
        for name, scheme in schemes.items()
        if _settings(scheme) != default
    }
    if dynamic:
        out["dynamic"] = dynamic
    return out


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members have GPTQ schemes."""
    match = plan.match
    if match is not None and isinstance(match.config, GptqConfig) and match.config.bits is not None:
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    floats = [
        name
        for member in plan.members.values()
        if not member.quantized
        for name in module_names(member.layer)
    ]
    return describe(schemes_of(plan, GptqScheme), floats)
