"""What a checkpoint's own producer computed, and how far a model of ours is from it.

A folder with ``expected.json`` also has ``expected.safetensors``: input ids, the producer's logits
and rows of its weights. ``bound`` in the JSON says how far logits may be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quant_core.checkpoint.open import open_checkpoint

__all__ = ["Expected", "distances", "expected", "missed", "within"]


class Expected(NamedTuple):
    """Input ids int64 [positions], logits float32 [positions, vocabulary], ``expected.json``."""

    ids: torch.Tensor
    logits: torch.Tensor
    meta: dict[str, Any]


def expected(folder: Path) -> Expected:
    """What the producer of the checkpoint in ``folder`` computed."""
    tensors = open_checkpoint(folder / "expected.safetensors")
    meta = json.loads((folder / "expected.json").read_text())
    return Expected(tensors.read("input_ids"), tensors.read("logits"), meta)


def distances(model: torch.nn.Module, want: Expected) -> dict[str, float]:
    """How far the model's logits are from ``want``, in the terms of its bound."""
    with torch.inference_mode():
        got = model(want.ids.view(1, -1)).logits[0]
    d = (got - want.logits).abs()
    near = want.meta["bound"].get("positions", {}).get("within", 0)
    return {
        "max": d.max().item(),
        "mean": d.mean().item(),
        "top1": int((got.argmax(-1) == want.logits.argmax(-1)).sum()),
        "positions": int((d.amax(dim=-1) <= near).sum()),
    }


def missed(found: Mapping[str, float], want: Expected) -> list[str]:
    """The limits of ``expected.json`` that ``found`` (see ``distances``) is outside of."""
    bound = want.meta["bound"]
    kept = {
        "max": found["max"] <= bound["max"],
        "mean": found["mean"] <= bound["mean"],
        "top1": found["top1"] >= bound["top1"],
        "positions": found["positions"] >= bound.get("positions", {}).get("at_least", 0),
    }
    return [limit for limit, inside in kept.items() if not inside]


def within(model: torch.nn.Module, want: Expected | Path) -> bool:
    """Whether the model's logits are inside the producer's bound; ``want`` may be its folder."""
    want = expected(want) if isinstance(want, Path) else want
    return not missed(distances(model, want), want)
