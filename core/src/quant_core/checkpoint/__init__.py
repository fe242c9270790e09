"""Checkpoints: containers, strict JSON, and the writer. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Checkpoint": "quant_core.checkpoint.base",
    "SafetensorsCheckpoint": "quant_core.checkpoint.safetensors",
    "open_checkpoint": "quant_core.checkpoint.open",
    "parse_json_object": "quant_core.checkpoint.json",
    "read_json_object": "quant_core.checkpoint.json",
    "write_safetensors": "quant_core.checkpoint.write",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
