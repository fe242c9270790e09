"""AutoRound layers and configs made for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from made_words import interleaved, qweight, qweight_interleaved, qzeros, save, weight, words
from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import Plan, plan
from quant_core.registry import Registry, load_registry

__all__ = [
    "FORMATS",
    "config",
    "layer",
    "plan_of",
    "registry",
    "same_bytes",
    "save",
    "save_tensors",
    "stored_zeros",
]

FORMATS = {
    "minus_one": "auto_round:auto_gptq",
    "raw": "auto_round",
    "interleaved": "auto_round:auto_awq",
}
_registry: Registry | None = None


def registry() -> Registry:
    """A registry with this plugin alone."""
    global _registry
    _registry = _registry or load_registry(only=["autoround"])
    return _registry


def stored_zeros(zeros: Tensor, bits: int, dialect: str) -> Tensor:
    """Zero points (G, N) to int32 (G, N*b/32) as AutoRound 0.16.1 stores them."""
    if dialect == "interleaved":
        return torch.stack([words(interleaved(row.tolist(), bits)) for row in zeros])
    return qzeros(zeros, bits, v1=dialect == "minus_one")


def layer(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    dialect: str = "minus_one",
    g_idx: bool = False,
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
    index = torch.arange(k, dtype=torch.int32) // size
    packer = qweight_interleaved if dialect == "interleaved" else qweight
    tensors = {
        "qweight": packer(codes, bits),
        "qzeros": stored_zeros(zeros, bits, dialect),
        "scales": scales,
    }
    if g_idx:
        tensors["g_idx"] = index
    if bias:
        tensors["bias"] = torch.rand(n, generator=rng).to(dtype)
    return tensors, weight(codes, zeros, scales, index)


def config(**changes: Any) -> dict[str, Any]:
    """A block as AutoRound 0.16.1 writes it; a value of ... removes the key."""
    base = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "autoround_version": "0.16.1",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    }
    return {k: v for k, v in (base | changes).items() if v is not ...}


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a checkpoint on disk."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    raw = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def plan_of(folder: Path) -> Plan:
    return plan(open_checkpoint(folder), registry=registry())
