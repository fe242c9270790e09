"""The hooks as core calls them, and what importing the plugin costs."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import quant_plugin_awq
from quant_core.errors import CheckpointError, LayoutError
from quant_core.load import load_tensor
from quant_core.plan import plan
from quant_plugin_awq.scheme import build_scheme
from quant_plugin_awq.writer import config_for

BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}


def test_import_of_plugin_config_and_scheme_loads_no_torch():
    code = (
        "import sys, quant_plugin_awq, quant_plugin_awq.detect, quant_plugin_awq.layers, "
        "quant_plugin_awq.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_through_the_registry_and_its_config(write, small):
    planned = plan(write(small(), BLOCK))
    assert list(planned.quantized) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    config = quant_plugin_awq.make_config(planned)
    assert config == BLOCK | {"modules_to_not_convert": ["lm_head"]}


def test_plan_warns_of_unknown_keys_and_of_patterns_without_a_match(write, small):
    block = BLOCK | {"modules_to_not_convert": ["lm_head", "visual"], "new_key": 1}
    warnings = " ".join(plan(write(small(), block)).warnings)
    assert "new_key" in warnings
    assert "visual" in warnings
    assert "lm_head" not in warnings


def _plan_of(*schemes):
    members = {
        str(i): SimpleNamespace(
            scheme=s, quantized=True, stored=(), layer=SimpleNamespace(name=str(i), kind="linear")
        )
        for i, s in enumerate(schemes)
    }
    return SimpleNamespace(members=members, checkpoint=SimpleNamespace(tensors={}))


def _scheme(**kw):
    return build_scheme(**({"layout": "gemm", "shape": (8, 64), "bits": 4, "group_size": 32} | kw))


def test_config_of_layers_that_differ_raises_represent():
    with pytest.raises(LayoutError, match=r"group_size.*32, 64") as err:
        config_for(_plan_of(_scheme(), _scheme(group_size=64), _scheme(shape=(8, 128))))
    assert err.value.code == "Q-LAYOUT-REPRESENT"


def test_config_of_whole_row_groups_is_minus_one():
    rows = [_scheme(group_size=64), _scheme(group_size=128, shape=(8, 128))]
    assert config_for(_plan_of(*rows))["group_size"] == -1


def test_config_of_other_bits_names_the_dialect():
    assert config_for(_plan_of(_scheme(bits=5)))["provider"] == "auto-round"
    natural = config_for(_plan_of(_scheme(bits=3, interleaved=False)))
    assert natural["meta"] == {"quantizer": ["gptqmodel"]}


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm-awq"])
@pytest.mark.parametrize("declared_by", ["config.json", "quant_config.json", ""])
def test_every_layout_has_one_owner_and_loads_through_core(write, small, ref, layout, declared_by):
    codes, zeros, scales = ref.random_layer(16, 256, 128)
    old = {"w_bit": 4, "q_group_size": 128, "version": layout.upper(), "zero_point": True}
    new = BLOCK | {"group_size": 128, "version": layout}
    stored = ref.stored_layer(layout, codes, zeros, scales, 128)
    checkpoint = write(
        {f"model.layers.0.mlp.up_proj.{leaf}": t for leaf, t in stored.items()},
        new if declared_by == "config.json" else None,
        {"quant_config.json": old} if declared_by == "quant_config.json" else {},
    )
    weight = load_tensor(checkpoint.folder, "model.layers.0.mlp.up_proj").dequantize()
    spread = [t.float().repeat_interleave(128, dim=1) for t in (zeros, scales)]
    # float16 offsets carry half a unit of their last place, at most 2**-11 of 15 * scale
    error = (weight - (codes.float() - spread[0]) * spread[1]).abs()
    assert torch.all(error <= 15 * spread[1] * 2**-11)


def test_lost_and_renamed_tensors_of_a_layer_are_named_by_the_plan(write, small):
    for leaf in ("qweight", "qzeros", "scales"):
        name = f"model.layers.1.mlp.up_proj.{leaf}"
        for new_name in ("", f"model.layers.1.mlp.up_proj.{leaf}2"):
            tensors = small()
            value = tensors.pop(name)
            if new_name:
                tensors[new_name] = value
            with pytest.raises(CheckpointError, match=name) as err:
                plan(write(tensors, BLOCK))
            assert err.value.code == "Q-TENSOR-MISSING"


def test_extra_tensor_in_a_packed_layer_is_named_by_the_plan(write, small):
    name = "model.layers.1.mlp.up_proj.g_idx"
    with pytest.raises(CheckpointError, match=name) as err:
        plan(write(small() | {name: torch.zeros(128, dtype=torch.int32)}, BLOCK))
    assert err.value.code == "Q-TENSOR-UNEXPECTED"
