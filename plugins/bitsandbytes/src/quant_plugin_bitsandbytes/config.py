"""The bitsandbytes config: a JSON object to a frozen dataclass, every value checked.

    {"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
     "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
     "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0}

What is stored states type, block size and nesting again; the two must agree. Compute dtype, storage
dtype, offloading and the outlier threshold do not change what the tensors mean.

Source: transformers 5.23.0 ``utils/quantization_config.py`` (BitsAndBytesConfig).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern

__all__ = ["TYPES", "BnbConfig", "parse_config"]

TYPES = ("nf4", "fp4")
_KNOWN = frozenset(
    """
    quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit
    bnb_4bit_compute_dtype bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant
    llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    llm_int8_threshold
    """.split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbConfig:
    """A checked config.

    Attributes:
        bits: 4, 8, or 0 where the config does not say.
        quant_type: "nf4", "fp4", or "" where it does not say or the weights have 8 bits.
        double_quant: whether block scales are quantized themselves; None where it does not say.
        skip: ``llm_int8_skip_modules``.
        siblings: names without numbers of all quantized modules.
        stored: the block as JSON text, for writing it back; "" if there is none.
    """

    bits: int = 0
    quant_type: str = ""
    double_quant: bool | None = None
    skip: tuple[NamePattern, ...] = ()
    file: str = ""
    warnings: tuple[str, ...] = ()
    siblings: frozenset[str] = frozenset()
    stored: str = ""

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """Patterns of the config; core reports those that match no module."""
        return self.skip


def _bits(fields: Fields) -> int:
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    four = fields.flag("_load_in_4bit") if four is None else four
    eight = fields.flag("_load_in_8bit") if eight is None else eight
    if four and eight:
        fix = "Keep the one that the weights were stored with."
        raise fields.fail("load_in_8bit", "only one of 4 and 8 bits", fix, "Q-CFG-CONFLICT")
    return 4 if four else 8 if eight else 0


def parse_config(raw: Mapping[str, Any], source: str) -> BnbConfig:
    """A checked config.

    Raises:
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE``, ``Q-CFG-CONFLICT``.
    """
    fields = Fields(raw, source, plugin="bitsandbytes")
    bits = _bits(fields)
    quant_type = fields.text("bnb_4bit_quant_type") or ""
    if quant_type and quant_type not in TYPES:
        fix = "Correct it to the type the weights were stored with."
        raise fields.fail("bnb_4bit_quant_type", f"one of {TYPES}", fix)
    threshold = raw.get("llm_int8_threshold")
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and math.isfinite(threshold) and threshold >= 0):
        raise fields.fail("llm_int8_threshold", "a number of 0 or more", "The tools write 6.0.")
    double_quant = fields.flag("bnb_4bit_use_double_quant")
    unknown = sorted(k for k in raw if k not in _KNOWN)
    warnings = (f"{source}: unknown keys ignored: {summarize(unknown)}",) if unknown else ()
    return BnbConfig(
        bits=bits,
        quant_type=quant_type if bits == 4 else "",
        double_quant=double_quant if bits == 4 else None,
        skip=tuple(
            NamePattern(kind="substring", text=text, purpose="llm_int8_skip_modules")
            for text in fields.names("llm_int8_skip_modules")
            if text
        ),
        file=source,
        warnings=warnings,
        stored=json.dumps(thaw(raw)),
    )
