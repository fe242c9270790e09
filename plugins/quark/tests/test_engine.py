"""Layers in a model: members keep scales of their own when fused, saving gives the file back."""

from __future__ import annotations

import pytest
import torch

from quant_core.build import Builder
from quant_core.checkpoint.open import open_checkpoint
from quant_core.engines.transformers import load_model
from quant_core.load import read_matrix
from quant_core.nn import QuantComposite, QuantLinear
from quant_core.plan import plan

pytestmark = pytest.mark.shared


def _parts(shared, name):
    planned = plan(open_checkpoint(shared / name))
    return planned, Builder(plan=planned, dtype=torch.float32)


def test_members_with_unequal_scales_fuse_without_a_change(shared):
    planned, builder = _parts(shared, "quark-int4-fp8-w4a8")
    members = [planned.members[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)]
    factors = {read_matrix(planned, m).weight.scales[1].item() for m in members}
    assert len(factors) == 2
    module = builder.linear("fused", members)
    assert type(module) is QuantLinear  # inputs are scaled at run time, alike for both
    want = torch.cat([read_matrix(planned, m).dequantize() for m in members])
    assert torch.equal(module.restore().dequantize(), want)


def test_members_with_unequal_inputs_stay_apart(shared):
    planned, builder = _parts(shared, "quark-int8")
    members = [planned.members[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1)]
    module = builder.linear("both", members)
    assert type(module) is QuantComposite
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    want = torch.cat([builder.linear(m.layer.name, [m])(x) for m in members], dim=-1)
    assert torch.equal(module(x), want)


@pytest.mark.parametrize("name", ["quark-int8", "quark-moe-mxfp4", "quark-uint4-g128-awq"])
def test_saving_gives_the_stored_bytes_and_config_back(shared, tmp_path, name):
    load_model(shared / name, dtype=torch.float32).save_pretrained(tmp_path)
    source, saved = open_checkpoint(shared / name), open_checkpoint(tmp_path)
    assert saved.tensors.keys() == source.tensors.keys()
    for tensor in source.tensors:
        want, got = source.read(tensor), saved.read(tensor)
        assert got.dtype == want.dtype, tensor
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), (
            tensor
        )
    key = "quantization_config"
    assert saved.config[key] == source.config[key]
