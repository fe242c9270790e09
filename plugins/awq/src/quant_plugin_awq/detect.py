"""Is a checkpoint AWQ? Its own word first, the shapes of its tensors last.

    config.json quantization_config (quant_method or method "awq")     declared
    quantize_config.json, quantization_config.json (the same keys)     declared
    quant_config.json with w_bit / q_group_size (old AutoAWQ)          declared
    nothing declared anywhere, but packed tensors of AWQ shapes        structural

All files that state something must agree. Only headers and JSON are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import quantization_config
from quant_core.errors import ConfigError, printable
from quant_core.resolve import numberless
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_awq.config import AwqConfig, parse_config, stated
from quant_plugin_awq.geometry import padded_groups

__all__ = ["SIDE_FILES", "detect"]

SIDE_FILES = ("quant_config.json", "quantize_config.json", "quantization_config.json")
_PACKED = frozenset({"qweight", "qzeros", "scaled_zeros"})

Block = Mapping[str, Any]


def _method(block: Block) -> str | None:
    value = block.get("quant_method", block.get("method"))
    return value.lower() if isinstance(value, str) else None


def _names_awq(block: Block) -> bool:
    method = _method(block)
    return method == "awq" or (method is None and ("w_bit" in block or "q_group_size" in block))


def _blocks(checkpoint: Checkpoint) -> Iterator[tuple[str, Block]]:
    main = quantization_config(checkpoint)
    if main is not None:
        yield "config.json", main
    for name in SIDE_FILES:
        block = checkpoint.side_file(name)
        if block is not None:
            yield name, block


def check_agreement(block: Block, file: str, other: Block, other_file: str) -> None:
    """Two files that describe one checkpoint must state the same where both state something.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT`` naming both files, the key and both values.
    """
    mine, theirs = stated(block, file), stated(other, other_file)
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key] or type(mine[key]) is not type(theirs[key]):
            raise ConfigError(
                f"{file} and {other_file}: {key} is {printable(repr(mine[key]), 60)} in the first "
                f"and {printable(repr(theirs[key]), 60)} in the second, expected one value. "
                "Remove or correct the file that does not belong to these weights.",
                code="Q-CFG-CONFLICT",
                path=file,
                tensor=key,
                expected=mine[key],
                actual=theirs[key],
                plugin="awq",
            )


def _declared(checkpoint: Checkpoint) -> AwqConfig | None:
    blocks = list(_blocks(checkpoint))
    if not blocks:
        return None
    first_file, first = blocks[0]
    if first_file == "config.json":  # the model's own config decides who the owner is
        if not _names_awq(first):
            return None
    else:
        ours = [(f, b) for f, b in blocks if _names_awq(b)]
        if not ours:
            return None
        first_file, first = ours[0]
    config = parse_config(first, first_file)
    for file, block in blocks:
        if file != first_file:
            check_agreement(first, first_file, block, file)
    return config


def _layout_of(leaves: Mapping[str, TensorInfo]) -> tuple[str, int] | None:
    """(layout, group_size) that the shapes of one module allow; None if they are not AWQ's."""
    zeros = leaves.get("qzeros", leaves.get("scaled_zeros"))
    if "qweight" not in leaves or "scales" not in leaves or zeros is None or "g_idx" in leaves:
        return None
    weight, scales = leaves["qweight"], leaves["scales"]
    if any(len(t.shape) != 2 or 0 in t.shape for t in (weight, zeros, scales)):
        return None
    (w0, w1), (z0, z1), (s0, s1) = weight.shape, zeros.shape, scales.shape
    if weight.dtype == "int16" and zeros.shape == scales.shape and s1 == 4 * w0:
        k, layout = w1, "llm-awq" if "scaled_zeros" in leaves else "gemv_fast"
        groups = s0
    elif weight.dtype != "int32" or zeros.dtype != "int32" or w1 == s1:  # the last is GPTQ
        return None
    elif w1 == z1 and z0 == s0 and s1 == 8 * w1 and w0 % s0 == 0:
        return "gemm", w0 // s0
    elif w0 == z0 == s0 and s1 == 8 * z1:
        k, layout, groups = 8 * w1, "gemv", s1
    else:
        return None
    fits = [g for g in (128, 64, 32) if k % g == 0 and padded_groups(k, g) == groups]
    return (layout, fits[0]) if len(fits) == 1 else None


def _structural(checkpoint: Checkpoint) -> tuple[AwqConfig, str] | None:
    if any(True for _ in _blocks(checkpoint)):
        return None
    for module, leaves in checkpoint.modules.items():
        found = _layout_of(leaves)
        if found is not None:
            layout, group_size = found
            config = AwqConfig(layout=layout, group_size=group_size, file="tensor shapes")
            return config, f"{printable(module)}.qweight has the shape of AWQ {layout}"
    return None


def _with_header(config: AwqConfig, checkpoint: Checkpoint) -> AwqConfig:
    """Add what the header says about the whole checkpoint; done once, used for every layer."""
    quantized, scaled = set(), ""
    for module, leaves in checkpoint.modules.items():
        if not _PACKED.isdisjoint(leaves):
            quantized.add(numberless(module))
        elif not scaled and "scales" in leaves and len(leaves["scales"].shape) == 1:
            scaled = leaves["scales"].name
    return replace(config, quantized=frozenset(quantized), scaled_activation=scaled)


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The claim on ``checkpoint``, its config parsed, or None.

    Raises:
        ConfigError: the checkpoint names AWQ but its config is malformed or contradictory.
    """
    config = _declared(checkpoint)
    if config is not None:
        evidence = f"{config.file} names AWQ {config.layout}, {config.bits} bits"
        level = "declared"
    else:
        found = _structural(checkpoint)
        if found is None:
            return None
        (config, evidence), level = found, "structural"
    return FormatMatch(
        plugin="awq",
        level=level,  # type: ignore[arg-type]
        evidence=evidence,
        config=_with_header(config, checkpoint),
    )
