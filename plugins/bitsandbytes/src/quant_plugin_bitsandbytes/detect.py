"""Is a checkpoint made by bitsandbytes? Its own word first, the names of its tensors last.

config.json quantization_config, quant_method "bitsandbytes"     declared
the same without quant_method, but load_in_4bit / load_in_8bit   declared
no config, but a tensor "*.quant_state.bitsandbytes__*"          structural
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.presence import siblings_of
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_bitsandbytes.config import BnbConfig, parse_config
from quant_plugin_bitsandbytes.state import PREFIX

__all__ = ["detect", "is_quantized"]


def is_quantized(path: str, leaves: Mapping[str, TensorInfo]) -> bool:
    """Any tensor of a quantized weight counts, so that a lost one is reported as missing."""
    weight = leaves.get("weight")
    stored = weight is not None and weight.dtype in ("uint8", "int8")
    return stored or "SCB" in leaves or any(leaf.startswith("weight.") for leaf in leaves)


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim on ``checkpoint``, its config parsed, or None.

    Raises:
        ConfigError: the config names this format but is malformed.
    """
    block = quantization_config(checkpoint)
    if block is None:
        mark = f".{PREFIX}"
        name = next((n for n in checkpoint.tensors if mark in n), None)
        if name is None:
            return None
        config, level, evidence = BnbConfig(file="tensor names"), "structural", name
    else:
        method = block.get("quant_method", block.get("method"))
        flags = {"load_in_4bit", "load_in_8bit"} & block.keys()
        if (method is None and not flags) or str(method or "bitsandbytes").lower() != (
            "bitsandbytes"
        ):
            return None
        config, level = parse_config(block, "config.json"), "declared"
        evidence = f"quant_method {method!r}" if method else ", ".join(sorted(flags))
    return FormatMatch(
        plugin="bitsandbytes",
        level=level,  # type: ignore[arg-type]
        evidence=evidence,
        config=replace(config, siblings=siblings_of(checkpoint, is_quantized)),
    )
