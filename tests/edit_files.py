"""Edit one tensor of a real file: lose it, rename it, or store it again under another name.

Headers are read and written here from the format descriptions, apart from the code under test.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

__all__ = ["MUTATIONS", "edit_folder", "other_name"]

MUTATIONS = ("dropped", "renamed", "doubled")

Entry = tuple[str, bytes, bytes]
"""(name, everything else in its header entry, data)."""


def other_name(name: str) -> str:
    """The name that a renamed or doubled tensor gets: a sibling."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.other_{leaf}"


def _edit(entries: list[Entry], name: str, mutation: str) -> list[Entry]:
    out = []
    for entry in entries:
        if entry[0] != name:
            out.append(entry)
            continue
        if mutation == "doubled":
            out.append(entry)
        if mutation != "dropped":
            out.append((other_name(name), *entry[1:]))
    return out


def _edit_safetensors(raw: bytes, name: str, mutation: str) -> bytes:
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    meta = header.pop("__metadata__", None)
    entries = [
        (n, json.dumps([t["dtype"], t["shape"]]).encode(), data[slice(*t["data_offsets"])])
        for n, t in header.items()
    ]
    out, body, at = {} if meta is None else {"__metadata__": meta}, b"", 0
    for n, rest, values in _edit(entries, name, mutation):
        dtype, shape = json.loads(rest)
        out[n] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(values)]}
        body, at = body + values, at + len(values)
    text = json.dumps(out).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _skip_value(raw: bytes, at: int, kind: int) -> int:
    if kind in _FIXED:
        return at + _FIXED[kind]
    (count,) = struct.unpack_from("<Q", raw, at if kind == 8 else at + 4)
    if kind == 8:
        return at + 8 + count
    (item,) = struct.unpack_from("<I", raw, at)
    at += 12
    for _ in range(count):
        at = _skip_value(raw, at, item)
    return at


def _edit_blocks(raw: bytes, name: str, mutation: str) -> bytes:
    """A GGUF v3 file with the default alignment of 32."""
    magic, version, tensors, values = struct.unpack_from("<IIQQ", raw)
    at = 24
    for _ in range(values):
        (length,) = struct.unpack_from("<Q", raw, at)
        (kind,) = struct.unpack_from("<I", raw, at + 8 + length)
        at = _skip_value(raw, at + 12 + length, kind)
    metadata, infos = raw[24:at], []
    for _ in range(tensors):
        (length,) = struct.unpack_from("<Q", raw, at)
        tensor = raw[at + 8 : at + 8 + length].decode()
        at += 8 + length
        (dims,) = struct.unpack_from("<I", raw, at)
        rest = raw[at : at + 8 + 8 * dims]
        at += 8 + 8 * dims
        (offset,) = struct.unpack_from("<Q", raw, at)
        at += 8
        infos.append((tensor, rest, offset))
    data = raw[-(-at // 32) * 32 :]
    ends = [*sorted(o for _, _, o in infos)[1:], len(data)]
    end_of = dict(zip(sorted(o for _, _, o in infos), ends, strict=True))
    entries = [(t, rest, data[o : end_of[o]]) for t, rest, o in infos]
    header, body = b"", b""
    edited = _edit(entries, name, mutation)
    for tensor, rest, values_ in edited:
        text = tensor.encode()
        header += struct.pack("<Q", len(text)) + text + rest + struct.pack("<Q", len(body))
        body += values_ + b"\0" * (-len(values_) % 32)
    head = struct.pack("<IIQQ", magic, version, len(edited), values) + metadata + header
    return head + b"\0" * (-len(head) % 32) + body


def edit_folder(source: Path, target: Path, name: str, mutation: str) -> None:
    """``source`` as ``target`` with one tensor edited; other files are linked."""
    editors: dict[str, Callable[[bytes, str, str], bytes]] = {
        ".safetensors": _edit_safetensors,
        ".gguf": _edit_blocks,
    }
    target.mkdir()
    for file in source.iterdir():
        if file.name.startswith("expected."):
            continue
        copy = target / file.name
        if file.is_dir():
            shutil.copytree(file, copy)
            continue
        if file.suffix in editors:
            copy.write_bytes(editors[file.suffix](file.read_bytes(), name, mutation))
        else:
            copy.write_bytes(file.read_bytes())
