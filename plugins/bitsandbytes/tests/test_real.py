"""Checkpoints made by bitsandbytes 0.50.2: logits within the bound of their reference, which
multiplies the dequantized weights with float32 activations. Weights and bytes are checked with all
other checkpoints in tests/."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from producers import within
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.load import load_tensor
from quant_core.plan import plan

pytestmark = pytest.mark.shared

# Published table of the normal float type: Dettmers et al. 2023, QLoRA, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("name", ["bnb-nf4-dq", "bnb-int8"])
def test_logits_are_within_the_bound(checkpoints, name):
    folder = checkpoints / name
    assert within(load_model(folder, dtype=torch.float32), folder)
    assert plan(open_checkpoint(folder)).warnings == []


def test_stored_table_is_the_published_one(checkpoints):
    (lt,) = load_tensor(checkpoints / "bnb-nf4-dq", "model.layers.0.mlp.up_proj").matrices
    assert torch.equal(lt.weight.codebook[0], torch.tensor(NF4))


def test_nested_scales_without_their_mean_miss_the_weights(checkpoints):
    folder, module = checkpoints / "bnb-nf4-dq", "model.layers.0.self_attn.q_proj"
    (lt,) = load_tensor(folder, module).matrices
    made = open_checkpoint(folder / "expected.safetensors")
    key = next(n for n in made.tensors if n.startswith(f"weight.{module}"))
    want = made.read(key)
    assert torch.equal(lt.dequantize()[: len(want)], want)
    scales = (torch.zeros(1, 1), *lt.weight.scales[1:])
    wrong = replace(lt.weight, scales=scales).dequantize()[: len(want)]
    assert (wrong - want).abs().max() > 0.05


@pytest.mark.parametrize("name", ["bnb-nf4-dq", "bnb-int8"])
def test_saved_model_has_the_same_bytes(checkpoints, tmp_path, name):
    source = open_checkpoint(checkpoints / name)
    load_model(checkpoints / name, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    planned = plan(source)
    for member in planned.quantized.values():
        for leaf in source.modules[member.layer.stored]:
            stored = f"{member.layer.stored}.{leaf}"
            assert torch.equal(saved.read(stored), source.read(stored)), stored
    assert plan(saved).quantized.keys() == planned.quantized.keys()
