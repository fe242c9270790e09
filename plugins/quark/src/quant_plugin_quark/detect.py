"""Is this a Quark checkpoint? Only its config says so; tensors alone never do.

Exports in a custom mode carry quant_method "fp8" or "awq" and are those formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES, quantization_config
from quant_core.errors import ConfigError, summarize
from quant_core.presence import siblings_of
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_quark.cache import cache_warnings
from quant_plugin_quark.config import QuarkConfig, parse_config
from quant_plugin_quark.names import first_of
from quant_plugin_quark.transforms import ROTATIONS, SHARED

__all__ = ["detect", "is_quantized"]

_QUANTIZED = ROTATIONS | {
    f"{stem}{suffix}"
    for stem in ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    for suffix in ("", "_2")
}


def is_quantized(path: str, leaves: Mapping[str, TensorInfo]) -> bool:
    """Any tensor of a quantized module counts, so that a lost one is reported as missing."""
    weight = leaves.get("weight")
    odd = weight is not None and len(weight.shape) > 1 and weight.dtype not in FLOAT_DTYPES
    return odd or bool(_QUANTIZED & leaves.keys())


def _float_experts(config: QuarkConfig, checkpoint: Checkpoint) -> Iterator[str]:
    """Stacks of float experts that the config does not exclude: what is stored counts."""
    plain = [
        info
        for info in checkpoint.tensors.values()
        if info.dtype in FLOAT_DTYPES and len(info.shape) == 3 and ".experts." in info.name
        if first_of(config.exclude, info.name) is None and config.args_of(info.name).weight
    ]
    if plain:
        yield (
            f"{config.file}: {len(plain)} stacks of experts are stored as {plain[0].dtype}, though "
            "no entry of exclude names them; loaded unquantized: "
            f"{summarize((i.name for i in plain), 2)}"
        )


def _check_rotations(config: QuarkConfig, checkpoint: Checkpoint) -> None:
    """Rotations that run with the model are stored with each layer.

    Raises:
        ConfigError: ``Q-CFG-TRANSFORM`` if they are shared, or not stored at all.
    """
    names = {name.rpartition(".")[2] for name in checkpoint.tensors}
    shared = sorted(name for name in names if name.startswith(SHARED))
    if not shared and (not config.online or names & ROTATIONS):
        return
    found = f"stores {shared[0]!r}" if shared else "stores no input_rotation, but algo_config asks"
    raise ConfigError(
        f"{checkpoint.path}: {found} for rotations at run time, expected input_rotation with each "
        "rotated layer. Export the model with rotations merged into the weights.",
        code="Q-CFG-TRANSFORM",
        path=checkpoint.path,
        tensor=shared[0] if shared else "algo_config",
        expected="input_rotation",
        actual=shared,
        plugin="quark",
    )


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim of this plugin; reads headers and JSON only.

    Raises:
        ConfigError: the config names this format but is malformed or not supported.
    """
    block = quantization_config(checkpoint)
    method = None if block is None else block.get("quant_method")
    if block is None or str(method).lower() != "quark":
        return None
    config = parse_config(block, "config.json")
    _check_rotations(config, checkpoint)
    extra = (*cache_warnings(config, checkpoint), *_float_experts(config, checkpoint))
    return FormatMatch(
        plugin="quark",
        level="declared",
        evidence=f"quant_method {method!r}",
        config=replace(
            config,
            siblings=siblings_of(checkpoint, is_quantized),
            warnings=(*config.warnings, *extra),
        ),
    )
