"""Small checkpoints of experts, packed one value at a time."""

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

PATH = "model.layers.0.mlp.experts"
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES += [-v for v in VALUES]


def pack(codes: Tensor) -> Tensor:
    """Codes [E, N, K] to blocks [E, N, K/32, 16]; the first of two codes in the low nibble."""
    e, n, k = codes.shape
    out = torch.zeros(e, n, k // 32, 16, dtype=torch.uint8)
    for b in range(k // 32):
        for j in range(16):
            low, high = codes[:, :, 32 * b + 2 * j], codes[:, :, 32 * b + 2 * j + 1]
            out[:, :, b, j] = (low + 16 * high).to(torch.uint8)
    return out


def stack(e: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales, and the dense weights [E, N, K] that they stand for."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (e, n, k), generator=rng)
    scales = torch.randint(118, 124, (e, n, k // 32), generator=rng, dtype=torch.uint8)
    factor = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)
    return pack(codes), scales, torch.tensor(VALUES)[codes] * factor


def experts(e: int = 3, hidden: int = 64, inner: int = 32, bias: bool = True) -> Any:
    """One layer: stored tensors, and dense gate, up, down."""
    up_blocks, up_scales, both = stack(e, 2 * inner, hidden, 0)
    down_blocks, down_scales, down = stack(e, hidden, inner, 1)
    stored = {
        "gate_up_proj_blocks": up_blocks,
        "gate_up_proj_scales": up_scales,
        "down_proj_blocks": down_blocks,
        "down_proj_scales": down_scales,
    }
    if bias:
        stored["gate_up_proj_bias"] = torch.randn(e, 2 * inner).bfloat16()
        stored["down_proj_bias"] = torch.randn(e, hidden).bfloat16()
    dense = {"gate": both[:, ::2], "up": both[:, 1::2], "down": down}
    return SimpleNamespace(stored=stored, dense=dense)


def named(stored: Mapping[str, Tensor], path: str = PATH) -> dict[str, Tensor]:
    return {f"{path}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["mxfp4"]))
    return plan(checkpoint, registry=_registry[0])


CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


@pytest.fixture(scope="session")
def mx() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        CONFIG=CONFIG, PATH=PATH, experts=experts, named=named, plan=plan_of, stack=stack
    )


@pytest.fixture
def write(write: Callable[..., Any]) -> Callable[..., Any]:
    """A gpt-oss checkpoint of these tensors."""

    def make(tensors: Mapping[str, Tensor], config: Any = CONFIG) -> Any:
        return write(tensors, config, model_type="gpt_oss")

    return make
