"""The ``quantization_config`` block of a plan: the one it came with, or one made of its schemes.

The most frequent arguments become the global ones, the others entries of ``layer_quant_config`` by
name; float matrices are excluded by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quant_core.describe import float_matrices, schemes_of
from quant_core.errors import LayoutError
from quant_core.kv_cache import CacheScheme
from quant_plugin_quark.args import LayerArgs
from quant_plugin_quark.cache import cache_args
from quant_plugin_quark.config import QuarkConfig
from quant_plugin_quark.scheme import QuarkScheme

__all__ = ["config_for", "describe"]


def describe(schemes: Mapping[str, QuarkScheme], floats: Iterable[str] = ()) -> dict[str, Any]:
    """A config block.

    Args:
        schemes: stored module path -> scheme, made from arguments.
        floats: stored module paths of float matrices.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if there is no layer.
    """
    texts = {n: json.dumps(s.args.to_json()) for n, s in schemes.items() if s.args is not None}
    if not texts or len(texts) < len(schemes):
        raise LayoutError(
            f"the plan holds {len(texts)} Quark layers with arguments, expected at least one and "
            "arguments for each. Quantize a layer, or write another format.",
            code="Q-LAYOUT-REPRESENT",
            expected=max(len(schemes), 1),
            actual=len(texts),
            plugin="quark",
        )
    default = Counter(texts.values()).most_common(1)[0][0]
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": json.loads(default),
        "layer_quant_config": {n: json.loads(t) for n, t in texts.items() if t != default},
        "layer_type_quant_config": {},
        "exclude": list(floats),
        "algo_config": None,
        "kv_cache_quant_config": {},
        "softmax_quant_spec": None,
        "export": {
            "kv_cache_group": [],
            "pack_method": "reorder",
            "weight_format": "real_quantized",
        },
        "version": "0.13",
    }


def _with_caches(
    block: dict[str, Any], schemes: Mapping[str, QuarkScheme], caches: Mapping[str, CacheScheme]
) -> dict[str, Any]:
    """The same with the outputs of the projections that compute keys and values (and queries)."""
    args, post_rope = cache_args(caches.values())
    layers, cached = {}, {}
    for path, scheme in caches.items():
        for role in scheme.operands:
            name = f"{path}.{scheme.projections[role]}"
            made = schemes.get(name)
            layer = LayerArgs(where=name) if made is None or made.args is None else made.args
            layers[name] = replace(layer, outputs=(args,)).to_json()
            cached[f"*{scheme.projections[role]}"] = layers[name]
    return {
        **block,
        "layer_quant_config": block["layer_quant_config"] | layers,
        "kv_cache_quant_config": cached,
        "kv_cache_post_rope": post_rope,
        "export": {**block["export"], "kv_cache_group": [*cached]},
    }


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members are of this format."""
    match = plan.match
    if match is not None and isinstance(match.config, QuarkConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    schemes = schemes_of(plan, QuarkScheme)
    block = describe(schemes, float_matrices(plan))
    caches = {m.layer.stored: m.scheme for m in plan.attention.values()}
    return _with_caches(block, schemes, caches) if caches else block
