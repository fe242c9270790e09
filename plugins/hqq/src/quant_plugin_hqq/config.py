"""The HQQ config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "hqq", "skip_modules": ["lm_head"],
     "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1},
                      "scale_quant_params": null, "zero_quant_params": null}}

A dynamic config has one such object for each kind of layer ("self_attn.q_proj": {...}). The same
values are stored again beside every weight; the two must agree.

Source: transformers 4.57.6 ``utils/quantization_config.py`` (HqqConfig), ``quantizer_hqq.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern

__all__ = ["HqqConfig", "Settings", "parse_config"]

_KNOWN = frozenset({"quant_method", "quant_config", "skip_modules"})
_PARTS = ("weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the config says of one kind of layer; None where it does not say."""

    bits: int | None = None
    group_size: int | None = None
    axis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HqqConfig:
    """A checked config.

    Attributes:
        default: settings of every layer that no tag names.
        tags: end of a module's name -> its settings (dynamic configs).
        skip: ``skip_modules``.
        siblings: names without numbers of all quantized modules.
        stored: the block as JSON text, for writing it back; "" if there is none.
    """

    default: Settings = Settings()
    tags: tuple[tuple[NamePattern, Settings], ...] = ()
    skip: tuple[NamePattern, ...] = ()
    file: str = ""
    warnings: tuple[str, ...] = ()
    siblings: frozenset[str] = frozenset()
    stored: str = ""

    def settings(self, module: str) -> Settings:
        """What the config says of ``module``."""
        return next((s for pattern, s in self.tags if pattern.matches(module)), self.default)

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """Patterns of the config; core reports those that match no module."""
        return (*self.skip, *(pattern for pattern, _ in self.tags))


def _settings(fields: Fields) -> Settings:
    for key in ("scale_quant_params", "zero_quant_params"):
        if fields.raw.get(key) is not None:
            fix = "Quantize again without quant_scale and quant_zero."
            raise fields.fail(key, "null (scales and zeros stored as floats)", fix)
    weights = fields.raw.get("weight_quant_params")
    if weights is None:
        return Settings()
    if not isinstance(weights, Mapping):
        fix = "Restore the value the tool wrote."
        raise fields.fail("weight_quant_params", "an object", fix, "Q-CFG-TYPE")
    inner = Fields(weights, fields.source, f"{fields.prefix}weight_quant_params.", "hqq")
    return Settings(
        bits=inner.integer("nbits", 1, 8),
        group_size=inner.integer("group_size", 1, 1 << 20),
        axis=inner.integer("axis", 0, 1),
    )


def parse_config(raw: Mapping[str, Any], source: str) -> HqqConfig:
    """A checked config.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``.
    """
    fields = Fields(raw, source, plugin="hqq")
    block = raw.get("quant_config")
    if block is not None and not isinstance(block, Mapping):
        fix = "Restore the value the tool wrote."
        raise fields.fail("quant_config", "an object", fix, "Q-CFG-TYPE")
    block = block or {}
    prefix = "quant_config."
    default, tags = Settings(), []
    if any(part in block for part in _PARTS):
        default = _settings(Fields(block, source, prefix, "hqq"))
    else:
        for tag, entry in fields.objects("quant_config").items():
            pattern = NamePattern(kind="suffix", text=tag, purpose="quant_config")
            tags.append((pattern, _settings(entry)))
    unknown = sorted(k for k in raw if k not in _KNOWN)
    warnings = (f"{source}: unknown keys ignored: {summarize(unknown)}",) if unknown else ()
    return HqqConfig(
        default=default,
        tags=tuple(tags),
        skip=tuple(
            NamePattern(kind="substring", text=text, purpose="skip_modules")
            for text in fields.names("skip_modules")
            if text
        ),
        file=source,
        warnings=warnings,
        stored=json.dumps(thaw(raw)),
    )
