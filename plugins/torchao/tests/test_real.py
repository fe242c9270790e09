"""Checkpoints made by torchao 0.18.0: logits within the bound of their reference. Weights and bytes
are checked with all other checkpoints in tests/."""

from __future__ import annotations

import json

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.plan import plan

pytestmark = pytest.mark.shared


def _logits(model, ids):
    with torch.inference_mode():
        return model(ids.view(1, -1)).logits[0]


@pytest.mark.parametrize("name", ["torchao-int8wo", "torchao-intx4-g32"])
def test_logits_are_within_the_bound(checkpoints, name):
    folder = checkpoints / name
    bound = json.loads((folder / "expected.json").read_text())["bound"]
    expected = open_checkpoint(folder / "expected.safetensors")
    want = expected.read("logits")
    got = _logits(load_model(folder, dtype=torch.float32), expected.read("input_ids"))
    d = (got - want).abs()
    assert d.max() <= bound["max"]
    assert d.mean() <= bound["mean"]
    assert (got.argmax(-1) == want.argmax(-1)).sum() >= bound["top1"]
    assert plan(open_checkpoint(folder)).warnings == []


def test_saved_model_keeps_the_header_and_loads_equal(checkpoints, tmp_path):
    folder = checkpoints / "torchao-intx4-g32"
    ids = open_checkpoint(folder / "expected.safetensors").read("input_ids")
    model = load_model(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(_logits(again, ids), _logits(model, ids))
    kept = open_checkpoint(tmp_path / "saved").metadata
    name = "model.layers.0.mlp.up_proj.weight"
    assert kept[name] == open_checkpoint(folder).metadata[name]
