"""Stored layers of every algorithm, made from the format's description, and checkpoints on disk."""

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
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
N, K = 16, 256


def _fp8(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng).to(torch.float8_e4m3fn)


def _positive(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng) * 0.1 + 0.01


def _bytes(shape: tuple[int, ...], rng: torch.Generator, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, shape, generator=rng, dtype=torch.uint8)


def stored_layer(algo: str, n: int = N, k: int = K, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of one layer as the format's page draws them; no bias, no ``pre_quant_scale``."""
    rng = torch.Generator().manual_seed(seed)
    one = _positive((), rng)
    if algo == "FP8":
        return {"weight": _fp8((n, k), rng), "weight_scale": one, "input_scale": one / 2}
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return {"weight": _fp8((n, k), rng), "weight_scale": _positive((n,), rng)}
    if algo == "FP8_PB_WO":
        grid = (-(-n // 128), 1, -(-k // 128), 1)
        return {"weight": _fp8((n, k), rng), "weight_scale": _positive(grid, rng)}
    if algo == "MXFP8":
        scale = _bytes((n, k // 32), rng, 118, 128)
        return {"weight": _fp8((n, k), rng), "weight_scale": scale}
    if algo == "W4A8_MXFP4_FP8":
        scale = _bytes((n, k // 32), rng, 118, 128)
        return {"weight": _bytes((n, k // 2), rng), "weight_scale": scale, "input_scale": one}
    if algo in ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8"):
        out = {
            "weight": _bytes((n, k // 2), rng),
            "weight_scale": _positive((n, k // 16), rng).mul(100).to(torch.float8_e4m3fn),
            "weight_scale_2": one / 100,
        }
        return out if algo == "W4A16_NVFP4" else out | {"input_scale": one / 50}
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        out = {"weight": _bytes((n // 2, k), rng), "weight_scale": _positive((n, k // 128), rng)}
        return out if algo == "W4A16_AWQ" else out | {"weight_scale_2": one, "input_scale": one}
    codes = torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8)
    out = {"weight": codes, "weight_scale": _positive((n,), rng)}
    return out if algo == "W8A16" else out | {"input_scale": one}


def dense(algo: str, t: Mapping[str, Tensor]) -> Tensor:
    """What the layer means, one weight at a time where codes share bytes."""
    w, s = t["weight"], t["weight_scale"]
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        rows = []
        for pair in w.tolist():
            for shift in (0, 4):
                codes = [(byte >> shift) & 15 for byte in pair]
                rows.append([c - 16 if c > 7 else c for c in codes])
        return torch.tensor(rows).float() * s.repeat_interleave(128, 1)
    if w.dtype == torch.uint8:
        rows = [[FP4[c] for byte in row for c in (byte & 15, byte >> 4)] for row in w.tolist()]
        values = torch.tensor(rows)
        if s.dtype == torch.uint8:
            return values * torch.exp2(s.float() - 127).repeat_interleave(32, 1)
        return values * (s.float() * t["weight_scale_2"]).repeat_interleave(16, 1)
    values = w.float()
    if s.dtype == torch.uint8:
        return values * torch.exp2(s.float() - 127).repeat_interleave(32, 1)
    if s.dim() == 4:
        grid = s[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values * grid[: w.shape[0], : w.shape[1]]
    return values * (s[:, None] if s.dim() else s)


def block(algo: str = "NVFP4", **keys: Any) -> dict[str, Any]:
    """quantization_config of config.json."""
    return {
        "quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"}, **keys,
    }  # fmt: skip


def side(algo: str = "NVFP4", **keys: Any) -> dict[str, Any]:
    """hf_quant_config.json."""
    inner = {"quant_algo": algo, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner | keys}


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["nvfp4"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def mo() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        NAME=NAME, N=N, K=K, block=block, dense=dense, named=named, plan=plan_of, side=side,
        stored=stored_layer,
    )  # fmt: skip


@pytest.fixture
def write(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write(tensors, config, hf)``: ``hf`` goes to hf_quant_config.json."""

    def make(tensors: Mapping[str, Tensor], config: Any = None, hf: Any = None) -> Any:
        return write(tensors, config, files={} if hf is None else {"hf_quant_config.json": hf})

    return make
