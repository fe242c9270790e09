"""Tensors and checkpoints made for tests: packers that set one code at a time, written from the
published layouts and sharing nothing with the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import Plan, plan
from quant_core.registry import Registry, load_registry

torch.set_num_threads(1)

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
_registry: Registry | None = None


def registry() -> Registry:
    """A registry with this plugin alone."""
    global _registry
    _registry = _registry or load_registry(only=["gptq"])
    return _registry


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


def qweight(codes: Tensor, bits: int, *, planar: bool = False) -> Tensor:
    """Codes (N, K) to int32 (K*b/32, N)."""
    packer = planes if planar else stream
    return torch.stack([words(packer(row.tolist(), bits)) for row in codes], dim=1)


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


def layer(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    v1: bool = True,
    planar: bool = False,
    g_idx: Tensor | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a random layer, and its float32 weight."""
    rng = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    codes = torch.randint(0, 1 << bits, (n, k), generator=rng)
    zeros = torch.full((groups, n), 1 << (bits - 1))
    if not sym:
        zeros = torch.randint(0, 1 << bits, (groups, n), generator=rng)
    scales = (torch.rand(groups, n, generator=rng) * 0.1 + 0.01).to(dtype)
    index = torch.arange(k, dtype=torch.int32) // size if g_idx is None else g_idx
    tensors = {
        "qweight": qweight(codes, bits, planar=planar),
        "qzeros": qzeros(zeros, bits, v1=v1, planar=planar),
        "scales": scales,
        "g_idx": index,
    }
    if bias:
        tensors["bias"] = torch.rand(n, generator=rng).to(dtype)
    return tensors, weight(codes, zeros, scales, index)


def config(**changes: Any) -> dict[str, Any]:
    """A GPTQModel block; a value of ... removes the key."""
    base = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    return {k: v for k, v in (base | changes).items() if v is not ...}


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


def plan_of(folder: Path) -> Plan:
    return plan(open_checkpoint(folder), registry=registry())
