"""Stored layers made one number at a time, and small checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)

NAME = "model.layers.0.mlp.up_proj"
N, K = 6, 64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(low: int, high: int, n: int = N, k: int = K, seed: int = 0) -> Tensor:
    """int8 values that use the whole range."""
    out = torch.randint(low, high + 1, (n, k), generator=rng(seed), dtype=torch.int8)
    out[0, :2] = torch.tensor([low, high], dtype=torch.int8)
    return out


def scale(n: int = N, g: int = 1, seed: int = 1) -> Tensor:
    return torch.rand(n, g, generator=rng(seed)) * 0.05 + 0.01


def row_pairs(w: Tensor) -> Tensor:
    """Two rows a byte, one byte at a time: even row low, two's complement."""
    rows = w.tolist()
    packed = [
        [(a & 15) | ((b & 15) << 4) for a, b in zip(rows[i], rows[i + 1])]
        for i in range(0, len(rows), 2)
    ]
    return torch.tensor(packed, dtype=torch.uint8).view(torch.int8)


def layer(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Stored tensors of one layer of a type, N x K."""
    zeros = {"weight_offset": torch.zeros(N, 1)}
    plain = {"weight": values(-128, 127, seed=seed), "weight_scale": scale(), **zeros}
    four = values(-8, 7, seed=seed)
    blocks = torch.randint(110, 130, (N, K // 32), generator=rng(3), dtype=torch.uint8)
    fp8 = torch.randn(N, K, generator=rng(seed)).to(torch.float8_e4m3fn)
    fp4 = torch.randint(0, 256, (N, K // 2), generator=rng(seed), dtype=torch.uint8)
    static = {
        "quant_bias": torch.randint(-9999, 9999, (N,), generator=rng(4), dtype=torch.int32),
        "input_scale": torch.tensor([0.0625]),
        "input_offset": torch.tensor([-33.0]),
        "deq_scale": scale()[:, 0] * 0.0625,
    }
    match kind:
        case "W8A8":
            return {"weight": plain["weight"], **static}
        case "W8A8_DYNAMIC" | "W8A16":
            return plain
        case "W8A8_MIX":
            return plain | static
        case "W4A8_DYNAMIC":
            total = 8 * (four.float() * scale()).sum(1, keepdim=True)
            return {"weight": row_pairs(four), "weight_scale": scale(), **zeros,
                    "scale_bias": total}  # fmt: skip
        case "W4A4_DYNAMIC":
            return {"weight": four, "weight_scale": scale(), **zeros}
        case "W4A4_FLATQUANT_DYNAMIC":
            return {"weight": four, "weight_scale": scale(), **zeros,
                    "left_trans": torch.randn(4, 4, generator=rng(6)),
                    "right_trans": torch.randn(16, 16, generator=rng(7)),
                    "clip_ratio": torch.tensor([0.875])}  # fmt: skip
        case "W4A16":
            codes = (four + 8).tolist()
            words = [[sum(c << 4 * i for i, c in enumerate(row[j : j + 8]))
                      for j in range(0, K, 8)] for row in codes]  # fmt: skip
            packed = torch.tensor(words).to(torch.int32)
            return {"weight_packed": packed, "weight_scale": scale(g=2).bfloat16(),
                    "weight_shape": torch.tensor([N, K])}  # fmt: skip
        case "WFP8AFP8_DYNAMIC":
            return {"weight": fp8, "weight_scale": scale(), **zeros}
        case "W8A8_MXFP8":
            return {"weight": fp8, "weight_scale": blocks}
        case _:
            return {"weight": fp4, "weight_scale": blocks}


def described(tensors: Mapping[str, Tensor], kind: str, module: str = NAME) -> dict[str, str]:
    """Entries of a description."""
    return {f"{module}.{leaf}": "FLOAT" if leaf == "bias" else kind for leaf in tensors}


def named(tensors: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in tensors.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["modelslim_npu"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def ms() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        K=K, N=N, NAME=NAME, described=described, layer=layer, named=named, plan=plan_of,
        row_pairs=row_pairs, scale=scale, values=values,
    )  # fmt: skip


@pytest.fixture
def write(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write(tensors, description)``: the description that stands beside the weights."""

    def make(
        tensors: Mapping[str, Tensor],
        description: Mapping[str, Any] | None,
        file: str = "quant_model_description.json",
        **keys: Any,
    ) -> Any:
        whole = {"version": "1.0.0", "model_quant_type": "W8A8", "group_size": 0,
                 "metadata": {}, "optional": {}, **(description or {}), **keys}  # fmt: skip
        return write(tensors, files={} if description is None else {file: whole})

    return make
