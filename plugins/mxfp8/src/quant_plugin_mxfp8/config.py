"""The mxfp8 config: a JSON object to a frozen dataclass, and back.

    key                      default    meaning
    quant_method             -          "mxfp8", exactly
    activation_scheme        "dynamic"  no other is read
    weight_block_size        [1, 32]    no other is read
    fmt, scale_fmt           "e4m3", "ue8m0"    no other is read
    modules_to_not_convert,  null       parts of module names; "re:" regular expressions;
      ignored_layers                    wildcards with "*"
    kv_cache_scheme          null       scales of the cache are not applied; one warning

Sources: slime ``tools/convert_hf_to_mxfp8.py`` (writer); SGLang 0.5.23 ``quantization/fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern, skip_patterns

__all__ = ["METHOD", "Mxfp8Config", "config_for", "parse_config"]

METHOD = "mxfp8"
BLOCK = [1, 32]

_E4M3 = ("e4m3", "e4m3fn", "fp8_e4m3", "float8_e4m3fn")
_SKIP_KEYS = ("modules_to_not_convert", "ignored_layers")
_CHOICES = {"activation_scheme": ("dynamic",), "fmt": _E4M3, "scale_fmt": ("ue8m0",)}
_KNOWN = frozenset(
    (*_CHOICES, *_SKIP_KEYS, "quant_method", "weight_block_size", "kv_cache_scheme")
) | {"is_checkpoint_mxfp8_serialized", "moe_quant_algo", "moe_quant_format"}
_FIX = "Export the weights as e4m3 in blocks of 32 with power-of-two scales."


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp8Config:
    """A checked config.

    Attributes:
        skip: modules that stay unquantized.
        kv_cache: the config states a scheme for the cache.
        quantized: module paths that store fp8, numbers replaced by ``*``.
    """

    skip: tuple[NamePattern, ...] = ()
    kv_cache: bool = False
    file: str = ""
    warnings: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """All patterns, for the report of those that match no module."""
        return self.skip


def parse_config(block: Mapping[str, Any], file: str) -> Mxfp8Config:
    """A checked config.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-REGEX``.
    """
    read = Fields(block, file, "quantization_config.", "mxfp8")
    for key, allowed in _CHOICES.items():
        value = read.text(key)
        if value is not None and value not in allowed:
            raise read.fail(key, " or ".join(map(repr, allowed)), _FIX)
    if thaw(block.get("weight_block_size")) not in (None, BLOCK):
        raise read.fail("weight_block_size", f"{BLOCK} or null", _FIX)
    for key in ("moe_quant_algo", "moe_quant_format"):
        if (read.text(key) or METHOD) != METHOD:
            fix = "Experts of another format than the rest are not read; export them alike."
            raise read.fail(key, f"{METHOD!r} or null", fix)
    unknown = [k for k in block if k not in _KNOWN]
    warning = f"{file}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}"
    return Mxfp8Config(
        skip=skip_patterns(read, _SKIP_KEYS),
        kv_cache=block.get("kv_cache_scheme") is not None,
        file=file,
        warnings=(warning,) if unknown else (),
    )


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan`` (a ``quant_core.plan.Plan``)."""
    tensors = plan.checkpoint.tensors
    skip = [
        name
        for name, member in plan.members.items()
        if not member.quantized and member.layer.kind != "embedding"
        if any(n.endswith(".weight") and len(tensors[n].shape) == 2 for n in member.stored)
    ]
    return {
        "quant_method": METHOD,
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": BLOCK,
        "modules_to_not_convert": skip or None,
    }
