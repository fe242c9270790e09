"""Is this an MXFP8 checkpoint? Only its config says so: other formats store the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.kv_cache import CacheForm, CacheScheme, served_cache_schemes, unserved_scales
from quant_core.presence import siblings_of
from quant_core.spec import Element, FormatMatch, TensorInfo
from quant_plugin_mxfp8.config import METHOD, parse_config

__all__ = ["FORM", "KV_LEAVES", "SCALE_NAMES", "cache_schemes", "detect", "is_quantized"]

_E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")
SCALE_NAMES = ("weight_scale_inv", "weight_scale")
FORM = CacheForm(names={"k": "k_proj.k_scale", "v": "v_proj.v_scale"}, elements=(_E4M3.name,))
"""One of the names that serving engines look for."""
KV_LEAVES = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "output_scale"})
"""Last name components of scales of a quantized KV cache."""


def is_quantized(path: str, leaves: Mapping[str, TensorInfo]) -> bool:
    """Whether a module stores codes or scales."""
    weight = leaves.get("weight")
    if weight is not None and (weight.dtype.startswith("float8") or weight.dtype == "uint8"):
        return True
    return any(name in leaves for name in SCALE_NAMES)


def cache_schemes(checkpoint: Checkpoint) -> dict[str, CacheScheme]:
    """Stored path of the attention module -> how its keys and values may be quantized."""
    return served_cache_schemes(checkpoint, element=_E4M3, plugin="mxfp8")


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the config names this format but is malformed or not supported.
    """
    block = quantization_config(checkpoint)
    method = None if block is None else block.get("quant_method")
    if block is None or not isinstance(method, str) or method.strip().lower() != METHOD:
        return None
    config = parse_config(block, "config.json")
    asked_in = config.file if config.kv_cache else ""
    unserved = unserved_scales(checkpoint, cache_schemes(checkpoint), KV_LEAVES, asked_in=asked_in)
    return FormatMatch(
        plugin="mxfp8",
        level="declared",
        evidence=f"quant_method {method!r}",
        config=replace(
            config,
            quantized=siblings_of(checkpoint, is_quantized),
            warnings=config.warnings + unserved,
        ),
    )
