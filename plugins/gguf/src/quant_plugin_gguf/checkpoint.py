"""A GGUF checkpoint: one file, a folder with one, or a split set ``-00001-of-00003.gguf``.

Opening reads headers only and imports no torch. ``read`` uses ``pread``, so a file that shrinks
meanwhile is an error and not a dead process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quant_core.checkpoint.base import Checkpoint, Index
from quant_core.checkpoint.buffer import BufferPool
from quant_core.checkpoint.cut import contiguous_part
from quant_core.checkpoint.files import FilePool, FileState
from quant_core.checkpoint.mapped import FileMaps
from quant_core.checkpoint.sniff import changed_error
from quant_core.errors import CheckpointError, LayoutError, printable
from quant_core.spec import TensorInfo
from quant_plugin_gguf.cursor import LazyArray
from quant_plugin_gguf.names import ARCHITECTURES, Architecture, architecture
from quant_plugin_gguf.reader import Header, StoredTensor, read_header
from quant_plugin_gguf.sets import check_split, files_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GgufCheckpoint", "open_gguf"]

_FACTOR_RULE = "rotary factors follow from config.json"


def open_gguf(path: Path) -> GgufCheckpoint | None:
    """Open ``path`` if it is a GGUF file or a folder that holds one; None if it is neither.

    Raises:
        CheckpointError: a broken file (see ``read_header``) or set of files (see ``files_of``).
    """
    files = files_of(path)
    return GgufCheckpoint(path, files) if files else None


class GgufCheckpoint(Checkpoint):
    """An opened GGUF model. Block types have dtype names like "q4_k" and are read as bytes."""

    container = "gguf"

    def __init__(self, path: Path, parts: list[Path]) -> None:
        self.path = path
        self.folder = parts[0].parent
        self.file = parts[0]
        headers = [read_header(p) for p in parts]
        check_split(parts, headers)
        self.metadata = MappingProxyType(dict(headers[0].metadata))
        self.spans = headers[0].spans
        self.version = headers[0].version
        self.config: Mapping[str, Any] = self.side_file("config.json") or {}
        self._states = {p.name: h.state for p, h in zip(parts, headers, strict=True)}
        self._paths = {p.name: self.folder / p.name for p in parts}
        self._pool = FilePool()
        self._buffers = BufferPool()
        self._maps = FileMaps()
        self._stored: dict[str, StoredTensor] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self.tensors = MappingProxyType(self._tensors)
        for part, header in zip(parts, headers, strict=True):
            self._add(part, header)
        self.warnings = [
            f"{p.name}: {h.trailing} bytes follow the last tensor"
            for p, h in zip(parts, headers, strict=True)
            if h.trailing
        ]
        self.warnings += self._factor_warnings()

    def _add(self, part: Path, header: Header) -> None:
        for name, t in header.tensors.items():
            if name in self._stored:
                raise CheckpointError(
                    f"{part}: tensor {printable(name)!r} is also in "
                    f"{self.tensors[name].file!r}, expected it once. "
                    "The files belong to different sets.",
                    code="Q-GGUF-NAME",
                    path=part,
                    tensor=name,
                )
            self._stored[name] = t
            self._tensors[name] = TensorInfo(
                name=name,
                dtype=t.type.dtype,
                shape=t.shape,
                file=part.name,
                offset=t.offset,
                nbytes=t.nbytes,
            )

    # ------------------------------------------------------------------------- what it is

    @cached_property
    def architecture(self) -> Architecture:
        """Raises ``FormatError`` (``Q-GGUF-ARCH``) for an architecture that is not listed."""
        return architecture(self.metadata.get("general.architecture"), self.file)

    def heads(self, which: str, layer: int) -> int:
        """Attention heads ("q") or key-value heads ("k") of a layer, from the metadata.

        Raises:
            CheckpointError: ``Q-GGUF-KV`` if the key is missing or no positive count.
        """
        key = f"{self.architecture.name}.attention.head_count"
        if which == "k" and f"{key}_kv" in self.metadata:
            key = f"{key}_kv"
        value = self.metadata.get(key)
        if isinstance(value, LazyArray) and layer < len(value):
            value = value[layer]
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.file}: key {key!r} gives {printable(repr(value), 40)} heads for layer "
                f"{layer}, expected a positive count. The metadata is incomplete; convert again.",
                code="Q-GGUF-KV",
                path=self.file,
                tensor=key,
                actual=value,
            )
        return value

    def permuted_heads(self, stored: str) -> int:
        """Heads whose rows the writer reordered in this tensor; 0 = none."""
        module = stored.rpartition(".")[0]
        which = self.architecture.permuted_rows(module)
        return self.heads(which, int(module.split(".")[1])) if which else 0

    def public_name(self, stored: str) -> str:
        return self.architecture.public_name(stored) or stored

    @property
    def ignored(self) -> Mapping[str, str]:
        """Rotary factors, if ``config.json`` states how they are computed."""
        if not _config_scales_rope(self.config):
            return {}
        return dict.fromkeys(self._factors(), _FACTOR_RULE)

    def _factors(self) -> list[str]:
        found = ARCHITECTURES.get(str(self.metadata.get("general.architecture")))
        return [n for n in found.factors if n in self.tensors] if found else []

    def _factor_warnings(self) -> list[str]:
        if self._factors() and not self.ignored:
            return [
                f"{self.file.name}: holds rotary factors, but no config.json beside it says how "
                "the model scales its positions; put the model's config.json there"
            ]
        return []

    def pretrained_args(self) -> Mapping[str, str]:
        """transformers converts config and tokenizer from the file's own metadata."""
        return {
            "pretrained_model_name_or_path": str(self.folder),
            "gguf_file": self.file.name,
        }

    @contextmanager
    def config_args(self) -> Iterator[Mapping[str, str]]:
        """A copy of the header without the vocabulary, which is slow to read there."""
        from quant_plugin_gguf.config_file import write_config_file

        with tempfile.TemporaryDirectory(prefix="quant-gguf-") as folder:
            write_config_file(self, Path(folder) / self.file.name)
            yield {"pretrained_model_name_or_path": folder, "gguf_file": self.file.name}

    def config_overrides(self) -> Mapping[str, Any]:
        """Sizes of the experts, which transformers 5.23 leaves at its own defaults.

        It also takes every file for a dense feed-forward of ``feed_forward_length``; in a file
        whose layers are all experts that length describes nothing.
        """
        prefix = self.metadata.get("general.architecture")
        keys = {
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        }
        found = {name: self.metadata.get(f"{prefix}.{key}") for key, name in keys.items()}
        return {name: value for name, value in found.items() if isinstance(value, int) and value}

    # --------------------------------------------------------------------------- reading

    def close(self) -> None:
        self._pool.close()
        self._buffers.clear()
        self._maps.clear()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """See ``Checkpoint.read``; the last axis of a block type counts bytes and is never cut."""
        return self._read(name, index, self._buffers)

    def mapped(self, name: str) -> Tensor | None:
        """See ``Checkpoint.mapped``; blocks are uint8 as in ``read``."""
        import torch

        info, ggml = self._info(name), self._stored[name].type
        plain = ggml.kind == "plain"
        shape = info.shape if plain else (*info.shape[:-1], ggml.row_bytes(info.shape[-1]))
        dtype: torch.dtype = getattr(torch, info.dtype) if plain else torch.uint8
        path, state = self._paths[info.file], self._states[info.file]
        return self._maps.tensor(path, state, info, dtype, shape)

    def mapped_parameter(self, stored: str) -> Tensor | None:
        """See ``Checkpoint.mapped_parameter``: of plain tensors that the writer did not edit."""
        if self._stored[stored].type.kind != "plain" or self.permuted_heads(stored):
            return None
        if self.architecture.shift_of(stored) or _one_row(stored):
            return None
        return self.mapped(stored)

    def _read(self, name: str, index: Index, buffers: BufferPool) -> Tensor:
        import torch

        info, ggml = self._info(name), self._stored[name].type
        plain = ggml.kind == "plain"
        shape = info.shape if plain else (*info.shape[:-1], ggml.row_bytes(info.shape[-1]))
        if not plain and len(index) >= len(shape):
            raise LayoutError(
                f"{printable(info.file)}: tensor {printable(name)!r} is stored in blocks of "
                f"{ggml.weights} weights, index {index} cuts its last axis; expected cuts of "
                "leading axes only. Read whole rows.",
                code="Q-LAYOUT-SHAPE",
                path=info.file,
                tensor=name,
                expected=len(shape) - 1,
                actual=len(index),
            )
        dtype: torch.dtype = getattr(torch, info.dtype) if plain else torch.uint8
        first, part, rest = contiguous_part(name, shape, index)
        nbytes = math.prod(part) * dtype.itemsize
        data = buffers.lease(nbytes, path=self.folder / info.file, tensor=name)
        self._fill(info, data.numpy().data, info.offset + first * dtype.itemsize)
        out = data.view(dtype).view(part)
        return out[rest].contiguous() if rest else out

    def _fill(self, info: TensorInfo, buffer: memoryview, offset: int) -> None:
        path, state = self.folder / info.file, self._states[info.file]
        with self._pool.open(path) as file:
            got = file.read_into(buffer, offset)
            now = FileState.of(file.fd)
        if got != len(buffer) or now != state:
            raise changed_error(path, info.file, f"{state.size} bytes", now.size, info.name)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(
                f"{printable(self.path)}: has no tensor {printable(name)!r}, expected it among "
                f"{len(self.tensors)}. `quant inspect` lists the names.",
                code="Q-TENSOR-MISSING",
                path=self.path,
                tensor=name,
            )
        return self.tensors[name]

    def read_parameter(self, stored: str) -> Tensor:
        """The whole tensor as the model wants it: dequantized, rows in order, shift undone."""
        from quant_plugin_gguf.blocks import dequantize_rows
        from quant_plugin_gguf.rows import to_public_rows

        info, ggml = self._info(stored), self._stored[stored].type
        values = self._read(stored, (), BufferPool())  # a model keeps it
        if ggml.kind != "plain":
            values = dequantize_rows(values.flatten(0, -2), ggml.dtype).view(info.shape)
        if heads := self.permuted_heads(stored):
            values = to_public_rows(values, heads, stored)
        if shift := self.architecture.shift_of(stored):
            values = values - shift
        if _one_row(stored) and values.dim() == 1:
            values = values.unsqueeze(0)  # the model has a Linear with one output
        return values


def _one_row(stored: str) -> bool:
    """Whether a tensor is stored as a vector that the model has as a matrix of one row."""
    return stored.endswith("ffn_gate_inp_shexp.weight")


def _config_scales_rope(config: Mapping[str, Any]) -> bool:
    """Whether a model config says how rotary factors are computed."""
    for key in ("rope_scaling", "rope_parameters"):
        block = config.get(key)
        if isinstance(block, Mapping):
            kind = block.get("rope_type", block.get("type", "default"))
            return bool(kind != "default")
    return False
