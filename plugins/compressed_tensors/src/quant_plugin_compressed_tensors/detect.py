"""Is this a compressed-tensors checkpoint? Only its config says so; tensors alone never do.

quantization_config (or the older compression_config) of config.json
  quant_method "compressed-tensors", or no quant_method but config_groups
"""

from __future__ import annotations

from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.spec import FormatMatch
from quant_plugin_compressed_tensors.config import CtConfig, parse_config

__all__ = ["KV_LEAVES", "detect"]

KV_LEAVES = frozenset(
    f"{x}_{what}" for x in "qkv" for what in ("scale", "zero_point", "global_scale")
) | {"kv_scale"}
"""Last name components of the scales of quantized attention and its cache."""


def _cache_warnings(config: CtConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the file says of quantized attention is read by nobody yet: say so."""
    owners = {m for m, leaves in checkpoint.modules.items() if KV_LEAVES & leaves.keys()}
    output = {
        m
        for m, leaves in checkpoint.modules.items()
        if "output_scale" in leaves and m.rpartition(".")[2] in ("k_proj", "v_proj")
    }
    if owners or output:
        count = len(owners) or len(output)
        return (f"KV-cache scales present, not applied ({count} attention modules)",)
    if config.kv_cache is not None and not config.kv_cache.dynamic:
        return (
            f"{config.file}: kv_cache_scheme is {config.kv_cache.label}, but no scales are stored; "
            "the cache stays unquantized",
        )
    attention = [g.name for g in config.groups.values() if g.is_attention]
    if config.kv_cache is not None or attention:
        return (f"{config.file}: quantized attention is not applied; the cache stays unquantized",)
    return ()


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the config names this format but is malformed or not supported.
    """
    block = quantization_config(checkpoint)
    if block is None:
        return None
    method = block.get("quant_method", block.get("method"))
    if method is None and "config_groups" not in block:
        return None
    if method is not None and str(method).lower() != "compressed-tensors":
        return None
    config = parse_config(block, "config.json")
    extra = _cache_warnings(config, checkpoint)
    return FormatMatch(
        plugin="compressed_tensors",
        level="declared",
        evidence=f"quant_method {method!r}" if method else "config_groups",
        config=replace(config, warnings=config.warnings + extra),
    )
