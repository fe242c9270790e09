"""The mxfp4 config: a JSON object to a frozen dataclass, and back.

    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}

An entry is an expression anchored at the start that ends at a dot boundary, or the end of a name.

Source: transformers 5.23.0 ``utils/quantization_config.py`` (Mxfp4Config), ``quantizers/
quantizers_utils.py`` (should_convert_module).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern, check_count, first_match

__all__ = ["Mxfp4Config", "config_for", "parse_config"]

_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Config:
    """A checked config.

    Attributes:
        skipped: ``modules_to_not_convert``.
        stored: the block as JSON text, for writing it back; "" if there was none.
    """

    skipped: tuple[str, ...] = ()
    file: str = "config.json"
    warnings: tuple[str, ...] = ()
    stored: str = ""

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """The entries; core reports those that match no module."""
        return tuple(
            NamePattern(
                kind="regex",
                text=rf"(?:{entry})(?:(?<=\.)|(?=\.|$))|.*{re.escape(entry)}$",
                purpose="modules_to_not_convert",
                written=entry,
            )
            for entry in self.skipped
        )

    def skip_entry(self, name: str) -> str:
        """The entry that excludes a module; "" if none does."""
        patterns = self.name_patterns()
        hit = first_match(patterns, name)
        return "" if hit is None else self.skipped[patterns.index(hit)]


def parse_config(block: Mapping[str, Any], file: str) -> Mxfp4Config:
    """A checked config.

    Args:
        block: parsed JSON, not changed.
        file: named in errors and warnings.

    Raises:
        ConfigError: ``Q-CFG-TYPE``, ``Q-CFG-VALUE``, ``Q-CFG-REGEX``.
    """
    read = Fields(block, file, "quantization_config.", "mxfp4")
    read.flag("dequantize")  # how transformers once loaded it; says nothing of what is stored
    unknown = [k for k in block if k not in _KNOWN]
    warning = f"{file}: {len(unknown)} unknown key(s) ignored: {summarize(unknown)}"
    config = Mxfp4Config(
        skipped=read.names("modules_to_not_convert"),
        file=file,
        warnings=(warning,) if unknown else (),
        stored=json.dumps(thaw(block)),
    )
    patterns = config.name_patterns()
    check_count(patterns, f"{file}: modules_to_not_convert")
    first_match(patterns, "")  # an invalid expression is reported now
    return config


def config_for(plan: Any) -> Mapping[str, Any]:
    """The block for a ``quant_core.plan.Plan``: the one it was read from, or a new one."""
    match = plan.match
    if match is not None and isinstance(match.config, Mxfp4Config) and match.config.stored:
        stored: dict[str, Any] = json.loads(match.config.stored)
        return stored
    tensors = plan.checkpoint.tensors
    floats = [
        re.escape(name)
        for name, member in plan.members.items()
        if not member.quantized and any(len(tensors[n].shape) == 2 for n in member.stored)
    ]
    return {"quant_method": "mxfp4", "modules_to_not_convert": floats}
