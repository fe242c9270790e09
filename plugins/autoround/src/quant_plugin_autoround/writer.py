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
from quant_core.floatspec import FloatScheme
from quant_plugin_autoround.config import AutoRoundConfig
from quant_plugin_autoround.fit_floats import FLOAT_FORMAT, settings_of
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

Schemes = Mapping[str, AutoRoundScheme | FloatScheme]


def _settings(scheme: AutoRoundScheme | FloatScheme) -> dict[str, Any]:
    """The keys of one module, all of them."""
    if isinstance(scheme, FloatScheme):
        return settings_of(scheme)
    size = -1 if scheme.groups == 1 else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.sym, "data_type": "int"}


def _packing(scheme: AutoRoundScheme | FloatScheme) -> str:
    if isinstance(scheme, FloatScheme):
        return FLOAT_FORMAT
    return _FORMATS.get((scheme.dialect, scheme.has_g_idx), f"{scheme.dialect} with g_idx")


def _changed(found: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """What sets one module apart; activations that stay floats have 16 bits."""
    plain = {"act_bits": 16} if "act_bits" in default else {}
    return {k: v for k, v in {**plain, **found}.items() if default.get(k, ...) != v}


def _block(name: str) -> str:
    """The list of blocks that ``name`` lies in: ``model.layers``; "" outside."""
    found = _BLOCK.match(name)
    return found[1] if found else ""


def describe(schemes: Schemes, floats: Iterable[str] = ()) -> dict[str, Any]:
    """A config block.

    Args:
        schemes: stored module path -> scheme.
        floats: stored module paths of float matrices.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if no scheme is given, or they mix dialects.
    """
    packings = {_packing(s) for s in schemes.values()}
    if len(packings) != 1 or not packings <= {*_FORMATS.values(), FLOAT_FORMAT}:
        raise LayoutError(
            f"the plan holds {len(packings)} AutoRound packings ({sorted(packings)}), "
            "expected one packing_format for all layers. Write all layers in one.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=len(packings),
            plugin="autoround",
        )
    every = {name: _settings(scheme) for name, scheme in schemes.items()}
    texts = Counter(json.dumps(found) for found in every.values())
    default: dict[str, Any] = json.loads(texts.most_common(1)[0][0])
    blocks = sorted({b for name in schemes if (b := _block(name))})
    extra: dict[str, Any] = {
        name: {"bits": 16, "data_type": "float"} for name in floats if _block(name) in blocks
    }
    for name, found in every.items():
        if not _block(name):  # outside the blocks everything is stated
            extra[name] = found | _changed(found, default)
        elif changed := _changed(found, default):
            extra[name] = changed
    out: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packings.pop(),
        **default,
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
    schemes: Schemes = schemes_of(plan, AutoRoundScheme) | schemes_of(plan, FloatScheme)
    return describe(schemes, float_matrices(plan))
