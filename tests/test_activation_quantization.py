"""Logits of checkpoints with quantized activations, against the producers' own.

A last-bit difference can move an activation to the neighbouring code, so of ``bound`` in each
expected.json the mean, the agreeing positions and the best tokens count; ``max`` is a sanity limit.
Every set has a negative control: the same load without activation quantization must fail.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_sets import checkpoint_dirs
from quant_core import load_model
from quant_core.nn import QuantModule

DIRS = checkpoint_dirs(("hf-fp8-",))


def _broken_limits(folder: Path) -> list[str]:
    """Limits of ``bound`` that the reference kernels miss."""
    model = load_model(folder, dtype=torch.float32, kernels="torch_ref")
    quantized = [m for m in model.modules() if isinstance(m, QuantModule)]
    assert any(m.op.operand("input") is not None for m in quantized)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        got = model(expected["input_ids"][None], use_cache=False).logits[0]
    want = expected["logits"]
    bound = json.loads((folder / "expected.json").read_text())["bound"]
    diff, within = (got - want).abs(), bound["positions"]
    near = int((diff.amax(-1) <= within["within"]).sum())
    limits = {
        "max": diff.max() <= bound["max"],
        "mean": diff.mean() <= bound["mean"],
        "top1": int((got.argmax(-1) == want.argmax(-1)).sum()) >= bound["top1"],
        "positions": near >= within["at_least"],
    }
    return [name for name, kept in limits.items() if not kept]


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_are_within_the_producers_bound(folder):
    assert _broken_limits(folder) == []


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_without_activation_quantization_are_not(folder, monkeypatch):
    from quant_core.kernels import reference

    monkeypatch.setattr(reference, "fake_quantize", lambda x, *_: x)
    assert {"mean", "positions"} & set(_broken_limits(folder))
