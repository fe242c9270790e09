"""safetensors, one file or many: core's own container.

Opening reads and checks every header (``header``) and the index; it imports no torch. Reading
takes the bytes of one tensor, or of the leading part that is asked for, into memory that the
tensor owns (``files``). The safetensors package is not used: it maps files, and its header checks
come without names.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint import discover
from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.checkpoint.buffer import BufferPool
from quant_core.checkpoint.cut import contiguous_part
from quant_core.checkpoint.files import FilePool, FileState, OpenFile, resolve_inside
from quant_core.checkpoint.header import BITS, MAX_HEADER_BYTES, MAX_TENSORS
from quant_core.checkpoint.json import read_json_object
from quant_core.checkpoint.mapped import FileMaps
from quant_core.checkpoint.sniff import changed_error, read_header
from quant_core.errors import (
    CheckpointError,
    ConfigError,
    printable,
    summarize,
)
from quant_core.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SafetensorsCheckpoint"]

MAX_INDEX_BYTES = 256 * 2**20  # 1 M tensors with names of 200 characters


@dataclass(frozen=True, slots=True)
class _File:
    path: Path  # real path, all symlinks followed
    state: FileState


class SafetensorsCheckpoint(Checkpoint):
    """A single safetensors file, or the shards of an index. Threads may read at the same time."""

    container = "safetensors"

    def __init__(
        self, path: Path, folder: Path, *, max_header_bytes: int, max_tensors: int
    ) -> None:
        self.path = path
        self.folder = folder
        self.warnings: list[str] = []
        self._limits = (max_header_bytes, max_tensors)
        self._pool = FilePool()
        self._buffers = BufferPool()
        self._maps = FileMaps()
        self._files: dict[str, _File] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._metadata: dict[str, str] = {}
        self.tensors = MappingProxyType(self._tensors)
        self.metadata = MappingProxyType(self._metadata)
        config = folder / "config.json"
        self.config: Mapping[str, Any] = (
            read_json_object(config) if config.exists() else MappingProxyType({})
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_tensors: int = MAX_TENSORS,
    ) -> SafetensorsCheckpoint:
        """Open a ``.safetensors`` file, an index file, or a folder that holds either.

        A file given by name may be a symlink to anywhere; files found in a folder or named by an
        index must follow the rule of ``resolve_inside``.

        Raises:
            CheckpointError: a ``Q-CKPT-*`` code; docs/errors.md lists them.
            LimitError: ``Q-LIMIT-HEADER`` for a header above ``max_header_bytes`` or more than
                ``max_tensors`` tensors in all.
            ConfigError: a malformed ``config.json``.
        """
        path = Path(os.path.abspath(path))
        limits = {"max_header_bytes": max_header_bytes, "max_tensors": max_tensors}
        if path.is_dir():
            found = discover.find_set(path, discover.list_names(path))
            if found is None:
                raise CheckpointError(
                    f"{printable(path)}: holds no safetensors file, expected one. Check the path.",
                    code="Q-CKPT-IO",
                    path=path,
                )
            return cls.open_set(path, found, **limits)
        if path.name.endswith(discover.INDEX_SUFFIX):
            return cls.open_set(path.parent, discover.FileSet(index=path.name), **limits)
        self = cls(path, path.parent, **limits)
        self._add(path.name, Path(os.path.realpath(path)))
        return self

    @classmethod
    def open_set(
        cls,
        folder: Path,
        found: discover.FileSet,
        *,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_tensors: int = MAX_TENSORS,
    ) -> SafetensorsCheckpoint:
        """Open the files that ``discover.find_set`` found in ``folder``. Raises as ``open``."""
        discover.check_lone(folder, found)
        self = cls(folder, folder, max_header_bytes=max_header_bytes, max_tensors=max_tensors)
        self.warnings += found.warnings
        if found.index:
            self._add_index(found.index)
            return self
        twice: list[str] = []
        for name in found.files:
            twice += self._add(name, resolve_inside(folder, name))
        self._raise_index(twice, str(folder))
        return self

    # ---------------------------------------------------------------------------------- opening

    def _add(self, name: str, real: Path, owners: Mapping[str, str] | None = None) -> list[str]:
        """Take in one file; returns what disagrees with ``owners`` (the index) or other files."""
        max_header_bytes, max_tensors = self._limits
        file = OpenFile(real)
        try:
            header = read_header(file, name, max_header_bytes, max_tensors - len(self._tensors))
            self._files[name] = _File(real, file.state)
        finally:
            file.close()
        problems: list[str] = []
        for info in header.tensors:
            owner = name if owners is None else owners.get(info.name)
            shown = f"tensor {printable(info.name)!r} is stored in {printable(name)!r}"
            if owner is None:
                problems.append(f"{shown}, in the index nowhere")
            elif owner != name:
                problems.append(f"{shown}, in the index in {printable(owner)!r}")
            elif info.name in self._tensors:
                other = self._tensors[info.name].file
                problems.append(f"{shown} and in {printable(other)!r}")
            else:
                self._tensors[info.name] = info
        for key, value in header.metadata.items():
            if self._metadata.setdefault(key, value) != value:
                self.warnings.append(
                    f"{printable(name)}: metadata {printable(key)!r} differs between the files; "
                    "the first file's value is used"
                )
        return problems

    def _add_index(self, name: str) -> None:
        weight_map, total_size = self._read_index(resolve_inside(self.folder, name), name)
        shards = {
            s: resolve_inside(self.folder, s, named_by=name) for s in sorted({*weight_map.values()})
        }
        discover.check_single_beside_index(self.folder, name, set(shards))
        if lost := [s for s, real in shards.items() if not real.exists()]:
            raise discover.missing_shards(self.folder, lost, len(lost), name)
        problems: list[str] = []
        for shard, real in shards.items():
            problems += self._add(shard, real, weight_map)
        problems += [
            f"tensor {printable(tensor)!r} is in the index in {printable(shard)!r}, which does not "
            "hold it"
            for tensor, shard in weight_map.items()
            if tensor not in self._tensors
        ]
        self._raise_index(problems, name)
        stored = sum(t.nbytes for t in self._tensors.values())
        files = sum(f.state.size for f in self._files.values())
        if total_size is not None and total_size not in (stored, files):
            self.warnings.append(
                f"{printable(name)}: metadata.total_size is {printable(total_size)}, "
                f"the tensors have {stored} bytes"
            )

    def _read_index(self, path: Path, name: str) -> tuple[Mapping[str, str], object]:
        def wrong(found: str, err: Exception | None = None) -> CheckpointError:
            error = CheckpointError(
                f"{printable(name)}: {found}, expected an object 'weight_map' of tensor name to "
                "file name. Download the index again.",
                code="Q-CKPT-INDEX",
                path=path,
                expected="weight_map",
                actual=found,
            )
            error.__cause__ = err
            return error

        try:
            index = read_json_object(path, limit_bytes=MAX_INDEX_BYTES)
        except ConfigError as err:
            raise wrong(f"is malformed ({err})", err) from err
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise wrong(f"weight_map is {printable(weight_map)}")
        if bad := [k for k, v in weight_map.items() if not isinstance(v, str)]:
            raise wrong(f"weight_map gives no file name for {summarize(bad)}")
        metadata = index.get("metadata")
        return weight_map, metadata.get("total_size") if isinstance(metadata, Mapping) else None

    def _raise_index(self, problems: list[str], name: str) -> None:
        if problems:
            more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise CheckpointError(
                f"{printable(name)}: {'; '.join(problems[:10])}{more}; expected each tensor in "
                "exactly one file, the one its index names. Download index and shards of one "
                "revision again.",
                code="Q-CKPT-INDEX",
                path=self.folder / name,
                expected="each tensor in exactly one file",
                actual=tuple(problems),
            )

    # ---------------------------------------------------------------------------------- reading

    def read(self, name: str, index: Index = ()) -> Tensor:
        return self._read(name, index, self._buffers)

    def read_parameter(self, stored: str) -> Tensor:
        return self._read(stored, (), BufferPool())

    def mapped(self, name: str) -> Tensor | None:
        import torch

        info = self._info(name)
        dtype = getattr(torch, info.dtype, None) if BITS[info.dtype] >= 8 else None
        if dtype is None:
            return None
        file = self._files[info.file]
        return self._maps.tensor(file.path, file.state, info, dtype, info.shape)

    def mapped_parameter(self, stored: str) -> Tensor | None:
        return self.mapped(stored)

    def _read(self, name: str, index: Index, buffers: BufferPool) -> Tensor:
        import torch

        info = self._info(name)
        bits = BITS[info.dtype]
        dtype = getattr(torch, info.dtype if bits >= 8 else "uint8", None)
        if dtype is None:
            raise CheckpointError(
                f"{printable(info.file)}: tensor {printable(name)!r} has dtype {info.dtype!r}, "
                f"expected one that torch {torch.__version__} has. Install a newer torch.",
                code="Q-CKPT-DTYPE",
                path=self.folder / info.file,
                tensor=name,
                actual=info.dtype,
            )
        shape = info.shape if bits >= 8 else (*info.shape[:-1], info.shape[-1] * bits // 8)
        first, part, rest = contiguous_part(name, shape, index)
        itemsize = max(bits // 8, 1)
        nbytes = math.prod(part) * itemsize
        buffer = buffers.lease(nbytes, path=self.folder / info.file, tensor=name)
        if nbytes:
            self._fill(info, buffer.numpy().data, info.offset + first * itemsize)
        tensor = buffer.view(dtype).view(part)
        return tensor[rest].clone(memory_format=torch.contiguous_format) if rest else tensor

    def read_bytes(self, name: str) -> bytes:
        info = self._info(name)
        self._check_small(name)
        raw = bytearray(info.nbytes)
        if raw:
            self._fill(info, memoryview(raw), info.offset)
        return bytes(raw)

    def _fill(self, info: TensorInfo, buffer: memoryview, offset: int) -> None:
        file = self._files[info.file]
        with self._pool.open(file.path) as opened:
            got = opened.read_into(buffer, offset)
            now = FileState.of(opened.fd)
        if got != len(buffer) or now != file.state:
            raise changed_error(
                file.path, info.file, f"{file.state.size} bytes", now.size, info.name
            )

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{printable(self.path)}: has no tensor {printable(name)!r}, expected it among "
                f"{len(self.tensors)}. `quant inspect` lists the names.",
                code="Q-TENSOR-MISSING",
                path=self.path,
                tensor=name,
            ) from None

    def close(self) -> None:
        self._pool.close()
        self._buffers.clear()
        self._maps.clear()
