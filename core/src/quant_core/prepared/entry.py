"""One entry: a safetensors file of buffers, and in its header what each belongs to.

    tensors    "<module>|<part>|<buffer>"; "<parameter>|float" is one that the checkpoint has as
               floats
    metadata   key      the whole ``Key``; a file under another name does not match
               modules  module -> [reason, [part]]; a part = kernel, operation, members and their
                        rows, buffers; a reason says why there are several
               ops      the operations, each text once
               sum      sha256 over the three texts and the table of tensors

A file that is cut short fails the header's own arithmetic; one whose header was touched fails the
sum. The data carry no sum of their own: like a checkpoint's, they are read once and trusted.

Where the file is mapped (``prepared.pages``) buffers and floats are its pages; data begin at
multiples of 64 bytes for that. Where it is read, floats come from the checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.files import OpenFile
from quant_core.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSORS
from quant_core.checkpoint.sniff import read_header
from quant_core.errors import CheckpointError, LimitError, printable
from quant_core.prepared.folder import BUFFERS
from quant_core.prepared.key import Key
from quant_core.prepared.pages import ALIGN, map_error, map_file
from quant_core.spec import OpSpec, Packing, TensorInfo
from quant_core.spec_json import from_text, op_from_text, to_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Entry",
    "Module",
    "Part",
    "described",
    "entry_error",
    "float_name",
    "read_key",
    "write_entry",
]

log = logging.getLogger("quant_core")


def entry_error(path: Path, found: str, expected: str) -> CheckpointError:
    """``Q-PREPARED-ENTRY``: the entry is not used."""
    return CheckpointError(
        f"{printable(path)}: {found}, expected {expected}. The prepared weights are built again; "
        "`quant cache clear` deletes them all.",
        code="Q-PREPARED-ENTRY",
        path=path,
        expected=expected,
        actual=found,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kernel's share of a module: what it runs, whose rows it holds, which buffers."""

    kernel: str
    op: OpSpec
    members: tuple[tuple[str, int, int, Packing], ...]  # name, first row, row after the last
    buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Parts in row order; ``reason`` is that of a composite."""

    parts: tuple[Part, ...]
    reason: str = ""


def _sum(texts: Sequence[str], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> str:
    table = sorted(f"{name}|{dtype}|{list(shape)}" for name, dtype, shape in tensors)
    return hashlib.sha256("\0".join((*texts, *table)).encode()).hexdigest()


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=64)
def _packing(text: str) -> Packing:
    packing: Packing = from_text(text)
    return packing


def described(name: str, part: int, buffer: str) -> str:
    """The tensor that holds a buffer."""
    return f"{name}|{part}|{buffer}"


def float_name(parameter: str) -> str:
    """The tensor that holds a parameter of the model."""
    return f"{parameter}|float"


def _open(path: Path) -> tuple[OpenFile, Mapping[str, TensorInfo], Mapping[str, str]]:
    file = OpenFile(path)
    try:
        try:
            header = read_header(file, path.name, MAX_HEADER_BYTES, MAX_TENSORS)
        except (CheckpointError, LimitError) as err:
            raise entry_error(path, f"a damaged file ({err.code})", "the one written") from err
        metadata = dict(header.metadata)
        if not {"key", "modules", "ops", "sum"} <= set(metadata):
            raise entry_error(path, f"metadata {sorted(metadata)}", "key, modules, ops and sum")
        texts = [metadata[n] for n in ("key", "modules", "ops")]
        if _sum(texts, ((t.name, t.dtype, t.shape) for t in header.tensors)) != metadata["sum"]:
            raise entry_error(path, "a header that differs from its checksum", "the one written")
    except BaseException:
        file.close()
        raise
    return file, {t.name: t for t in header.tensors}, metadata


def read_key(path: Path) -> Mapping[str, Any]:
    """The key's fields of an entry's folder, for a list.

    Raises:
        CheckpointError: any reason why it is unusable.
    """
    file, _, metadata = _open(path / BUFFERS)
    file.close()
    fields: Mapping[str, Any] = json.loads(metadata["key"])
    return fields


class Entry:
    """An opened entry whose key is the one asked for. Reading is exact or raises."""

    def __init__(self, path: Path, key: Key, *, map_it: bool = False) -> None:
        """Open the entry's folder ``path``.

        Args:
            map_it: whether ``mapped`` gives pages of the file.

        Raises:
            CheckpointError: ``Q-PREPARED-ENTRY``, or the code of a broken safetensors file.
        """
        self.path = path / BUFFERS
        self._file, self._tensors, metadata = _open(self.path)
        self._mapping: mmap.mmap | None = None
        try:
            if metadata["key"] != key.text:
                raise entry_error(self.path, "the key of another load", "this one's")
            self._modules: dict[str, tuple[str, list[Any]]] = json.loads(metadata["modules"])
            self._ops: list[str] = json.loads(metadata["ops"])
        except BaseException:
            self._file.close()
            raise
        if map_it:
            self._map()

    def _map(self) -> None:
        try:
            self._mapping = map_file(self.path, self._file.fd)
        except OSError as err:  # it is read instead: slower, the same bytes
            size = self._file.state.size
            log.warning("%s", map_error(self.path, size, err, "set QUANT_PREPARED_MAP=0"))

    def module(self, name: str) -> Module:
        """How a module is made of parts; no parts if the entry does not hold it."""
        reason, parts = self._modules.get(name, ("", []))
        made = (
            Part(
                kernel=p["kernel"],
                op=op_from_text(self._ops[p["op"]]),
                members=tuple((m, a, b, _packing(x)) for m, a, b, x in p["members"]),
                buffers=tuple(p["buffers"]),
            )
            for p in parts
        )
        return Module(reason=reason, parts=tuple(made))

    def found(
        self, name: str, part: int, buffer: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> TensorInfo:
        """Where a buffer is stored; it has the dtype and shape that the kernel allocates.

        Raises:
            CheckpointError: ``Q-PREPARED-ENTRY``.
        """
        info = self._tensors.get(described(name, part, buffer))
        if info is None or info.shape != shape or info.dtype != _dtype_name(dtype):
            stored = None if info is None else (info.dtype, info.shape)
            what = f"buffer {buffer!r} of {printable(name)!r} is {stored}"
            raise entry_error(self.path, what, str((_dtype_name(dtype), shape)))
        return info

    def read_into(self, info: TensorInfo, target: Tensor) -> None:
        """Fill ``target``, whose form is that of ``info``.

        Raises:
            CheckpointError: ``Q-PREPARED-ENTRY`` if the file ends early, ``Q-CKPT-IO``.
        """
        import torch

        from quant_core.memory import empty

        if not info.nbytes:
            return
        here = target
        if target.device.type != "cpu" or not target.is_contiguous():
            here = empty((math.prod(info.shape),), target.dtype)
        raw = here.view(-1).view(torch.uint8).numpy().data
        if self._file.read_into(raw, info.offset) != info.nbytes:
            raise entry_error(self.path, "a file that ends early", "the size in its header")
        if here is not target:
            target.copy_(here.view(info.shape))

    def mapped(self, info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
        """A tensor as pages of the file; None where it is to be read.

        Raises:
            CheckpointError: ``Q-PREPARED-ENTRY`` if the file has been cut.
        """
        import torch

        if self._mapping is None or info.offset % ALIGN or not info.nbytes:
            return None
        if info.offset + info.nbytes > len(self._mapping):
            raise entry_error(self.path, "a file that ends early", "the size in its header")
        flat = torch.frombuffer(
            self._mapping, dtype=dtype, count=math.prod(shape), offset=info.offset
        )
        return flat if len(shape) == 1 else flat.view(shape)

    def floats(self, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A parameter of the model as pages of the file; None where it comes from the checkpoint.

        Raises:
            CheckpointError: ``Q-PREPARED-ENTRY`` if the file has been cut.
        """
        info = self._tensors.get(float_name(parameter))
        if info is None or (info.dtype, info.shape) != (_dtype_name(dtype), shape):
            return None
        return self.mapped(info, dtype, shape)

    def touch(self) -> None:
        """Note that the entry was used. A cache that may only be read stays as it is."""
        try:
            os.utime(self.path)
        except OSError:
            return

    def close(self) -> None:
        self._file.close()


