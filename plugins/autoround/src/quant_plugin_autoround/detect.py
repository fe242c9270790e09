"""Is this a checkpoint in AutoRound's own format?

``quantization_config`` of config.json says so, or quantization_config.json beside the weights. Both
exist in the files the tool writes; they must agree on every value that decides how bytes are read.
Tensors alone are never claimed: their names and shapes are those of other formats too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.errors import ConfigError, printable
from quant_core.fields import Fields, thaw
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch
from quant_plugin_autoround.config import AutoRoundConfig, parse_config

__all__ = ["METHODS", "SIDE_FILE", "detect"]

METHODS = ("auto-round", "intel/auto-round")  # the second in files before AutoRound 0.5
SIDE_FILE = "quantization_config.json"
_MATTERS = (
    "quant_method",
    "packing_format",
    "bits",
    "group_size",
    "sym",
    "data_type",
    "act_bits",
    "act_data_type",
    "extra_config",
)

_CODES = frozenset({"qweight", "weight_packed", "weight_scale", "weight_scale_inv"})

Block = Mapping[str, Any]


def _is_ours(block: Block, source: str) -> bool:
    return Fields(block, source, plugin="autoround").text("quant_method") in METHODS


def _check_agree(main: Block, side: Block) -> None:
    """Values that both files state must be equal.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` naming both files, the key and both values.
    """
    for key in _MATTERS:
        ours, theirs = thaw(main.get(key)), thaw(side.get(key))
        if ours is None or theirs is None or (ours == theirs and type(ours) is type(theirs)):
            continue
        raise ConfigError(
            f"config.json: {key} is {printable(repr(ours), 60)}, but {SIDE_FILE} says "
            f"{printable(repr(theirs), 60)}; expected the same value in both. "
            "Remove the file that does not belong to these weights.",
            code="Q-CFG-CONFLICT",
            path="config.json",
            tensor=key,
            expected=ours,
            actual=theirs,
            plugin="autoround",
        )


def _with_header(config: AutoRoundConfig, checkpoint: Checkpoint) -> AutoRoundConfig:
    """Add what the header says about the whole checkpoint; done once, used for every layer."""
    packed = (m for m, leaves in checkpoint.modules.items() if _CODES & leaves.keys())
    return replace(config, quantized=frozenset(map(numberless, packed)))


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The plugin's claim on ``checkpoint``, its config parsed, or None.

    Raises:
        ConfigError: a config that names AutoRound but is malformed or contradicts the side file.
    """
    block, source = quantization_config(checkpoint), "config.json"
    side = checkpoint.side_file(SIDE_FILE)
    if block is None and side is not None:
        block, source, side = side, SIDE_FILE, None
    if block is None or not _is_ours(block, source):
        return None
    if side is not None:
        _check_agree(block, side)
    config = parse_config(block, source)
    return FormatMatch(
        plugin="autoround",
        level="declared",
        evidence=f"{source}: {config.packing_format}, {config.default.bits} bits",
        config=_with_header(config, checkpoint),
    )
