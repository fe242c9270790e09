"""A checkpoint made by hqq 0.2.8.post1: logits within the bound of its reference. Weights and bytes
are checked with all other checkpoints in tests/."""

from __future__ import annotations

import json

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.plan import plan

pytestmark = pytest.mark.shared


def test_logits_are_within_the_bound(checkpoints):
    folder = checkpoints / "hqq-4bit-g64"
    bound = json.loads((folder / "expected.json").read_text())["bound"]
    expected = open_checkpoint(folder / "expected.safetensors")
    want = expected.read("logits")
    model = load_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        got = model(expected.read("input_ids").view(1, -1)).logits[0]
    d = (got - want).abs()
    assert d.max() <= bound["max"]
    assert d.mean() <= bound["mean"]
    assert (got.argmax(-1) == want.argmax(-1)).sum() >= bound["top1"]
    assert plan(open_checkpoint(folder)).warnings == []


def test_saved_model_has_the_same_bytes(checkpoints, tmp_path):
    source = open_checkpoint(checkpoints / "hqq-4bit-g64")
    load_model(source.folder, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    planned = plan(source)
    for member in planned.quantized.values():
        for leaf in source.modules[member.layer.stored]:
            stored = f"{member.layer.stored}.{leaf}"
            assert torch.equal(saved.read(stored), source.read(stored)), stored
    assert plan(saved).quantized.keys() == planned.quantized.keys()
