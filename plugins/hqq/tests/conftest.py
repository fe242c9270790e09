"""Layers made one code at a time, and small checkpoints on disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)
NAME = "model.layers.0.mlp.up_proj"
PARTS = {8: (1, "8bit_u8"), 6: (1, "8bit_u8"), 5: (1, "8bit_u8"), 4: (2, "4bit_u8"),
         3: (10, "3bit_32"), 2: (4, "2bit_u8"), 1: (8, "1bit_u8")}  # fmt: skip


def words_of(codes: list[int], bits: int, group: int) -> Tensor:
    """Rows of groups cut into parts; one word takes one code of every part, first part on top."""
    parts, packing = PARTS[bits]
    rows = len(codes) // group
    height = -(-rows // parts)
    width = 8 if parts == 1 else bits
    out = [[0] * group for _ in range(height)]
    for r in range(rows):
        part, row = divmod(r, height)
        for j in range(group):
            out[row][j] |= codes[r * group + j] << (width * (parts - 1 - part))
    return torch.tensor(out, dtype=torch.int32 if packing.endswith("32") else torch.uint8)


def _text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def layer(
    n: int, k: int, *, bits: int = 4, group: int = 64, dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """Stored tensors of one layer and its float32 weight, each computed weight by weight."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n * k,), generator=rng).tolist()
    rows = n * k // group
    scale = (torch.rand(rows, 1, generator=rng) * 0.1 + 0.01).to(dtype)
    zero = (torch.rand(rows, 1, generator=rng) * ((1 << bits) - 1)).to(dtype)
    number = lambda value: torch.tensor(value, dtype=torch.int32)  # noqa: E731
    flag = lambda value: torch.tensor(value, dtype=torch.uint8)  # noqa: E731
    stored = {
        "W_q": words_of(codes, bits, group), "scale": scale, "zero": zero,
        "nbits": number(bits), "group_size": number(group), "axis": number(1),
        "shape": torch.tensor([n, k]), "packing": _text(PARTS[bits][1]),
        "unpack_view_dtype": _text("torch.uint8"), "compute_dtype": _text(str(dtype)),
        "quant_scale": flag(0), "quant_zero": flag(0), "view_as_float": flag(0),
        "channel_wise": flag(1), "round_zero": flag(0), "optimize": flag(1),
        "offload_meta": flag(0), "stores_quant_config": flag(1), "encoded_state_dict": flag(1),
    }  # fmt: skip
    s, z = scale.float().view(-1), zero.float().view(-1)
    weight = torch.stack([(c - z[i // group]) * s[i // group] for i, c in enumerate(codes)])
    return stored, weight.view(n, k)


def block(bits: int = 4, group: int = 64, **keys: Any) -> dict[str, Any]:
    """A quantization_config."""
    params = {"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True,
              "optimize": True, "round_zero": False, "view_as_float": False}  # fmt: skip
    return {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": params, "scale_quant_params": None,
            "zero_quant_params": None, "offload_meta": False,
        },
        "skip_modules": ["lm_head"], **keys,
    }  # fmt: skip


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["hqq"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def hqq() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(NAME=NAME, layer=layer, block=block, named=named, plan=plan_of)
