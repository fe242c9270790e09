"""The text that describes a 4-bit tensor, stored beside it as bytes.

    weight.quant_state.bitsandbytes__nf4    uint8 [length]: UTF-8 JSON
    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [256, 512],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1298}

The nested keys are there with double quantization only. ``nested_offset`` is a value of its own
for every matrix; all else is equal for the experts of a stack.

Source: bitsandbytes 0.50.2 ``functional.py`` (QuantState.as_dict, from_dict), ``utils.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.errors import CheckpointError, ConfigError, LayoutError, printable
from quant_core.fields import Fields
from quant_plugin_bitsandbytes.config import TYPES

__all__ = ["PREFIX", "QuantState", "contradiction", "parse_state"]

PREFIX = "weight.quant_state.bitsandbytes__"
_MAX_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantState:
    """What the text says.

    Attributes:
        shape: (N, K) of the weight.
        nested_block: block scales that share a second scale; 0 without double quantization.
        offset: the mean that was taken off the block scales.
        keys: the JSON object in its own order, to write it back.
    """

    quant_type: str
    block: int
    shape: tuple[int, int]
    nested_block: int = 0
    offset: float = 0.0
    keys: tuple[tuple[str, Any], ...] = ()

    def same_layout(self, other: QuantState) -> bool:
        """Equal but for the offset."""
        mine = (self.quant_type, self.block, self.shape, self.nested_block)
        return mine == (other.quant_type, other.block, other.shape, other.nested_block)

    def text(self, offset: float) -> bytes:
        """The stored bytes, with another offset."""
        keys = {k: list(v) if isinstance(v, tuple) else v for k, v in self.keys}
        if self.nested_block:
            keys["nested_offset"] = offset
        return json.dumps(keys).encode("utf-8")


def _shape(fields: Fields, where: str) -> tuple[int, int]:
    shape = fields.raw.get("shape")
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or any(type(s) is not int or not 0 < s < 1 << 40 for s in sizes):
        raise LayoutError(
            f"{where}: shape is {printable(repr(shape), 60)}, expected two sizes. "
            "Only matrices are read; export the checkpoint again.",
            code="Q-LAYOUT-SHAPE",
            tensor=where,
            expected="[out_features, in_features]",
            actual=shape,
            plugin="bitsandbytes",
        )
    return (sizes[0], sizes[1])


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_state(raw: bytes, where: str) -> QuantState:
    """The checked text.

    Args:
        raw: bytes of the tensor.
        where: its stored name.

    Raises:
        CheckpointError: ``Q-CKPT-HEADER`` if it is no JSON object.
        ConfigError: ``Q-CFG-VALUE``, ``Q-CFG-TYPE`` for a value out of range.
        LayoutError: ``Q-LAYOUT-SHAPE`` if the weight is no matrix.
    """
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_constant)
        if not isinstance(data, Mapping):
            raise ValueError(f"a JSON {type(data).__name__}")
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"{where}: is no description of a 4-bit weight ({printable(err)}), expected a JSON "
            "object. The checkpoint is damaged; download or export it again.",
            code="Q-CKPT-HEADER",
            tensor=where,
            expected="JSON object",
            actual=printable(raw[:40]),
            plugin="bitsandbytes",
        ) from err
    fields = Fields(data, where, plugin="bitsandbytes")
    fix = "Export the checkpoint again."
    quant_type = fields.text("quant_type")
    if quant_type not in TYPES:
        raise fields.fail("quant_type", f"one of {TYPES}", fix)
    block = fields.integer("blocksize", 1, _MAX_BLOCK)
    if block is None:
        raise fields.fail("blocksize", f"an integer from 1 to {_MAX_BLOCK}", fix)
    nested = fields.integer("nested_blocksize", 1, _MAX_BLOCK) or 0
    offset = data.get("nested_offset", 0.0)
    number = isinstance(offset, float | int) and not isinstance(offset, bool)
    if not number or not math.isfinite(offset) or (nested and "nested_offset" not in data):
        raise fields.fail("nested_offset", "a finite number", fix)
    if nested and data.get("nested_dtype", "float32") != "float32":
        raise fields.fail("nested_dtype", "'float32'", fix)
    keys = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in data.items())
    return QuantState(
        quant_type=quant_type,
        block=block,
        shape=_shape(fields, where),
        nested_block=nested,
        offset=float(offset),
        keys=keys,
    )


def contradiction(where: str, key: str, stated: object, found: object, file: str) -> ConfigError:
    """The config says one thing, the tensor's own description another."""
    return ConfigError(
        f"{file}: {key} is {stated!r}, but {printable(where)!r} is stored with {found!r}; expected "
        "both to agree. Restore the config that belongs to these weights.",
        code="Q-CFG-CONFLICT",
        path=file or None,
        tensor=where,
        expected=stated,
        actual=found,
        plugin="bitsandbytes",
    )
