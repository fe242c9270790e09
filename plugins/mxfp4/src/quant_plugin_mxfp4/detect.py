"""Is this a checkpoint of MXFP4 experts? Its config says so, or blocks with scales beside them do.

quantization_config of config.json, quant_method "mxfp4"      declared
no method anywhere, <name>_blocks and <name>_scales in uint8  structural
"""

from __future__ import annotations

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.spec import FormatMatch
from quant_plugin_mxfp4.config import Mxfp4Config, parse_config
from quant_plugin_mxfp4.layers import block_stacks

__all__ = ["detect"]


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the config names this format but is malformed.
    """
    block = quantization_config(checkpoint)
    method = None if block is None else block.get("quant_method", block.get("method"))
    if block is not None and method is not None:
        if str(method).lower() != "mxfp4":
            return None
        return FormatMatch(
            plugin="mxfp4",
            level="declared",
            evidence="quant_method 'mxfp4'",
            config=parse_config(block, "config.json"),
        )
    found = block_stacks(checkpoint)
    if block is not None or not found:
        return None
    path, leaf = found[0]
    return FormatMatch(
        plugin="mxfp4",
        level="structural",
        evidence=f"{path}.{leaf}_blocks and {leaf}_scales",
        config=Mxfp4Config(),
    )
