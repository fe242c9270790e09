"""Is this a GPTQ checkpoint, and where is its config?

In order: ``quantization_config`` of config.json; a side file (old AutoGPTQ wrote only
quantize_config.json, without ``quant_method``); the tensors alone. Where config.json and a side
file both speak, they must agree on every value that decides how bytes are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES, quantization_config
from quant_core.errors import ConfigError, printable
from quant_core.fields import thaw
from quant_core.spec import FormatMatch, TensorInfo
from quant_plugin_gptq.config import GptqConfig, parse_config

__all__ = ["SIDE_FILES", "detect", "looks_like_gptq"]

SIDE_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_MATTERS = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "pack_dtype",
    "provider",
    "lm_head",
    "dynamic",
)
_ALIASES = {"method": "quant_method", "format": "checkpoint_format"}
_OTHER_FORMAT_KEYS = frozenset({"w_bit", "q_group_size", "zero_point", "version"})


def _method(block: Mapping[str, Any], source: str) -> str | None:
    for key in ("quant_method", "method"):
        if key not in block:
            continue
        value = block[key]
        if not isinstance(value, str) or not 0 < len(value) <= 64:
            raise ConfigError(
                f"{source}: {key} is {printable(repr(value), 60)}, expected a short string naming "
                "the format. Restore the value the quantization tool wrote.",
                code="Q-CFG-TYPE",
                path=source,
                tensor=key,
                expected="string",
                actual=type(value).__name__,
                plugin="gptq",
            )
        return value.strip().lower()
    return None


def _is_old_style(block: Mapping[str, Any]) -> bool:
    """AutoGPTQ's quantize_config.json before it had ``quant_method``."""
    return {"bits", "group_size", "desc_act"} <= block.keys() and not (
        _OTHER_FORMAT_KEYS & block.keys()
    )


def _values(block: Mapping[str, Any]) -> dict[str, Any]:
    """The values that matter, under their one name, comparable."""
    out = {}
    for key, value in block.items():
        name = _ALIASES.get(key, key)
        if name in _MATTERS and value is not None:
            plain = thaw(value)
            out[name] = plain.strip().lower() if isinstance(plain, str) else plain
    return out


def _check_agree(main: str, block: Mapping[str, Any], side: str, other: Mapping[str, Any]) -> None:
    ours, theirs = _values(block), _values(other)
    for key in _MATTERS:
        if key not in ours or key not in theirs or ours[key] == theirs[key]:
            continue
        raise ConfigError(
            f"{main}: {key} is {printable(repr(ours[key]), 60)}, but {side} says "
            f"{printable(repr(theirs[key]), 60)}; expected the same value in both. "
            "Remove the file that does not belong to these weights.",
            code="Q-CFG-CONFLICT",
            path=main,
            tensor=key,
            expected=ours[key],
            actual=theirs[key],
            plugin="gptq",
        )


def _side_files(checkpoint: Checkpoint) -> list[tuple[str, Mapping[str, Any]]]:
    """Side files that speak of quantization: a method, or at least a bit width."""
    found = []
    for name in SIDE_FILES:
        block = checkpoint.side_file(name)
        if block is not None and ({"quant_method", "method", "bits"} & block.keys()):
            found.append((name, block))
    return found


def looks_like_gptq(leaves: Mapping[str, TensorInfo]) -> bool:
    """qweight int32 [K*b/32, N], qzeros int32 [G, N*b/32], scales float [G, N], groups of 16 up.

    The last condition tells a row-major 4-bit layout of the same names apart, whose words can
    have as many columns as its scales.
    """
    if not {"qweight", "qzeros", "scales"} <= leaves.keys():
        return False
    qweight, qzeros, scales = leaves["qweight"], leaves["qzeros"], leaves["scales"]
    if (qweight.dtype, qzeros.dtype) != ("int32", "int32") or scales.dtype not in FLOAT_DTYPES:
        return False
    if not len(qweight.shape) == len(qzeros.shape) == len(scales.shape) == 2:
        return False
    groups, n = scales.shape
    if (qweight.shape[1], qzeros.shape[0]) != (n, groups) or not n:
        return False
    bits = 32 * qzeros.shape[1] // n
    return 2 <= bits <= 8 and 32 * qweight.shape[0] >= 16 * bits * groups


def _declared(checkpoint: Checkpoint, name: str, block: Mapping[str, Any], how: str) -> FormatMatch:
    merged = dict(block)
    for side, other in _side_files(checkpoint):
        if other is block:
            continue
        _check_agree(name, block, side, other)
        known = set(_values(merged))
        merged |= {k: v for k, v in other.items() if _ALIASES.get(k, k) not in known | set(merged)}
    config = parse_config(merged, name)
    return FormatMatch(plugin="gptq", level="declared", evidence=f"{name}: {how}", config=config)


def detect(checkpoint: Checkpoint) -> FormatMatch | None:
    """The plugin's claim on ``checkpoint``, or None.

    Raises:
        ConfigError: a config that names GPTQ but is malformed or contradicts a side file.
    """
    block = quantization_config(checkpoint)
    if block is not None:
        if _method(block, "config.json") != "gptq":
            return None
        return _declared(checkpoint, "config.json", block, "quant_method 'gptq'")
    sides = _side_files(checkpoint)
    for name, block in sides:
        method = _method(block, name)
        if method == "gptq" or (method is None and _is_old_style(block)):
            how = "quant_method 'gptq'" if method else "bits, group_size and desc_act"
            return _declared(checkpoint, name, block, how)
    if sides:
        return None
    for path, leaves in checkpoint.modules.items():
        if looks_like_gptq(leaves):
            return FormatMatch(
                plugin="gptq",
                level="structural",
                evidence=f"{printable(path)}: qweight and scales share their columns",
                config=GptqConfig(
                    bits=None,
                    group_size=None,
                    sym=None,
                    desc_act=None,
                    checkpoint_format=None,
                    source="no config",
                ),
            )
    return None
