"""Is this a ModelOpt checkpoint? Its config says so, in config.json or beside it.

    quantization_config.quant_method    "modelopt", "modelopt_fp4", "modelopt_mixed": one format
    hf_quant_config.json                where config.json has no quantization block

What the config cannot say is taken from the header here, once: which modules are stored quantized,
which have a ``pre_quant_scale``, and which attention modules carry scales of a quantized cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES, quantization_config
from quant_core.ledger import missing_error
from quant_core.presence import siblings_of
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_nvfp4.cache import schemes
from quant_plugin_nvfp4.config import ModelOptConfig, check_agreement, parse_config

__all__ = ["KV_LEAVES", "SIDE_FILE", "detect", "is_quantized"]

SIDE_FILE = "hf_quant_config.json"
METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
KV_LEAVES = frozenset({"k_scale", "v_scale", "k_bias", "v_bias"})
"""Last name components of what a quantized cache needs."""

_SCALES = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
Leaves = Mapping[str, TensorInfo]


def is_quantized(path: str, leaves: Leaves) -> bool:
    """Any tensor of a quantized module counts, so that a lost one is reported as missing."""
    weight = leaves.get("weight")
    odd = weight is not None and len(weight.shape) > 1 and weight.dtype not in FLOAT_DTYPES
    return odd or bool(_SCALES & leaves.keys())


def _cache_warnings(config: ModelOptConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the file says of a quantized cache and cannot be applied.

    Raises:
        CheckpointError: ``Q-TENSOR-MISSING`` if some layers have the scales and others lack them.
    """
    modules = checkpoint.modules
    having = {
        (numberless(path), leaf)
        for path, leaves in modules.items()
        for leaf in KV_LEAVES & leaves.keys()
    }
    lost = [
        f"{path}.{leaf}"
        for path, leaves in modules.items()
        for name, leaf in having
        if name == numberless(path) and leaf not in leaves
    ]
    if lost:
        raise missing_error(checkpoint, sorted(lost), "the quantized cache of the other layers")
    owners = {
        path.rpartition(".")[0] for path, leaves in modules.items() if KV_LEAVES & leaves.keys()
    }
    if schemes(config, checkpoint):
        return ()
    if owners:
        return (f"KV-cache scales present, not applied ({len(owners)} attention modules)",)
    if config.kv:
        return (
            f"{config.file}: the KV cache is {config.kv}, but no scales are stored; the cache "
            "stays unquantized",
        )
    return ()


def _config(checkpoint: Checkpoint) -> tuple[ModelOptConfig, str] | None:
    """The config and what shows that it is one; None if the checkpoint names another format."""
    block = quantization_config(checkpoint)
    method = None if block is None else block.get("quant_method", block.get("method"))
    ours = method is not None and str(method).lower() in METHODS
    if block is not None and not ours:
        return None
    side = checkpoint.side_file(SIDE_FILE)
    if block is None:
        if side is None:
            return None
        return parse_config(side, SIDE_FILE), SIDE_FILE
    config = parse_config(block, "config.json")
    if side is not None:
        config = check_agreement(config, parse_config(side, SIDE_FILE))
    return config, f"quant_method {method!r}"


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the config names this format but is malformed, or two files disagree.
        CheckpointError: ``Q-TENSOR-MISSING`` for a scale of the cache that some layers lack.
    """
    found = _config(checkpoint)
    if found is None:
        return None
    config, evidence = found
    smoothed = frozenset(
        numberless(path)
        for path, leaves in checkpoint.modules.items()
        if "pre_quant_scale" in leaves
    )
    config = replace(
        config,
        warnings=config.warnings + _cache_warnings(config, checkpoint),
        quantized=siblings_of(checkpoint, is_quantized),
        smoothed=smoothed,
    )
    return FormatMatch(plugin="nvfp4", level="declared", evidence=evidence, config=config)
