"""The ``quantization_config`` block that describes a plan in this format's words.

A plan read from a compressed-tensors checkpoint gives back the block it was read from. Any other
plan is described from its schemes: one config group for each set of arguments. With a single group
the target is "Linear" and float matrices are ignored by name; with several, every module is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quant_core.describe import float_matrices, schemes_of
from quant_core.errors import LayoutError
from quant_core.kv_cache import CacheScheme
from quant_plugin_compressed_tensors.cache import describe_cache
from quant_plugin_compressed_tensors.config import CtConfig
from quant_plugin_compressed_tensors.packed import PackedScheme
from quant_plugin_compressed_tensors.scheme import CtScheme

__all__ = ["config_for", "describe"]

_VERSIONS = {False: "0.18.0", True: "0.17.1"}  # padded words -> a version that wrote them so


def describe(
    schemes: Mapping[str, CtScheme],
    floats: Iterable[str] = (),
    caches: Iterable[CacheScheme] = (),
) -> dict[str, Any]:
    """A config block.

    Args:
        schemes: stored module path -> scheme.
        floats: stored module paths of float matrices.
        caches: schemes of keys and values.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if no scheme is given, or words are packed in two ways.
    """
    packings = {
        s.padded for s in schemes.values() if isinstance(s, PackedScheme) and 32 % s.bits
    } or {False}
    if not schemes or len(packings) > 1:
        raise LayoutError(
            f"the plan holds {len(schemes)} compressed-tensors layers in {len(packings)} word "
            "packings, expected at least one layer and one packing. Write all layers alike.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=len(packings),
            plugin="compressed_tensors",
        )
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((scheme.weights, scheme.inputs, scheme.format), []).append(name)
    formats = {fmt for _, _, fmt in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": _VERSIONS[packings.pop()],
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": weights.to_json(),
                "input_activations": None if inputs is None else inputs.to_json(),
                "output_activations": None,
                "format": fmt,
            }
            for i, ((weights, inputs, fmt), names) in enumerate(groups.items())
        },
        "ignore": list(floats) if len(groups) == 1 else [],
        "kv_cache_scheme": describe_cache(caches),
    }


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan`` whose quantized members are of this format."""
    match = plan.match
    if match is not None and isinstance(match.config, CtConfig):
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    caches = [m.scheme for m in plan.attention.values()]
    return describe(schemes_of(plan, CtScheme), float_matrices(plan), caches)
