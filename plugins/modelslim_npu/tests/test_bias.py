"""Models whose layers have biases: the integer sum of a static layer holds them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core.engines.transformers import load_model
from quant_core.errors import CheckpointError

pytestmark = pytest.mark.shared
IDS = torch.arange(40)[None]


def _with_biases(source, target, biases):
    """A copy whose model has biases in its attention, and whose file holds those given."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | {"attention_bias": True}
    (target / "config.json").write_text(json.dumps(config))
    (target / "quant_model_weights.safetensors.index.json").unlink()
    [weights] = target.glob("quant_model_weights*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    rows = {n: t.shape[0] for n, t in tensors.items() if n.endswith("_proj.weight")}
    added = {
        f"{n.removesuffix('.weight')}.bias": torch.full((size,), biases)
        for n, size in rows.items()
        if "self_attn" in n and biases is not None
    }
    save_file(tensors | added, target / "model.safetensors")
    return target


def _logits(folder):
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("biases", [None, 0.5])
def test_float_bias_of_a_static_layer_is_optional_and_not_added(checkpoints, tmp_path, biases):
    source = checkpoints / "msmodelslim-w8a8"
    folder = _with_biases(source, tmp_path / "x", biases)
    assert torch.equal(_logits(folder), _logits(source))


def test_bias_of_a_run_time_layer_is_required_and_added(checkpoints, tmp_path):
    source = checkpoints / "msmodelslim-w8a8-kvc8"
    with pytest.raises(CheckpointError, match=r"q_proj\.bias") as err:
        _logits(_with_biases(source, tmp_path / "none", None))
    assert err.value.code == "Q-TENSOR-MISSING"
    assert not torch.allclose(
        _logits(_with_biases(source, tmp_path / "some", 0.5)), _logits(source), atol=0.1, rtol=0
    )
