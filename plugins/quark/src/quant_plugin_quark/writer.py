"""The ``quantization_config`` block of a plan: the one it came with, or one made of its schemes.

The most frequent arguments become the global ones, the others entries of ``layer_quant_config`` by
name; float matrices are excluded by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quant_core.describe import float_matrices, schemes_of
from quant_core.errors import LayoutError
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


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members are of this format."""
    match = plan.match
    if match is not None and isinstance(match.config, QuarkConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    return describe(schemes_of(plan, QuarkScheme), float_matrices(plan))
