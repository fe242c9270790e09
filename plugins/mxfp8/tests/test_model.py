"""A trained model written in MXFP8 by the independent writer: logits, a control, saving.

No producer's own checkpoint was at hand. The reference is the float model with weights and
activations rounded by numpy.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.nn import QuantLinear

pytestmark = pytest.mark.shared
BASE = "base/tiny-llama"


@pytest.fixture
def made(mx, shared, tmp_path):
    """The base model's folder, quantized."""
    source = open_checkpoint(shared / BASE)
    tensors = {}
    for name in source.tensors:
        value = source.read(name)
        if name.endswith("_proj.weight"):
            tensors |= mx.named(mx.stored(value), name.removesuffix(".weight"))
        else:
            tensors[name] = value
    model = json.loads((shared / BASE / "config.json").read_text())
    mx.save(tmp_path, tensors, mx.CONFIG, **model)
    return tmp_path


class _Reference(nn.Module):
    def __init__(self, mx, weight: torch.Tensor) -> None:
        super().__init__()
        self.rounded, self.kept = mx.rounded, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.rounded(x), self.kept)


def _reference(mx, shared):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shared / BASE, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            weight = mx.read(*mx.write(module.weight.detach()))
            model.set_submodule(name, _Reference(mx, weight))
    return model


def _mean_distance(model, reference, ids):
    with torch.inference_mode():
        return (model(ids).logits - reference(ids).logits).abs().mean().item()


def test_logits_equal_the_reference_and_miss_it_without_rounded_activations(mx, shared, made):
    ids = torch.randint(32, 127, (1, 48), generator=torch.Generator().manual_seed(0))
    reference = _reference(mx, shared)
    model = load_model(made, dtype=torch.float32)
    # last bits of sums that flip a rounding, at most
    assert _mean_distance(model, reference, ids) < 2e-3
    model = load_model(made, dtype=torch.float32, kernels="torch_ref")  # rounds by its own spec
    for module in model.modules():
        if isinstance(module, QuantLinear):
            operands = tuple(o for o in module.op.operands if o[0] != "input")
            module.op = replace(module.op, operands=operands)
            module._bind()
    assert _mean_distance(model, reference, ids) > 2e-2


def test_saving_gives_the_stored_bytes_back(made, tmp_path):
    target = tmp_path / "saved"
    load_model(made, dtype=torch.bfloat16).save_pretrained(target)
    old, new = open_checkpoint(made), open_checkpoint(target)
    assert set(old.tensors) == set(new.tensors)
    for name in old.tensors:
        a, b = old.read(name), new.read(name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert new.config["quantization_config"]["quant_method"] == "mxfp8"
