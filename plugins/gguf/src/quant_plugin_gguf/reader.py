"""The header of one GGUF file: metadata and where each tensor lies. Imports no torch.

    "GGUF"  u32 version  u64 tensor_count  u64 kv_count
    kv:      string key, u32 type, value                      string = u64 length + bytes
    tensor:  string name, u32 n_dims, u64 dims[n_dims], u32 type, u64 offset
    padding to general.alignment (default 32)
    data:    tensors in header order, each padded to the alignment

``dims[0]`` is the fastest axis (K), so a torch shape is the dims reversed. The checks are those of
the format's own loader, stricter where a hostile file could cost time or memory.

Source: ggml docs/gguf.md and gguf 0.19.0, gguf_reader.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quant_core.checkpoint.files import FileState, OpenFile
from quant_core.errors import printable, summarize
from quant_plugin_gguf.cursor import DAMAGED, Cursor, type_name
from quant_plugin_gguf.types import BY_ID, KNOWN_UNSUPPORTED, GgmlType, supported_names

__all__ = ["Header", "StoredTensor", "read_header"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SMALLEST_KV = 8 + 1 + 4 + 1  # key length, one character, type, one byte
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME is 64 with the closing NUL
_MAX_DIMS = 4
_MAX_ELEMENTS = 1 << 48
_MAX_ALIGNMENT = 1 << 20
_U32 = 4  # value type
_LENGTH, _COUNT = struct.Struct("<Q"), struct.Struct("<I")
_PLACES = tuple(struct.Struct(f"<{dims}QIQ") for dims in range(_MAX_DIMS + 1))
_LARGEST_TENSOR = 8 + _MAX_NAME_BYTES + 4 + _PLACES[-1].size


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor. ``shape`` is in torch order, ``offset`` counts from the start of the file."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    state: FileState  # of the file as it was read
    trailing: int  # bytes after the last tensor's padding
    spans: Mapping[str, tuple[int, int]]  # of each key: first byte of its pair, and behind it


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        CheckpointError: ``Q-GGUF-MAGIC``, ``-VERSION``, ``-KV``, ``-ALIGN``, ``-SHAPE``,
            ``-TYPE``, ``-BLOCK``, ``-OFFSET``, ``-NAME``; ``Q-CKPT-TRUNCATED``, ``Q-CKPT-LFS``,
            ``Q-CKPT-IO``.
        LimitError: ``Q-LIMIT-COUNT``, ``Q-LIMIT-HEADER``.
    """
    file = OpenFile(path)
    try:
        return _parse(Cursor(file), file.state)
    finally:
        file.close()


