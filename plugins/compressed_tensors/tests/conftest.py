"""Stored layers made one code at a time, and small checkpoints on disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from made_words import stream, words
from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)

NAME = "model.layers.0.mlp.up_proj"


def padded(codes: list[int], bits: int) -> list[int]:
    """floor(32 / bits) codes a word, one shift at a time."""
    per = 32 // bits
    out = [0] * -(-len(codes) // per)
    for i, code in enumerate(codes):
        out[i // per] |= int(code) << (bits * (i % per))
    return out


def pack_rows(codes: Tensor, bits: int, *, pad: bool = False) -> Tensor:
    """Codes (N, K) to int32 (N, W)."""
    packer = padded if pad else stream
    return torch.stack([words(packer(row.tolist(), bits)) for row in codes])


def packed_layer(
    codes: Tensor, scale: Tensor, zeros: Tensor | None = None, *, bits: int, pad: bool = False
) -> dict[str, Tensor]:
    """Stored tensors of one pack-quantized layer; codes (N, K), zeros (N, G) unsigned."""
    out = {
        "weight_packed": pack_rows(codes, bits, pad=pad),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if zeros is not None:
        out["weight_zero_point"] = pack_rows(zeros.t(), bits, pad=pad).t().contiguous()
    return out


def random_layer(n: int, k: int, g: int, bits: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Codes, bfloat16 scales and zeros with all values in use."""
    rng = torch.Generator().manual_seed(seed)
    top, groups = 1 << bits, k // g
    codes = torch.randint(0, top, (n, k), generator=rng, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, top - 1])
    zeros = torch.randint(0, top, (n, groups), generator=rng, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=rng) * 0.1 + 0.01).bfloat16()
    return codes, scale, zeros


def dense(codes: Tensor, scale: Tensor, zeros: Tensor | int, g: int) -> Tensor:
    """(c - z) * s in float32."""
    z = zeros.float().repeat_interleave(g, 1) if isinstance(zeros, Tensor) else zeros
    return (codes.float() - z) * scale.float().repeat_interleave(g, 1)


def args(bits: int = 4, group_size: int | None = 128, **keys: Any) -> dict[str, Any]:
    """Weight arguments as a writer spells them out."""
    strategy = {None: "tensor", -1: "channel"}.get(group_size, "group")
    return {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy,
        "group_size": None if strategy != "group" else group_size, "dynamic": False, **keys,
    }  # fmt: skip


def block(
    weights: Mapping[str, Any] | None = None, inputs: Any = None, **keys: Any
) -> dict[str, Any]:
    """A quantization_config with one group on Linear."""
    group = {"targets": ["Linear"], "weights": weights or args(), "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "version": "0.19.0", "format": "pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], **keys,
    }  # fmt: skip


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["compressed_tensors"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def ct() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        NAME=NAME, args=args, block=block, dense=dense, named=named, pack_rows=pack_rows,
        packed_layer=packed_layer, plan=plan_of, random_layer=random_layer,
        registry=lambda: _registry[0],
    )  # fmt: skip