def write_entry(
    path: Path,
    key: Key,
    modules: Mapping[str, tuple[Module, Sequence[Mapping[str, Tensor]]]],
    floats: Mapping[str, Tensor],
) -> None:
    """Write an entry's folder, whole or not at all.

    Args:
        modules: name -> the module, and the buffers of each of its parts.
        floats: parameter of the model -> its value.

    Raises:
        CheckpointError: ``Q-CKPT-LOCKED`` or ``Q-CKPT-EXISTS`` if another process was first,
            ``Q-CKPT-IO`` if the system refuses.
    """
    from quant_core.checkpoint.write import write_safetensors

    ops: dict[str, int] = {}
    tensors = {float_name(name): t for name, t in floats.items()}
    listed: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for name, (module, held) in modules.items():
        parts: list[dict[str, Any]] = []
        for i, (part, buffers) in enumerate(zip(module.parts, held, strict=True)):
            parts.append(
                {
                    "kernel": part.kernel,
                    "op": ops.setdefault(to_text(part.op), len(ops)),
                    "members": [[m, a, b, to_text(x)] for m, a, b, x in part.members],
                    "buffers": list(part.buffers),
                }
            )
            tensors |= {described(name, i, b): t for b, t in buffers.items()}
        listed[name] = (module.reason, parts)
    texts = [key.text, json.dumps(listed), json.dumps(list(ops))]
    table = ((n, _dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items())
    metadata = dict(zip(("key", "modules", "ops"), texts)) | {"sum": _sum(texts, table)}
    write_safetensors(
        path,
        tensors,
        max_shard_bytes=2**62,
        metadata=metadata,
        stem=BUFFERS.removesuffix(".safetensors"),
        align=ALIGN,
    )
