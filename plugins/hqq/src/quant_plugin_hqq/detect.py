"""Is a checkpoint made by HQQ? Its own word first, the names of its tensors last.

config.json quantization_config, quant_method "hqq"     declared
no config, but modules of W_q, scale, zero and nbits    structural
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.presence import siblings_of
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_hqq.config import HqqConfig, parse_config
from quant_plugin_hqq.meta import NAMES

__all__ = ["detect", "is_quantized"]

_SHAPE = frozenset({"W_q", "scale", "zero", "nbits", "axis"})


def is_quantized(path: str, leaves: Mapping[str, TensorInfo]) -> bool:
    """Several tensors of a quantized weight, so that a lost one is reported as missing."""
    return "W_q" in leaves or len(NAMES & leaves.keys()) > 3


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim on ``checkpoint``, its config parsed, or None.

    Raises:
        ConfigError: the config names this format but is malformed.
    """
    block = quantization_config(checkpoint)
    if block is None:
        found = next((p for p, leaves in checkpoint.modules.items() if leaves.keys() >= _SHAPE), "")
        if not found:
            return None
        config, level, evidence = HqqConfig(file="tensor names"), "structural", f"{found}.W_q"
    else:
        method = block.get("quant_method", block.get("method"))
        if str(method).lower() != "hqq":
            return None
        config, level = parse_config(block, "config.json"), "declared"
        evidence = f"quant_method {method!r}"
    return FormatMatch(
        plugin="hqq",
        level=level,  # type: ignore[arg-type]
        evidence=evidence,
        config=replace(config, siblings=siblings_of(checkpoint, is_quantized)),
    )
