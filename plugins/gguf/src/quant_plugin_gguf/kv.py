"""Metadata as bytes: the key/value pairs of a header, encoded, or copied from another file.

string key, u32 type, value         string = u64 length + UTF-8; array = u32 type, u64 count
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant_core.checkpoint.files import OpenFile
from quant_plugin_gguf.cursor import Cursor

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
_MAX_KEY = (1 << 16) - 1


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


def copied_pairs(path: Path) -> Pairs:
    """All pairs of a file that was read before, byte for byte, but for those of a split set."""
    file = OpenFile(path)
    try:
        cursor = Cursor(file)
        cursor.take(8)  # magic, version
        cursor.u64()  # tensors
        out: Pairs = []
        for _ in range(cursor.u64()):
            start = cursor.at
            key = cursor.string(_MAX_KEY)
            cursor.value(cursor.u32())
            if not key.startswith("split."):
                out.append((key, file.read(cursor.at - start, start)))
        return out
    finally:
        file.close()
