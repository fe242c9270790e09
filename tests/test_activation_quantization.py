"""Logits of checkpoints with quantized activations, against the producers' own.

A last-bit difference can move an activation to the neighbouring code, so of ``bound`` in each
expected.json the mean, the agreeing positions and the best tokens count; ``max`` is a sanity limit.
Every set has a negative control: the same load without activation quantization must fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_sets import checkpoint_dirs
from producers import distances, expected, missed
from quant_core import load_model
from quant_core.nn import QuantModule

DIRS = checkpoint_dirs(("hf-fp8-",))


def _broken_limits(folder: Path) -> list[str]:
    """Limits of ``bound`` that the reference kernels miss."""
    model = load_model(folder, dtype=torch.float32, kernels="torch_ref")
    quantized = [m for m in model.modules() if isinstance(m, QuantModule)]
    assert any(m.op.operand("input") is not None for m in quantized)
    want = expected(folder)
    return missed(distances(model, want), want)


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_are_within_the_producers_bound(folder):
    assert _broken_limits(folder) == []


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_logits_without_activation_quantization_are_not(folder, monkeypatch):
    from quant_core.kernels import reference

    monkeypatch.setattr(reference, "fake_quantize", lambda x, *_: x)
    assert {"mean", "positions"} & set(_broken_limits(folder))
