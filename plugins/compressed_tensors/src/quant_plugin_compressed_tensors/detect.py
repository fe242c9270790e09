"""Is this a compressed-tensors checkpoint? Only its config says so; tensors alone never do.

quantization_config (or the older compression_config) of config.json
  quant_method "compressed-tensors", or no quant_method but config_groups
"""

from __future__ import annotations

from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.spec import FormatMatch
from quant_plugin_compressed_tensors.cache import cache_warnings
from quant_plugin_compressed_tensors.config import parse_config

__all__ = ["detect"]


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
    extra = cache_warnings(config, checkpoint)
    return FormatMatch(
        plugin="compressed_tensors",
        level="declared",
        evidence=f"quant_method {method!r}" if method else "config_groups",
        config=replace(config, warnings=config.warnings + extra),
    )
