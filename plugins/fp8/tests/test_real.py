"""Checkpoints written by transformers 5.23.0: negative controls, saving, the config."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from quant_core import load_model
from quant_core.checkpoint.open import open_checkpoint
from quant_core.load import load_tensor, read_matrix
from quant_core.plan import plan
from quant_plugin_fp8.writer import config_for

pytestmark = pytest.mark.shared
NAMES = ("hf-fp8-block128", "hf-fp8-block128-moe")


@pytest.fixture(params=NAMES)
def folder(request, checkpoints):
    return checkpoints / request.param


def test_plan_has_no_warning_and_the_config_says_the_same(folder):
    planned = plan(open_checkpoint(folder))
    assert planned.warnings == []
    theirs = planned.checkpoint.config["quantization_config"]
    ours = config_for(planned)
    for key in ("quant_method", "activation_scheme"):
        assert ours[key] == theirs[key]
    assert ours["weight_block_size"] == list(theirs["weight_block_size"])
    assert "lm_head" in ours["modules_to_not_convert"]


def test_dividing_by_the_scale_misses_the_weights(folder):
    planned = plan(open_checkpoint(folder))
    want = load_file(folder / "expected.safetensors")
    key = next(k for k in want if "self_attn.v_proj" in k)
    name, rows = key.removeprefix("weight.").split("#")
    lt = read_matrix(planned, planned.quantized[name])
    assert torch.equal(lt.dequantize()[: int(rows)], want[key])
    lt.weight.scales = (1 / lt.weight.scales[0],)
    assert not torch.allclose(lt.dequantize()[: int(rows)], want[key], rtol=0.5, atol=0)


def test_gate_and_up_have_their_own_halves_of_the_stacked_scales(checkpoints):
    planned = plan(open_checkpoint(checkpoints / NAMES[1]))
    stored = planned.checkpoint.read("model.layers.0.mlp.experts.gate_up_proj_scale_inv")
    for half, leaf in enumerate(("gate_proj", "up_proj")):
        loaded = load_tensor(planned, f"model.layers.0.mlp.experts.{leaf}")
        got = torch.stack([lt.weight.scales[0] for lt in loaded.matrices])
        rows = stored.shape[1] // 2
        assert torch.equal(got, stored[:, half * rows : (half + 1) * rows])
    assert not torch.equal(stored[:, 0], stored[:, 1])


def test_saved_model_has_the_same_bytes(folder, tmp_path):
    load_model(folder, dtype=torch.float32).save_pretrained(tmp_path)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path)
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        a, b = before.read(name), after.read(name)
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    assert plan(after).warnings == []
