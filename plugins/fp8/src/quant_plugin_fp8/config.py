"""The FP8 config: a dict from JSON to a checked, frozen ``Fp8Config``.

    key                      default    meaning
    quant_method             -          "fp8" or "fbgemm_fp8", exactly
    activation_scheme        "dynamic"  "static": one stored input scale a layer
    weight_block_size        null       [rows, columns] of one scale; null: one scale per tensor
    scale_fmt                "float"    "ue8m0": scales are powers of two, activations' as well
    fmt                      "e4m3"     the element; no other is read
    activation_scale_ub      1200.0     fbgemm_fp8: largest max|x| of a token's scale
    modules_to_not_convert,  null       parts of module names; "re:" regular expressions;
      ignored_layers                    wildcards with "*"
    expert_dtype             "fp8"      no other is read
    kv_cache_scheme          null       scales of the cache are not applied; one warning

Sources: transformers 5.23 ``utils/quantization_config.py`` (FineGrainedFP8Config,
FbgemmFp8Config); vLLM 0.32 ``quantization/fp8.py``, ``quantization/fbgemm_fp8.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import ConfigError, printable, summarize
from quant_core.fields import Fields
from quant_core.resolve import NamePattern, skip_patterns

__all__ = ["METHODS", "Fp8Config", "parse_config"]

METHODS = ("fp8", "fbgemm_fp8")

_E4M3 = ("e4m3", "e4m3fn", "fp8_e4m3", "float8_e4m3fn")
_SKIP_KEYS = ("modules_to_not_convert", "ignored_layers")
_READ = (
    "quant_method activation_scheme weight_block_size scale_fmt fmt activation_scale_ub "
    "modules_to_not_convert ignored_layers expert_dtype kv_cache_scheme"
)
# Recipes, producers and engine hints: they do not change what the stored tensors mean.
_INERT = (
    "dequantize modules_to_convert is_checkpoint_fp8_serialized weight_dtype input_dtype version "
    "producer export kv_cache_post_rope provider transformers_version"
)
_KNOWN = frozenset(f"{_READ} {_INERT}".split())
_MAX_BLOCK = 1 << 20
_RESTORE = "Restore the value the tool wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    """A parsed config.

    Attributes:
        method: one of ``METHODS``.
        static: one stored input scale per layer; else activations are scaled at run time.
        block: rows and columns of one weight scale, None for one per tensor (per row: fbgemm_fp8).
        ue8m0: scales are powers of two.
        upper_bound: largest max|x| of a token's scale, 0 = none.
        skip: modules that stay unquantized.
        kv_cache: the config states a scheme for the cache.
        file: where the config was read.
        quantized: module paths that store fp8, numbers replaced by ``*``.
    """

    method: str = "fp8"
    static: bool = False
    block: tuple[int, int] | None = None
    ue8m0: bool = False
    upper_bound: float = 0.0
    skip: tuple[NamePattern, ...] = ()
    kv_cache: bool = False
    file: str = ""
    warnings: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """All patterns, for the report of those that match no module."""
        return self.skip


def _conflict(fields: Fields, key: str, expected: str, fix: str) -> ConfigError:
    return fields.fail(key, expected, fix, "Q-CFG-CONFLICT")


def _choice(fields: Fields, key: str, allowed: tuple[str, ...]) -> str | None:
    value = fields.text(key)
    if value is not None and value not in allowed:
        raise fields.fail(key, " or ".join(map(repr, allowed)), _RESTORE)
    return value


def _block(fields: Fields) -> tuple[int, int] | None:
    value = fields.raw.get("weight_block_size")
    if value is None:
        return None
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(type(v) is int and 0 < v <= _MAX_BLOCK for v in value):
        raise fields.fail("weight_block_size", "two positive integers, or null", _RESTORE)
    return (value[0], value[1])


def _upper_bound(fields: Fields) -> float:
    value = fields.raw.get("activation_scale_ub", 1200.0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise fields.fail("activation_scale_ub", "a positive number", _RESTORE)
    return float(value)


def _check_elements(fields: Fields) -> None:
    fmt = fields.text("fmt")
    if fmt is not None and fmt not in _E4M3:
        fix = (
            "This variant of fp8 has another range and zero; export the weights as e4m3."
            if "fnuz" in fmt
            else "Export the weights as e4m3."
        )
        raise fields.fail("fmt", "'e4m3'", fix)
    if (fields.text("expert_dtype") or "fp8") != "fp8":
        fix = "Experts in 4 bits are not read; export them as fp8."
        raise fields.fail("expert_dtype", "'fp8'", fix)


def parse_config(block: Mapping[str, Any], file: str) -> Fp8Config:
    """Check one config block.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-CONFLICT`` or ``Q-CFG-REGEX``, naming
            ``file`` and the key.
    """
    fields = Fields(block, file, plugin="fp8")
    method = fields.text("quant_method") or ""
    _check_elements(fields)
    scheme = _choice(fields, "activation_scheme", ("dynamic", "static"))
    size = _block(fields)
    ue8m0 = _choice(fields, "scale_fmt", ("float", "ue8m0")) == "ue8m0"
    per_row = method == "fbgemm_fp8"
    if scheme == "static" and (size is not None or per_row):
        what = "per-row" if per_row else "block"
        fix = "Only weights with one scale per tensor have static activations."
        raise _conflict(fields, "activation_scheme", f"'dynamic' with {what} scales", fix)
    if per_row and size is not None:
        fix = "fbgemm_fp8 has one scale per row."
        raise _conflict(fields, "weight_block_size", "null for fbgemm_fp8", fix)
    if ue8m0 and size is None:
        fix = "Power-of-two scales belong to blocks."
        raise _conflict(fields, "scale_fmt", "'float' without weight_block_size", fix)
    unknown = sorted(set(block) - _KNOWN)
    warnings = (f"{file}: unknown config keys ignored: {summarize(unknown)}",) if unknown else ()
    if fields.raw.get("modules_to_convert"):
        shown = printable(repr(fields.names("modules_to_convert")), 60)
        warnings += (f"{file}: modules_to_convert {shown} is not needed: stored tensors decide",)
    return Fp8Config(
        method=method,
        static=scheme == "static",
        block=size,
        ue8m0=ue8m0,
        upper_bound=_upper_bound(fields) if per_row else 0.0,
        skip=skip_patterns(fields, _SKIP_KEYS),
        kv_cache=fields.raw.get("kv_cache_scheme") is not None,
        file=file,
        warnings=warnings,
    )
