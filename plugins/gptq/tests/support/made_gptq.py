"""GPTQ layers and configs made for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from made_words import qweight, qzeros, save, weight
from quant_core.checkpoint.open import open_checkpoint
from quant_core.plan import Plan, plan
from quant_core.registry import Registry, load_registry

__all__ = ["config", "layer", "plan_of", "qweight", "qzeros", "registry", "save", "weight"]

_registry: Registry | None = None


def registry() -> Registry:
    """A registry with this plugin alone."""
    global _registry
    _registry = _registry or load_registry(only=["gptq"])
    return _registry


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


def plan_of(folder: Path) -> Plan:
    return plan(open_checkpoint(folder), registry=registry())
