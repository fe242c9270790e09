"""Layers made one weight at a time, and small checkpoints on disk."""

from __future__ import annotations

import json
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
FOUR = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
}  # fmt: skip
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}


def four_bit(
    n: int, k: int, *, block: int = 64, nested: int = 0, kind: str = "nf4", seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of one layer and its float32 weight, each computed weight by weight."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n * k,), generator=rng).tolist()
    table = torch.sort(torch.rand(16, generator=rng) * 2 - 1).values
    count = -(-n * k // block)
    padded = [*codes, 0] if len(codes) % 2 else codes
    packed = [hi << 4 | lo for hi, lo in zip(padded[::2], padded[1::2])]
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    out = {
        "weight": torch.tensor(packed, dtype=torch.uint8).view(-1, 1),
        "weight.quant_map": table,
    }
    if nested:
        offset = float(torch.tensor((0.1, 0.125, 0.3)[seed % 3]))
        absmax = torch.randint(0, 256, (count,), generator=rng, dtype=torch.uint8)
        second = torch.rand(-(-count // nested), generator=rng)
        map8 = torch.sort(torch.rand(256, generator=rng) * 2 - 1).values
        scales = [
            map8[int(a)] * second[b // nested] + torch.tensor(offset) for b, a in enumerate(absmax)
        ]
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        out |= {
            "weight.absmax": absmax,
            "weight.nested_absmax": second,
            "weight.nested_quant_map": map8,
        }
    else:
        out["weight.absmax"] = torch.rand(count, generator=rng) + 0.01
        scales = list(out["weight.absmax"])
    text = json.dumps(state).encode()
    out[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    weight = torch.stack([table[c] * scales[i // block] for i, c in enumerate(codes)]).view(n, k)
    return out, weight


def int8(n: int, k: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
    scb = torch.rand(n, generator=rng) + 0.1
    stored = {"weight": codes, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return stored, (codes.double() * scb.double()[:, None] / 127).float()


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["bitsandbytes"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def bnb() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        NAME=NAME, FOUR=FOUR, EIGHT=EIGHT, four_bit=four_bit, int8=int8, named=named, plan=plan_of
    )
