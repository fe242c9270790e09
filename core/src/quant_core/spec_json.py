"""Spec types as JSON text and back: keys for torch ops, caches and ``--json`` output."""

from __future__ import annotations

import dataclasses
import functools
import json
from fractions import Fraction
from typing import Any

from quant_core import spec as _spec
from quant_core.errors import LayoutError

__all__ = ["from_text", "op_from_text", "to_plain", "to_text"]

_TYPES = {
    name: obj
    for name in _spec.__all__
    if dataclasses.is_dataclass(obj := getattr(_spec, name)) and isinstance(obj, type)
}


def to_plain(value: Any) -> Any:
    """``value`` as JSON types; dataclasses of quant_core.spec carry their type under ``"@"``."""
    if dataclasses.is_dataclass(value) and type(value).__name__ in _TYPES:
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"@": type(value).__name__, **fields}
    if isinstance(value, Fraction):
        return {"@": "Fraction", "value": str(value)}
    if isinstance(value, frozenset | set):
        return {"@": "frozenset", "items": sorted(to_plain(v) for v in value)}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_plain(v) for v in value)
    if isinstance(value, dict):
        kind = value.get("@")
        if kind is None:
            return {k: _from_plain(v) for k, v in value.items()}
        if kind == "Fraction":
            return Fraction(value["value"])
        if kind == "frozenset":
            return frozenset(_from_plain(v) for v in value["items"])
        if kind not in _TYPES:
            raise LayoutError(
                f"spec text names type {kind!r}, expected one of {sorted(_TYPES)}. "
                "It was written by another version.",
                code="Q-LAYOUT-ELEMENT",
                actual=kind,
            )
        return _TYPES[kind](**{k: _from_plain(v) for k, v in value.items() if k != "@"})
    return value


def to_text(value: Any) -> str:
    """Compact, stable JSON text of a spec value."""
    return json.dumps(to_plain(value), separators=(",", ":"), sort_keys=True)


def from_text(text: str) -> Any:
    """Inverse of ``to_text``; every list comes back as a tuple."""
    return _from_plain(json.loads(text))


@functools.lru_cache(maxsize=4096)
def op_from_text(text: str) -> _spec.OpSpec:
    """The ``OpSpec`` of a text, cached: called by torch ops on every call."""
    op: _spec.OpSpec = from_text(text)
    return op