def _parse(c: Cursor, state: FileState) -> Header:
    version = _check_magic(c)
    c.what = "tensor count"
    tensor_count, kv_count = c.u64(), c.u64()
    smallest = tensor_count * _SMALLEST_TENSOR + kv_count * _SMALLEST_KV
    if smallest > c.left:
        raise c.fault(
            "Q-LIMIT-COUNT",
            f"{tensor_count} tensors and {kv_count} keys, which need {smallest} bytes or more",
            f"no more than fit into the {c.left} bytes that are left",
            "The file is damaged or cut short; download it again.",
            expected=c.left,
            actual=smallest,
        )
    metadata, spans = _read_metadata(c, kv_count)
    alignment = metadata.get("general.alignment", 32)
    entries = [_plain_tensor(c) or _read_tensor(c) for _ in range(tensor_count)]
    _check_names(c, entries)
    data_start = -(-c.at // alignment) * alignment
    end = _check_offsets(c, entries, data_start, alignment)
    tensors = {
        e.name: StoredTensor(e.name, e.type, e.shape, e.offset + data_start, e.nbytes)
        for e in entries
    }
    return Header(version, metadata, tensors, state, max(0, c.size - end), spans)


def _check_magic(c: Cursor) -> int:
    """The version, after checking that this is a little-endian GGUF file of a known version."""
    c.what = "magic"
    head = c.file.read(min(c.size, 64), 0)
    if head.startswith(b"version https://git-lfs"):
        raise c.fault(
            "Q-CKPT-LFS",
            "a Git LFS pointer",
            "the file itself",
            "Run `git lfs pull` or download the file.",
            actual="Git LFS pointer",
        )
    if c.size >= 4 and not head.startswith(MAGIC):
        first = printable(head[:16].decode("latin-1"))
        raise c.fault(
            "Q-GGUF-MAGIC",
            f"the file begins with {first!r}",
            "'GGUF'",
            "This is no GGUF file; check the download.",
            expected="GGUF",
            actual=first,
        )
    c.take(4)
    c.what = "version"
    version = c.u32()
    if version & 0xFFFF == 0 and version:
        raise c.fault(
            "Q-GGUF-VERSION",
            f"a big-endian file (version {version >> 24})",
            "little-endian",
            "Convert it with the gguf package's gguf-convert-endian.",
            expected="little-endian",
            actual="big-endian",
        )
    if version not in _VERSIONS:
        raise c.fault(
            "Q-GGUF-VERSION",
            f"version {version}",
            "2 or 3",
            "Convert the model again with a current llama.cpp.",
            expected=_VERSIONS,
            actual=version,
        )
    return version


# ------------------------------------------------------------------------------------ metadata


def _read_metadata(c: Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Values by key, and where each pair lies in the file."""
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(count):
        c.what, start = f"key {index}", c.at
        key = c.string(_MAX_KEY_BYTES)
        if not key or key in metadata:
            found = f"the key {printable(key)!r} twice" if key else "an empty key"
            raise c.bad_value(found, "distinct keys that are not empty", actual=key)
        c.what = f"key {printable(key)!r}"
        kind = c.u32()
        metadata[key] = c.value(kind)
        spans[key] = start, c.at
        if key == "general.alignment":
            _check_alignment(c, kind, metadata[key])
    return metadata, spans


def _check_alignment(c: Cursor, kind: int, value: Any) -> None:
    if kind != _U32 or not 8 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise c.fault(
            "Q-GGUF-ALIGN",
            f"alignment {printable(repr(value), 40)} of type {type_name(kind)}",
            f"a power of two from 8 to {_MAX_ALIGNMENT} of type u32",
            DAMAGED,
            actual=value,
        )


# ------------------------------------------------------------------------------------- tensors


def _plain_tensor(c: Cursor) -> StoredTensor | None:
    """The next tensor in a fifth of the time of ``_read_tensor``; None if that is to look at it.

    Which it is where a check fails, or where the header has not been read so far.
    """
    buffer, at = c.buffered(_LARGEST_TENSOR)
    if buffer is None:
        return None
    (length,) = _LENGTH.unpack_from(buffer, at)
    if not 1 <= length <= _MAX_NAME_BYTES:
        return None
    end = at + 8 + length
    (count,) = _COUNT.unpack_from(buffer, end)
    if not 1 <= count <= _MAX_DIMS:
        return None
    *dims, kind, offset = _PLACES[count].unpack_from(buffer, end + 4)
    elements, ggml = prod(dims), BY_ID.get(kind)
    if ggml is None or not 1 <= elements <= _MAX_ELEMENTS or dims[0] % ggml.weights:
        return None
    name = buffer[at + 8 : end].decode("utf-8", errors="backslashreplace")
    c.at = end + 4 + _PLACES[count].size
    return StoredTensor(name, ggml, tuple(dims[::-1]), offset, ggml.row_bytes(elements))


def _read_tensor(c: Cursor) -> StoredTensor:
    c.what = "tensor name"
    length = c.u64()
    if not 1 <= length <= _MAX_NAME_BYTES:
        raise c.fault(
            "Q-GGUF-NAME",
            f"a tensor name of {length} bytes",
            f"1 to {_MAX_NAME_BYTES}",
            DAMAGED,
            expected=_MAX_NAME_BYTES,
            actual=length,
        )
    name = c.take(length).decode("utf-8", errors="backslashreplace")
    c.what = f"tensor {printable(name)!r}"
    dims = _dims(c)
    type_id = c.u32()
    ggml = BY_ID.get(type_id)
    if ggml is None:
        known = KNOWN_UNSUPPORTED.get(type_id)
        raise c.fault(
            "Q-GGUF-TYPE",
            f"type id {type_id}" + (f" ({known})" if known else ""),
            f"one of {supported_names()}",
            "Quantize the model again to one of these types.",
            expected=supported_names(),
            actual=type_id,
        )
    if dims[0] % ggml.weights:
        raise c.fault(
            "Q-GGUF-BLOCK",
            f"rows of {dims[0]} weights",
            f"a multiple of {ggml.weights} for {ggml.name}",
            DAMAGED,
            expected=ggml.weights,
            actual=dims[0],
        )
    offset = c.u64()
    elements = 1
    for d in dims:
        elements *= d
    return StoredTensor(name, ggml, tuple(reversed(dims)), offset, ggml.row_bytes(elements))


def _dims(c: Cursor) -> list[int]:
    count = c.u32()
    if not 1 <= count <= _MAX_DIMS:
        raise c.fault(
            "Q-GGUF-SHAPE", f"{count} dimensions", f"1 to {_MAX_DIMS}", DAMAGED, actual=count
        )
    dims = [c.u64() for _ in range(count)]
    elements = 1
    for d in dims:
        elements *= d
    if not 1 <= elements <= _MAX_ELEMENTS:
        raise c.fault(
            "Q-GGUF-SHAPE",
            f"dimensions {dims}",
            f"sizes of 1 or more with a product of at most {_MAX_ELEMENTS}",
            DAMAGED,
            expected=_MAX_ELEMENTS,
            actual=dims,
        )
    return dims


def _check_names(c: Cursor, entries: list[StoredTensor]) -> None:
    seen: set[str] = set()
    twice = [e.name for e in entries if e.name in seen or seen.add(e.name)]  # type: ignore[func-returns-value]
    if twice:
        c.what = "tensor list"
        raise c.fault(
            "Q-GGUF-NAME", f"names used twice: {summarize(twice)}", "distinct names", DAMAGED
        )


def _check_offsets(c: Cursor, entries: list[StoredTensor], data_start: int, alignment: int) -> int:
    """End of the data. Tensors follow each other in header order, padded to the alignment."""
    expected, previous = 0, "the start of the data"
    for e in entries:
        if e.offset != expected:
            c.what = f"tensor {printable(e.name)!r}"
            raise c.fault(
                "Q-GGUF-OFFSET",
                f"data offset {e.offset}",
                f"{expected}, the next multiple of {alignment} after {previous}",
                DAMAGED,
                expected=expected,
                actual=e.offset,
            )
        end = data_start + e.offset + e.nbytes
        if end > c.size:
            c.what = f"tensor {printable(e.name)!r}"
            last = entries[-1]
            total = data_start + last.offset + last.nbytes
            raise c.fault(
                "Q-CKPT-TRUNCATED",
                f"the file of {c.size} bytes ends inside or before this tensor",
                f"{total} bytes or more ({total - c.size} are missing)",
                "The file was cut short; download it again.",
                expected=total,
                actual=c.size,
            )
        expected = -(-(e.offset + e.nbytes) // alignment) * alignment
        previous = f"tensor {printable(e.name)!r}"
    return data_start + expected
