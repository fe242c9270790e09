"""Metadata as bytes: the key/value pairs of a header, encoded, or copied from another file.

string key, u32 type, value         string = u64 length + UTF-8; array = u32 type, u64 count
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_core.checkpoint.files import OpenFile

__all__ = ["Pairs", "copied_pairs", "encode", "string"]

Pairs = list[tuple[str, bytes]]
"""(key, the whole pair as stored)."""

_FIXED = {
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
}
_STRING, _ARRAY = 8, 9


def string(text: str) -> bytes:
    """A length-prefixed UTF-8 string."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def encode(key: str, kind: str, value: Any) -> tuple[str, bytes]:
    """One pair. ``kind``: u32, i32, f32, bool, string, or an array: "[string]", "[i32]"."""
    head = string(key)
    if kind.startswith("["):
        item = kind[1:-1]
        return key, head + struct.pack("<I", _ARRAY) + _array(item, value)
    if kind == "string":
        return key, head + struct.pack("<I", _STRING) + string(value)
    number, form = _FIXED[kind]
    return key, head + struct.pack("<I", number) + struct.pack(form, value)


def _array(item: str, values: Sequence[Any]) -> bytes:
    if item == "string":
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(string, values))
    number, form = _FIXED[item]
    return struct.pack("<IQ", number, len(values)) + b"".join(struct.pack(form, v) for v in values)


def copied_pairs(path: Path, spans: Mapping[str, tuple[int, int]]) -> Pairs:
    """Pairs of a file whose header was read, byte for byte, but for those of a split set.

    Args:
        spans: of each key the first byte of its pair and the one behind it.
    """
    file = OpenFile(path)
    try:
        kept = [(k, span) for k, span in spans.items() if not k.startswith("split.")]
        return [(key, file.read(stop - start, start)) for key, (start, stop) in kept]
    finally:
        file.close()
