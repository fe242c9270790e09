"""Write a GGUF file: header, then each tensor streamed matrix by matrix.

    "GGUF" 3 counts | pairs | tensor infos | padding | tensor, padding, tensor, ...

From a GGUF source, pairs, names, order and float tensors are copied as they are. From any other,
``describe`` and ``vocab`` make the pairs from config.json and tokenizer.json, and refuse what they
cannot state completely.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant_core.checkpoint.files import io_error
from quant_core.convert.target import Target
from quant_core.errors import LayoutError, printable, summarize
from quant_plugin_gguf.checkpoint import GgufCheckpoint
from quant_plugin_gguf.describe import describe
from quant_plugin_gguf.kv import Pairs, copied_pairs, string
from quant_plugin_gguf.names import Architecture
from quant_plugin_gguf.scheme import GgufScheme
from quant_plugin_gguf.types import BY_NAME, GgmlType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write"]

_VERSION = 3
_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp")  # kept in float32 by every writer
_FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}  # general.file_type


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor to write; ``parts`` yields its values in order, at most one matrix at a time."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(math.prod(self.shape))


def write(target: Target, folder: Path) -> list[Path]:
    """See the hook ``write_checkpoint``: one file ``model.gguf``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for names, shapes or metadata that do not fit.
        CheckpointError: ``Q-CKPT-IO``.
    """
    source = target.source.checkpoint
    if isinstance(source, GgufCheckpoint):
        pairs, alignment = (
            copied_pairs(source.file, source.spans),
            source.metadata.get("general.alignment", 32),
        )
        layout = _Layout(target, source.architecture, source.permuted_heads)
        entries = layout.entries() + _carried(source, layout)
        place = {name: i for i, name in enumerate(source.tensors)}
        entries.sort(key=lambda e: place[e.name])
    else:
        pairs, arch, heads = describe(target)
        alignment, layout = 32, _Layout(target, arch, heads)
        entries = layout.entries()
        pairs.append(_file_type(entries))
    path = folder / "model.gguf"
    try:
        with path.open("xb") as file:
            for chunk in _chunks(pairs, entries, alignment):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as err:
        raise io_error(path, err, "cannot be written") from err
    return [path]


def _file_type(entries: list[_Entry]) -> tuple[str, bytes]:
    """``general.file_type``: the type of most weights."""
    from quant_plugin_gguf.kv import encode

    weights: dict[str, int] = {}
    for e in entries:
        weights[e.type.dtype] = weights.get(e.type.dtype, 0) + math.prod(e.shape)
    most = max(weights, key=lambda name: weights[name])
    return encode("general.file_type", "u32", _FILE_TYPES.get(most, 1024))  # 1024: guessed


# ---------------------------------------------------------------------------------------- tensors


@dataclass(slots=True)
class _Layout:
    """Names, types and row order of a target's tensors."""

    target: Target
    arch: Architecture
    heads: Callable[[str], int]  # stored name -> heads whose rows are reordered, 0 = none

    def entries(self) -> list[_Entry]:
        out: list[_Entry] = []
        unknown: list[str] = []
        names = [f"{n}.weight" for n in self.target.plan.quantized] + list(self.target.plan.dense)
        for public in names:
            stored = self.arch.stored_name(public)
            if stored is None or len(stored.encode()) > 63:
                unknown.append(public)
                continue
            if public in self.target.plan.dense:
                out.append(self._float(public, stored))
            else:
                out += self._quantized(public.removesuffix(".weight"), stored)
        if unknown:
            raise LayoutError(
                f"{self.target.source.checkpoint.path}: {len(unknown)} tensors have no name in "
                f"architecture {self.arch.name!r}: {summarize(unknown)}, expected only tensors "
                "that llama.cpp knows. Choose another target format.",
                code="Q-LAYOUT-REPRESENT",
                tensor=unknown[0],
                expected=self.arch.name,
                actual=tuple(unknown),
                plugin="gguf",
            )
        return out

    def _rows(self, values: Tensor, stored: str) -> Tensor:
        """Rows in the order llama.cpp wants them."""
        from quant_plugin_gguf.rows import to_stored_rows

        heads = self.heads(stored)
        return to_stored_rows(values, heads, stored) if heads else values

    def _quantized(self, name: str, stored: str) -> Iterator[_Entry]:
        member = self.target.plan.members[name]
        scheme = member.scheme
        assert isinstance(scheme, GgufScheme)
        experts = member.layer.experts or (None,)
        stack = (len(experts),) if member.layer.experts else ()

        def parts(leaf: str, stored: str) -> Callable[[], Iterator[Tensor]]:
            def values() -> Iterator[Tensor]:
                for expert in experts:
                    found = self.target.matrix(name, expert)[leaf]
                    yield self._rows(found, stored) if leaf != "scale" else found

            return values

        module = stored.removesuffix(".weight")
        yield _Entry(stored, BY_NAME[scheme.name], (*stack, *scheme.shape), parts("weight", stored))
        for leaf, _ in scheme.beside:
            size = (scheme.shape[0],) if leaf == "bias" else () if stack else (1,)
            beside = f"{module}.{leaf}"
            yield _Entry(beside, BY_NAME["float32"], (*stack, *size), parts(leaf, beside))

    def _float(self, public: str, stored: str) -> _Entry:
        """A float tensor; of a GGUF source, the stored one itself."""
        source, plan = self.target.source.checkpoint, self.target.source
        if isinstance(source, GgufCheckpoint) and public in plan.dense:
            return _copy(source, plan.dense[public])
        info = self.target.plan.checkpoint.tensors[public]
        inner = stored.rpartition(".")[0].rpartition(".")[2]
        shape = tuple(info.shape)
        if not shape or 0 in shape:
            raise LayoutError(
                f"tensor {printable(public)!r} has shape {list(shape)}, expected one or more sizes "
                "of 1 or more, as GGUF holds them. Choose another target format.",
                code="Q-LAYOUT-REPRESENT",
                tensor=public,
                actual=shape,
                plugin="gguf",
            )
        if inner.endswith("_shexp") and inner.startswith("ffn_gate_inp"):
            shape = (shape[-1],)  # a Linear with one output is a vector there
        wide = len(shape) < 2 or inner in _FLOAT32 or info.dtype == "float64"
        dtype = "float32" if wide else info.dtype

        def parts() -> Iterator[Tensor]:
            import torch

            value = self._rows(self.target.parameter(public), stored).reshape(shape)
            if shift := self.arch.shift_of(stored):
                value = value.float() + shift
            yield value.to(getattr(torch, dtype))

        return _Entry(stored, BY_NAME[dtype], shape, parts)


