"""Packers that set one code at a time, written from the published layouts and sharing nothing with
the code under test; and small checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

torch.set_num_threads(1)

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
SLOT = (0, 4, 1, 5, 2, 6, 3, 7)  # place of output channel j inside a run of eight


def words(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32).copy())


def stream(codes: Sequence[int], bits: int) -> list[int]:
    """One bit stream, LSB first, cut into 32-bit words."""
    whole = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    return [whole >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]


def planes(codes: Sequence[int], bits: int) -> list[int]:
    """Runs of 32 codes, plane after plane."""
    out = []
    for start in range(0, len(codes), 32):
        run, offset = [int(c) for c in codes[start : start + 32]], 0
        for width in PLANES.get(bits, (bits,)):
            out += stream([c >> offset & (1 << width) - 1 for c in run], width)
            offset += width
    return out


def interleaved(codes: Sequence[int], bits: int) -> list[int]:
    """The stream of ``codes`` whose runs of eight were put into the order of ``SLOT``."""
    out = [0] * len(codes)
    for i, c in enumerate(codes):
        out[i // 8 * 8 + SLOT[i % 8]] = int(c)
    return stream(out, bits)


def qweight(codes: Tensor, bits: int, *, planar: bool = False) -> Tensor:
    """Codes (N, K) to int32 (K*b/32, N), each column a stream along K."""
    packer = planes if planar else stream
    return torch.stack([words(packer(row.tolist(), bits)) for row in codes], dim=1)


def qweight_interleaved(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) to int32 (K, N*b/32), each row a stream along N in the order of ``SLOT``."""
    return torch.stack([words(interleaved(column.tolist(), bits)) for column in codes.t()])


def qzeros(zeros: Tensor, bits: int, *, v1: bool = True, planar: bool = False) -> Tensor:
    """Zero points (G, N) to int32 (G, N*b/32), v1 shifted as GPTQModel 7.7.0 does it."""
    rows = []
    for row in zeros.tolist():
        if v1 and bits not in (2, 4, 8):
            row = [(z - 1) % (1 << bits) for z in row]
        packed = (planes if planar else stream)(row, bits)
        if v1 and bits in (2, 4, 8):
            ones = sum(1 << at for at in range(0, 32, bits))
            packed = [(w - ones) % (1 << 32) for w in packed]
        rows.append(words(packed))
    return torch.stack(rows)


def weight(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """W[n, k] = s * (c - z) in float32. codes (N, K), zeros and scales (G, N)."""
    index = g_idx.long()
    return (codes.float() - zeros.float()[index].t()) * scales.float()[index].t()


def save(
    folder: Path,
    modules: Mapping[str, Mapping[str, Tensor]],
    block: object = None,
    side_files: Mapping[str, object] | None = None,
) -> Path:
    """A checkpoint on disk; ``block`` None leaves quantization_config out."""
    tensors = {f"{m}.{leaf}": t for m, leaves in modules.items() for leaf, t in leaves.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = {"model_type": "made"} | ({} if block is None else {"quantization_config": block})
    (folder / "config.json").write_text(json.dumps(model))
    for name, value in (side_files or {}).items():
        (folder / name).write_text(json.dumps(value))
    return folder
