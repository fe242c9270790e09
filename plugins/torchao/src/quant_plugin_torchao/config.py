"""The TorchAO config: a JSON object to a frozen dataclass.

    {"quant_method": "torchao", "modules_to_not_convert": null,
     "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {...}}}}

The config is the recipe; what each stored tensor is stands in the header of the safetensors file
(``entry``) and decides. Of the recipe only what the header states too is compared.

Source: transformers 5.23.0 ``utils/quantization_config.py`` (TorchAoConfig); torchao 0.18.0
``core/config.py``, ``quantization/quant_api.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import summarize
from quant_core.fields import Fields, thaw
from quant_core.resolve import NamePattern

__all__ = ["CLASSES", "TorchaoConfig", "parse_config"]

CLASSES = {
    "Int8WeightOnlyConfig": "Int8Tensor",
    "Int8DynamicActivationInt8WeightConfig": "Int8Tensor",
    "IntxWeightOnlyConfig": "IntxUnpackedToInt8Tensor",
    "Int8DynamicActivationIntxWeightConfig": "IntxUnpackedToInt8Tensor",
    "Float8WeightOnlyConfig": "Float8Tensor",
    "Float8DynamicActivationFloat8WeightConfig": "Float8Tensor",
}
"""Recipe -> class of the weights it makes."""

_KNOWN = frozenset(
    """
    quant_method quant_type modules_to_not_convert include_input_output_embeddings
    untie_embedding_weights quant_type_kwargs
    """.split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchaoConfig:
    """A checked config.

    Attributes:
        recipe: ``_type`` of the one recipe for all layers; "" if there are several or none.
        weight_dtype: "int4", ... where the recipe states it.
        skip: ``modules_to_not_convert``.
        siblings: names without numbers of all quantized modules.
        stored: the block as JSON text, for writing it back; "" if there is none.
    """

    recipe: str = ""
    weight_dtype: str = ""
    skip: tuple[NamePattern, ...] = ()
    file: str = ""
    warnings: tuple[str, ...] = ()
    siblings: frozenset[str] = frozenset()
    stored: str = ""

    def name_patterns(self) -> tuple[NamePattern, ...]:
        """Patterns of the config; core reports those that match no module."""
        return self.skip


def _recipe(fields: Fields) -> tuple[str, str]:
    value = fields.raw.get("quant_type")
    if isinstance(value, str):  # older files name the recipe only
        return "", ""
    fix = "Restore the value the tool wrote."
    if value is not None and not isinstance(value, Mapping):
        raise fields.fail("quant_type", "an object", fix, "Q-CFG-TYPE")
    one = (value or {}).get("default")
    if one is None:
        return "", ""
    data = one.get("_data") if isinstance(one, Mapping) else None
    kind = one.get("_type") if isinstance(one, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(kind, str):
        raise fields.fail("quant_type", "an object of _type and _data", fix, "Q-CFG-TYPE")
    dtype = data.get("weight_dtype")
    name = dtype.get("_data") if isinstance(dtype, Mapping) else None
    return kind, name if isinstance(name, str) else ""


def parse_config(raw: Mapping[str, Any], source: str) -> TorchaoConfig:
    """A checked config.

    Raises:
        ConfigError: ``Q-CFG-TYPE``.
    """
    fields = Fields(raw, source, plugin="torchao")
    recipe, weight_dtype = _recipe(fields)
    unknown = sorted(k for k in raw if k not in _KNOWN)
    warnings = (f"{source}: unknown keys ignored: {summarize(unknown)}",) if unknown else ()
    return TorchaoConfig(
        recipe=recipe,
        weight_dtype=weight_dtype,
        skip=tuple(
            NamePattern(kind="substring", text=text, purpose="modules_to_not_convert")
            for text in fields.names("modules_to_not_convert")
            if text
        ),
        file=source,
        warnings=warnings,
        stored=json.dumps(thaw(raw)),
    )
