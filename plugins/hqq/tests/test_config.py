"""Config, detection, descriptions, and contradictions with what is stored."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import quant_plugin_hqq as plugin
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError


def test_import_of_plugin_config_and_scheme_loads_no_torch():
    code = (
        "import sys, quant_plugin_hqq, quant_plugin_hqq.layers, quant_plugin_hqq.detect, "
        "quant_plugin_hqq.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_reads_descriptions_without_torch(write, hqq):
    stored, _ = hqq.layer(4, 64)
    folder = write(hqq.named(stored), hqq.block()).folder
    code = (
        "import sys; from quant_core.checkpoint.open import open_checkpoint; "
        "from quant_core.plan import plan\n"
        f"p = plan(open_checkpoint({str(folder)!r}))\n"
        "assert next(iter(p.quantized.values())).scheme.shape == (4, 64)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _raises(write, hqq, tensors, config, kind=QuantError):
    with pytest.raises(kind) as err:
        hqq.plan(write(tensors, config))
    return err.value


def _params(hqq, **change):
    config = hqq.block()
    config["quant_config"]["weight_quant_params"] |= change
    return config


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"nbits": 8}, "Q-CFG-CONFLICT"),
        ({"group_size": 32}, "Q-CFG-CONFLICT"),
        ({"axis": 0}, "Q-CFG-CONFLICT"),
        ({"nbits": 0}, "Q-CFG-VALUE"),
        ({"nbits": 1.58}, "Q-CFG-VALUE"),
        ({"axis": 2}, "Q-CFG-VALUE"),
        ({"group_size": "64"}, "Q-CFG-VALUE"),
    ],
)
def test_wrong_or_contradictory_settings_are_refused(write, hqq, change, code):
    stored, _ = hqq.layer(4, 64)
    err = _raises(write, hqq, hqq.named(stored), _params(hqq, **change), ConfigError)
    assert err.code == code
    assert next(iter(change)) in str(err)


def test_quantized_scales_in_the_config_are_refused(write, hqq):
    stored, _ = hqq.layer(4, 64)
    config = hqq.block()
    config["quant_config"]["zero_quant_params"] = {"nbits": 8}
    err = _raises(write, hqq, hqq.named(stored), config, ConfigError)
    assert err.code == "Q-CFG-VALUE"
    assert "zero_quant_params" in str(err)


@pytest.mark.parametrize(
    "config", [{"quant_config": 4}, {"quant_config": {"weight_quant_params": []}}]
)
def test_malformed_config_is_refused(write, hqq, config):
    stored, _ = hqq.layer(4, 64)
    err = _raises(write, hqq, hqq.named(stored), {"quant_method": "hqq"} | config, ConfigError)
    assert err.code == "Q-CFG-TYPE"


def test_dynamic_config_states_each_kind_of_layer(write, hqq):
    first, _ = hqq.layer(4, 64)
    second, _ = hqq.layer(4, 64, bits=3)
    other = "model.layers.0.mlp.down_proj"
    part = lambda bits: hqq.block(bits)["quant_config"]  # noqa: E731
    config = {"quant_method": "hqq",
              "quant_config": {"mlp.up_proj": part(4), "mlp.down_proj": part(3)}}  # fmt: skip
    tensors = hqq.named(first) | hqq.named(second, other)
    assert len(hqq.plan(write(tensors, config)).quantized) == 2
    config["quant_config"]["mlp.down_proj"] = part(4)
    err = _raises(write, hqq, tensors, config, ConfigError)
    assert err.code == "Q-CFG-CONFLICT"
    assert other in str(err)


def test_checkpoint_without_config_is_known_by_its_tensors(write, hqq):
    stored, _ = hqq.layer(4, 64)
    planned = hqq.plan(write(hqq.named(stored), None))
    assert planned.match.level == "structural"
    assert list(planned.quantized) == [hqq.NAME]


def test_unknown_keys_and_patterns_without_a_match_are_warnings(write, hqq):
    stored, _ = hqq.layer(4, 64)
    tensors = hqq.named(stored) | {"lm_head.weight": torch.zeros(4, 64)}
    config = hqq.block(skip_modules=["lm_head", "visual"], new_key=1)
    text = " ".join(hqq.plan(write(tensors, config)).warnings)
    assert "new_key" in text
    assert "visual" in text
    assert "lm_head" not in text


def _number(value, dtype=torch.int32):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize(
    ("leaf", "value", "code"),
    [
        ("axis", _number(0), "Q-CFG-VALUE"),
        ("nbits", _number(9), "Q-CFG-VALUE"),
        ("nbits", _number(1.58, torch.float32), "Q-CFG-VALUE"),
        ("nbits", _number([4, 4]), "Q-CFG-VALUE"),
        ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8), "Q-CFG-VALUE"),
        ("packing", torch.tensor([255], dtype=torch.uint8), "Q-CFG-VALUE"),
        ("quant_scale", _number(1, torch.uint8), "Q-CFG-VALUE"),
        ("quant_zero", _number(1, torch.uint8), "Q-CFG-VALUE"),
        ("channel_wise", _number(0, torch.uint8), "Q-CFG-VALUE"),
        ("shape", torch.tensor([4, 8, 8]), "Q-CFG-VALUE"),
        ("shape", torch.tensor([4, -64]), "Q-CFG-VALUE"),
        ("group_size", _number(0), "Q-CFG-VALUE"),
        ("group_size", _number(48), "Q-LAYOUT-GROUP"),
        ("shape", torch.tensor([8, 64]), "Q-LAYOUT-SHAPE"),
        ("W_q", torch.zeros(3, 64, dtype=torch.uint8), "Q-LAYOUT-SHAPE"),
        ("W_q", torch.zeros(2, 64, dtype=torch.int32), "Q-LAYOUT-DTYPE"),
        ("W_q", torch.zeros(2, 64, dtype=torch.int8), "Q-LAYOUT-DTYPE"),
        ("scale", torch.ones(4), "Q-LAYOUT-SHAPE"),
        ("scale", torch.ones(4, 1, dtype=torch.uint8), "Q-LAYOUT-DTYPE"),
        ("zero", torch.ones(5, 1), "Q-LAYOUT-SHAPE"),
    ],
)
def test_wrong_descriptions_shapes_and_dtypes_are_refused(write, hqq, leaf, value, code):
    stored, _ = hqq.layer(4, 64)
    err = _raises(write, hqq, hqq.named(stored | {leaf: value}), None)
    assert err.code == code
    assert hqq.NAME in str(err)


@pytest.mark.parametrize("leaf", ["W_q", "scale", "zero", "nbits", "shape", "axis", "packing"])
def test_missing_tensor_is_named(write, hqq, leaf):
    stored, _ = hqq.layer(4, 64)
    del stored[leaf]
    err = _raises(write, hqq, hqq.named(stored), hqq.block(), CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert f"{hqq.NAME}.{leaf}" in str(err)


@pytest.mark.parametrize("leaf", ["optimize", "quant_zero", "compute_dtype"])
def test_description_that_one_layer_lost_is_named(write, hqq, leaf):
    tensors = {}
    for i in range(3):
        stored, _ = hqq.layer(4, 64, seed=i)
        tensors |= hqq.named(stored, f"model.layers.{i}.mlp.up_proj")
    lost = f"model.layers.1.mlp.up_proj.{leaf}"
    del tensors[lost]
    err = _raises(write, hqq, tensors, hqq.block(), CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert lost in str(err)


def test_extra_tensor_is_named(write, hqq):
    stored, _ = hqq.layer(4, 64)
    extra = {"scale_q": torch.ones(1)}
    err = _raises(write, hqq, hqq.named(stored | extra), hqq.block(), CheckpointError)
    assert err.code == "Q-TENSOR-UNEXPECTED"


def test_float_weight_among_quantized_siblings_is_refused_unless_excluded(write, hqq):
    stored, _ = hqq.layer(4, 64)
    other = "model.layers.1.mlp.up_proj"
    tensors = hqq.named(stored) | {f"{other}.weight": torch.zeros(4, 64)}
    err = _raises(write, hqq, tensors, hqq.block(), CheckpointError)
    assert err.code == "Q-CKPT-MISMATCH"
    assert other in str(err)
    assert len(hqq.plan(write(tensors, hqq.block(skip_modules=["layers.1"]))).quantized) == 1


def test_quantized_weight_on_the_list_is_refused(write, hqq):
    stored, _ = hqq.layer(4, 64)
    config = hqq.block(skip_modules=["up_proj"])
    err = _raises(write, hqq, hqq.named(stored), config, CheckpointError)
    assert err.code == "Q-CKPT-MISMATCH"


def test_config_of_a_plan(write, hqq):
    stored, _ = hqq.layer(4, 64)
    tensors = hqq.named(stored) | {"lm_head.weight": torch.zeros(4, 64)}
    planned = hqq.plan(write(tensors, hqq.block()))
    assert plugin.make_config(planned) == hqq.block()
    planned.match = None
    made = plugin.make_config(planned)
    assert made["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert made["skip_modules"] == ["lm_head"]
    assert hqq.plan(write(tensors, made)).quantized


def test_config_of_layers_that_differ_raises_represent(write, hqq):
    first, _ = hqq.layer(4, 64)
    second, _ = hqq.layer(4, 64, bits=3)
    planned = hqq.plan(write(hqq.named(first) | hqq.named(second, "m.down_proj"), None))
    with pytest.raises(LayoutError) as err:
        plugin.make_config(planned)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
