"""The ``quantization_config`` block that describes a plan in AutoRound's words.

A plan read from an AutoRound checkpoint gives back the block it was read from, key by key. Any
other plan is described from its schemes: the most frequent settings become the defaults, the rest
``extra_config``; so does every float matrix inside the blocks, because readers take each linear
layer of a block for a quantized one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quant_core.describe import float_matrices, schemes_of
from quant_core.errors import LayoutError
from quant_plugin_autoround.config import AutoRoundConfig
from quant_plugin_autoround.scheme import AutoRoundScheme

__all__ = ["config_for", "describe"]

_FORMATS = {
    ("minus_one", False): "auto_round:auto_gptq",
    ("minus_one", True): "auto_round:auto_gptq",
    ("raw", False): "auto_round",
    ("raw", True): "auto_round:gptqmodel",
    ("interleaved", False): "auto_round:auto_awq",
}
_BLOCK = re.compile(r"^(.+?)\.\d+\.")
_KEYS = ("bits", "group_size", "sym")


def _settings(scheme: AutoRoundScheme) -> tuple[int, int, bool]:
    size = -1 if scheme.groups == 1 else scheme.group_size
    return (scheme.bits, size, scheme.sym)


def _block(name: str) -> str:
    """The list of blocks that ``name`` lies in: ``model.layers``; "" outside."""
    found = _BLOCK.match(name)
    return found[1] if found else ""


def describe(schemes: Mapping[str, AutoRoundScheme], floats: Iterable[str] = ()) -> dict[str, Any]:
    """A config block.

    Args:
        schemes: stored module path -> scheme.
        floats: stored module paths of float matrices.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if no scheme is given, or they mix dialects.
    """
    dialects = {(s.dialect, s.has_g_idx) for s in schemes.values()}
    packing_format = _FORMATS.get(next(iter(dialects))) if len(dialects) == 1 else None
    if packing_format is None:
        raise LayoutError(
            f"the plan holds {len(dialects)} AutoRound dialects ({sorted(map(str, dialects))}), "
            "expected one packing_format for all layers. Write all layers in one.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=len(dialects),
            plugin="autoround",
        )
    default = Counter(_settings(s) for s in schemes.values()).most_common(1)[0][0]
    blocks = sorted({b for name in schemes if (b := _block(name))})
    extra: dict[str, Any] = {
        name: {"bits": 16, "data_type": "float"} for name in floats if _block(name) in blocks
    }
    for name, scheme in schemes.items():
        found = dict(zip(_KEYS, _settings(scheme), strict=True))
        changed = {k: v for k, v in found.items() if v != default[_KEYS.index(k)]}
        if not _block(name):  # outside the blocks everything is stated
            extra[name] = found | {"data_type": "int"}
        elif changed:
            extra[name] = changed
    out: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packing_format,
        **dict(zip(_KEYS, default, strict=True)),
        "data_type": "int",
    }
    if blocks:
        out["block_name_to_quantize"] = ",".join(blocks)
    if extra:
        out["extra_config"] = extra
    return out


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members have AutoRound schemes."""
    match = plan.match
    if match is not None and isinstance(match.config, AutoRoundConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    return describe(schemes_of(plan, AutoRoundScheme), float_matrices(plan))