def _copy(source: GgufCheckpoint, stored: str) -> _Entry:
    info = source.tensors[stored]
    return _Entry(stored, BY_NAME[info.dtype], info.shape, lambda: iter([source.read(stored)]))


def _carried(source: GgufCheckpoint, layout: _Layout) -> list[_Entry]:
    """What no module loads, such as rotary factors: copied."""
    return [_copy(source, name) for name in layout.target.source.ledger.skipped]


# ------------------------------------------------------------------------------------------ bytes


def _chunks(pairs: Pairs, entries: list[_Entry], alignment: int) -> Iterator[bytes | memoryview]:
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(entries), len(pairs))
    head += b"".join(pair for _, pair in pairs)
    offset = 0
    for e in entries:
        dims = tuple(reversed(e.shape))
        head += string(e.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", e.type.id, offset)
        offset += -(-e.nbytes // alignment) * alignment
    yield head + b"\0" * (-len(head) % alignment)
    for e in entries:
        written = 0
        for part in e.parts():
            data = _bytes(part)
            written += len(data)
            yield data
        if written != e.nbytes:
            raise LayoutError(
                f"tensor {printable(e.name)!r}: {written} bytes of values, expected {e.nbytes} for "
                f"{e.type.name} of shape {e.shape}. The source changed while it was read.",
                code="Q-LAYOUT-SHAPE",
                tensor=e.name,
                expected=e.nbytes,
                actual=written,
                plugin="gguf",
            )
        yield b"\0" * (-written % alignment)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
