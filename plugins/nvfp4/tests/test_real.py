"""Checkpoints made by ModelOpt 0.47.0: logits within the bound of their reference. Their weights
and bytes are checked with all other checkpoints in tests/."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from producers import distances, expected, missed, within
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.load import load_tensor
from quant_core.nn import QuantModule
from quant_core.plan import plan

pytestmark = pytest.mark.shared
WEIGHT_ONLY = ("modelopt-fp8-pb-wo", "modelopt-int4-awq", "modelopt-w4a16-nvfp4")
ACTIVATIONS = (
    "modelopt-deepseek-nvfp4-experts", "modelopt-fp8-kvfp8", "modelopt-fp8-pc-pt",
    "modelopt-mixed-fp8-nvfp4", "modelopt-moe-fp8", "modelopt-moe-nvfp4", "modelopt-mxfp8",
    "modelopt-nvfp4", "modelopt-nvfp4-awq-lite", "modelopt-nvfp4-kvnvfp4", "modelopt-w4a8-awq",
)  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_ONLY + ACTIVATIONS)
def test_logits_are_within_the_bound(checkpoints, name):
    want = expected(checkpoints / name)
    assert want.meta["activation_quant"] is (name in ACTIVATIONS)
    model = load_model(checkpoints / name, dtype=torch.float32)
    found = distances(model, want)
    assert missed(found, want) == [], found


def _changed(model, change):
    """``model`` with every operation replaced by ``change`` of it, and bound again."""
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.op = change(module.op)
            module._bind()
    return model


def _float_inputs(op):
    return replace(op, operands=tuple(o for o in op.operands if o[0] != "input"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_logits_miss_the_bound_without_activation_quantization(checkpoints, name):
    want = expected(checkpoints / name)
    model = load_model(checkpoints / name, dtype=torch.float32, kernels="torch_ref")
    model = _changed(model, _float_inputs)
    found = distances(model, want)
    assert missed(found, want)
    # as far off as the producer measured, to the digits it gave
    assert found["mean"] == pytest.approx(want.meta["distance_without_act_quant"], rel=0.001)


@pytest.mark.parametrize(
    "name", ["modelopt-int4-awq", "modelopt-w4a8-awq", "modelopt-nvfp4-awq-lite"]
)
def test_logits_miss_the_bound_without_pre_quant_scale(checkpoints, name):
    want = expected(checkpoints / name)
    model = load_model(checkpoints / name, dtype=torch.float32)
    count = 0
    for module in model.modules():
        for buffer, value in module.named_buffers(recurse=False):
            if buffer.startswith("transform_"):
                value.fill_(1)
                count += 1
    assert count >= 2
    assert not within(model, want)


def test_swapped_halves_of_a_byte_miss_the_weights(checkpoints):
    folder = checkpoints / "modelopt-w4a16-nvfp4"
    planned = plan(open_checkpoint(folder))
    made = open_checkpoint(folder / "expected.safetensors")
    key = next(k for k in made.tensors if k.startswith("weight."))
    want = made.read(key)
    (lt,) = load_tensor(planned, key.removeprefix("weight.").partition("#")[0]).matrices
    assert torch.equal(lt.dequantize()[: want.shape[0]], want)
    codes = lt.weight.codes
    lt.weight.codes = (codes << 4) | (codes >> 4)
    assert not torch.allclose(lt.dequantize()[: want.shape[0]], want, rtol=0.5, atol=0)


def test_scales_of_the_cache_are_kept_when_saving(checkpoints, tmp_path):
    folder = checkpoints / "modelopt-nvfp4-kvnvfp4"
    planned = plan(open_checkpoint(folder))
    assert planned.warnings == ["KV-cache scales present, not applied (2 attention modules)"]
    assert len(planned.ledger.skipped) == 4
    load_model(folder, dtype=torch.float32).save_pretrained(tmp_path)
    old, new = open_checkpoint(folder), open_checkpoint(tmp_path)
    assert old.tensors.keys() == new.tensors.keys()
    for name in old.tensors:
        a, b = old.read(name), new.read(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), name
    assert plan(new).match.config.kv == "NVFP4"


def test_scales_of_an_fp8_cache_are_applied_on_demand(checkpoints, caplog):
    folder = checkpoints / "modelopt-fp8-kvfp8"
    want = expected(folder)
    assert not plan(open_checkpoint(folder)).warnings
    plain = load_model(folder, dtype=torch.float32)
    assert "kv_cache='checkpoint'" in caplog.text
    assert within(plain, want)
    rounded = load_model(folder, dtype=torch.float32, kv_cache="checkpoint")
    assert not within(rounded, want)
    # the producer's model before export, with its cache quantizers on (and other input scales)
    made = open_checkpoint(folder / "expected.safetensors")
    memory = want._replace(logits=made.read("logits_fakequant_f32"))
    before, after = (distances(m, memory)["mean"] for m in (plain, rounded))
    assert after < 0.9 * before


@pytest.mark.parametrize("name", ["modelopt-w4a8-awq", "modelopt-mixed-fp8-nvfp4"])
def test_either_config_file_alone_is_enough(checkpoints, tmp_path, name):
    schemes = []
    for drop in ("hf_quant_config.json", "quantization_config"):
        folder = tmp_path / drop.partition(".")[0]
        shutil.copytree(checkpoints / name, folder)
        if drop.endswith(".json"):
            (folder / drop).unlink()
        else:
            config = json.loads((folder / "config.json").read_text())
            del config[drop]
            (folder / "config.json").write_text(json.dumps(config))
        planned = plan(open_checkpoint(folder))
        schemes.append({n: m.scheme for n, m in planned.quantized.items()})
    assert schemes[0] == schemes[1]
    assert schemes[0]
    want = expected(checkpoints / name)
    model = load_model(tmp_path / "quantization_config", dtype=torch.float32)
    assert within(model, want)
