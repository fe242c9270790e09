"""Is a checkpoint made by TorchAO? Its own word first, the header of its file last.

config.json quantization_config, quant_method "torchao"                 declared
no config, but header metadata "tensor_names" and tensors "_weight_*"   structural
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.presence import siblings_of
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_torchao.config import TorchaoConfig, parse_config

__all__ = ["PREFIX", "detect", "is_quantized"]

PREFIX = "_weight_"


def is_quantized(path: str, leaves: Mapping[str, TensorInfo]) -> bool:
    """Any tensor of a quantized weight counts, so that a lost one is reported as missing."""
    return any(leaf.startswith(PREFIX) for leaf in leaves)


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim on ``checkpoint``, its config parsed, or None.

    Raises:
        ConfigError: the config names this format but is malformed.
    """
    block = quantization_config(checkpoint)
    if block is None:
        found = next((n for n in checkpoint.tensors if f".{PREFIX}qdata" in n), "")
        if not found or "tensor_names" not in checkpoint.metadata:
            return None
        config, level, evidence = TorchaoConfig(file="file header"), "structural", found
    else:
        method = block.get("quant_method", block.get("method"))
        if str(method).lower() != "torchao":
            return None
        config, level = parse_config(block, "config.json"), "declared"
        evidence = f"quant_method {method!r}, {config.recipe or 'recipes by name'}"
    return FormatMatch(
        plugin="torchao",
        level=level,  # type: ignore[arg-type]
        evidence=evidence,
        config=replace(config, siblings=siblings_of(checkpoint, is_quantized)),
    )
