"""A gpt-oss checkpoint that transformers 5.23.0 dequantizes: logits, controls, saving."""

from __future__ import annotations

import json

import pytest
import torch

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.nn import ClampedSwiglu, QuantExperts

pytestmark = pytest.mark.shared
NAME = "hf-gptoss-mxfp4"


@pytest.fixture
def folder(shared):
    return shared / NAME


def _within(model, folder):
    tensors = open_checkpoint(folder / "expected.safetensors")
    ids, want = tensors.read("input_ids"), tensors.read("logits")
    bound = json.loads((folder / "expected.json").read_text())["bound"]
    with torch.inference_mode():
        got = model(ids.view(1, -1)).logits[0]
    d = (got - want).abs()
    same = int((got.argmax(-1) == want.argmax(-1)).sum())
    return d.max() <= bound["max"] and d.mean() <= bound["mean"] and same >= bound["top1"]


@pytest.fixture
def model(folder):
    return load_model(folder, dtype=torch.float32)


def test_logits_are_within_the_bound(model, folder):
    assert _within(model, folder)


def _experts(model):
    return [m for m in model.modules() if isinstance(m, QuantExperts)]


def test_logits_miss_the_bound_with_gate_and_up_exchanged(model, folder):
    assert len(_experts(model)) == 2
    for module in _experts(model):
        module.gate, module.up = module.up, module.gate
    assert not _within(model, folder)


@pytest.mark.parametrize("change", ["limit", "alpha", "plain"])
def test_logits_miss_the_bound_with_another_gating(model, folder, change):
    for module in _experts(model):
        assert isinstance(module.gating, ClampedSwiglu)
        if change == "limit":
            module.gating.limit = 0.01
        elif change == "alpha":
            module.gating.alpha = 1.0
        else:
            module.gating, module.activation = None, torch.nn.functional.silu
    assert not _within(model, folder)


def test_logits_miss_the_bound_without_the_bias_of_experts(model, folder):
    for module in _experts(model):
        module.down.bias.zero_()
    assert not _within(model, folder)


def test_saving_gives_the_stored_bytes_back(folder, tmp_path):
    load_model(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    old, new = open_checkpoint(folder / "model.safetensors"), open_checkpoint(tmp_path)
    assert set(old.tensors) == set(new.tensors)
    for name in old.tensors:
        a, b = old.read(name), new.read(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    old_config = open_checkpoint(folder / "model.safetensors").config["quantization_config"]
    assert new.config["quantization_config"] == old_config
