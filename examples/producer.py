"""Our numbers against a producer's own: dequantized weights and logits of a shipped checkpoint.

``expected.safetensors`` holds ``logits`` of the producer's weights in a float32 model and
``weight.<module>[#eE]#R``, the first R rows of such a weight (of expert E).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import quant_core
from quant_core.nn import QuantModule
from quant_core.plan import Plan

__all__ = ["compare"]


def _as_stored(plan: Plan, stored: str, weight: torch.Tensor) -> torch.Tensor:
    """Rows in the order of the file, where its writer permutes q and k (llama.cpp's rope order)."""
    config = plan.checkpoint.config
    if config.get("model_type") != "llama" or not stored.endswith(("attn_q", "attn_k")):
        return weight
    q = stored.endswith("attn_q")
    heads = config["num_attention_heads" if q else "num_key_value_heads"]
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _weight(plan: Plan, name: str, expert: int | None) -> torch.Tensor:
    if name.endswith(".experts.gate_up_proj"):  # one tensor, rows of gate and up in turn
        parts = (name.replace("gate_up", part) for part in ("gate", "up"))
        return torch.stack([_weight(plan, part, expert) for part in parts], dim=1).flatten(0, 1)
    by_stored = {m.layer.stored: public for public, m in plan.members.items()}
    public = name if name in plan.members else by_stored[name]
    weight = quant_core.load_tensor(plan, public, expert=expert).dequantize()
    return weight if public == name else _as_stored(plan, name, weight)


def _weights_error(plan: Plan, expected: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for key, want in expected.items():
        name, *marks = key.removeprefix("weight.").split("#")
        expert = next((int(m[1:]) for m in marks if m.startswith("e")), None)
        got = _weight(plan, name.removesuffix(".weight"), expert)[: want.shape[0]]
        worst = max(worst, float((got - want).abs().max()))
    return worst


def compare(folder: Path) -> dict[str, Any]:
    """One row of the table: what it is, how far our numbers are from the producer's."""
    plan = quant_core.plan(quant_core.open_checkpoint(folder))
    expected = quant_core.open_checkpoint(folder / "expected.safetensors")
    weights = {n: expected.read(n) for n in expected.tensors if n.startswith("weight.")}
    model = quant_core.load_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids = expected.read("input_ids").view(1, -1)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    kernels = {m.kernel.name for m in model.modules() if isinstance(m, QuantModule)}
    quantized = plan.quantized.values()
    bits = 8 * sum(plan.member_nbytes(m) for m in quantized)
    sizes = [(len(m.layer.experts) or 1) * m.scheme.shape[0] * m.scheme.shape[1] for m in quantized]
    assert plan.match is not None
    return {
        "format": plan.match.plugin,
        "schemes": sorted({m.scheme.name for m in quantized}),
        "bits_per_weight": bits / sum(sizes),
        "weight_error": _weights_error(plan, weights),
        "logit_error": float((logits - expected.read("logits")).abs().max()),
        "logit_bound": json.loads((folder / "expected.json").read_text("utf-8"))["bound"]["max"],
        "kernels": sorted(kernels),
    }
