"""Config, header entries, detection, and contradictions with what is stored."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import quant_plugin_torchao as plugin
from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError


def test_import_of_plugin_config_and_scheme_loads_no_torch():
    code = (
        "import sys, quant_plugin_torchao, quant_plugin_torchao.layers, "
        "quant_plugin_torchao.detect, quant_plugin_torchao.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _raises(write, ao, stored, entry, config=None, kind=QuantError):
    meta = ao.header({ao.NAME: entry})
    with pytest.raises(kind) as err:
        ao.plan(write(ao.named(stored), meta, config or ao.block()))
    return err.value


@pytest.mark.parametrize(
    ("case", "recipe", "data", "found"),
    [
        ("int8wo-row", "Int8DynamicActivationInt8WeightConfig", {}, "float activations"),
        ("int8dyn-row", "Int8WeightOnlyConfig", {}, "quantized activations"),
        ("int8wo-row", "IntxWeightOnlyConfig", {}, "Int8Tensor"),
        ("fp8wo", "Int8WeightOnlyConfig", {}, "Float8Tensor"),
        ("intx3-g32", "IntxWeightOnlyConfig", "int4", "int3"),
    ],
)
def test_recipe_that_contradicts_the_header_is_refused(write, ao, case, recipe, data, found):
    stored, entry, _ = ao.case(case)
    config = ao.block(recipe)
    if data:
        dtype = {"_type": "torch.dtype", "_data": data}
        config["quant_type"]["default"]["_data"] = {"weight_dtype": dtype}
    err = _raises(write, ao, stored, entry, config, ConfigError)
    assert err.code == "Q-CFG-CONFLICT"
    assert found in str(err)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_type": 4},
        {"quant_type": {"default": 4}},
        {"quant_type": {"default": {"_type": "X", "_data": 1}}},
        {"modules_to_not_convert": "lm_head"},
    ],
)
def test_malformed_config_is_refused(write, ao, config):
    stored, entry, _ = ao.case("int8wo-row")
    err = _raises(write, ao, stored, entry, ao.block() | config, ConfigError)
    assert err.code == "Q-CFG-TYPE"


def _changed(entry, **data):
    return entry | {"_data": entry["_data"] | data}


INT8 = "QuantizeTensorToInt8Kwargs"


@pytest.mark.parametrize(
    ("case", "change", "code"),
    [
        ("int8wo-row", {"block_size": [1, 0]}, "Q-CFG-VALUE"),
        ("int8wo-row", {"block_size": [1, 2, 3]}, "Q-CFG-VALUE"),
        ("int8wo-row", {"block_size": "x"}, "Q-CFG-VALUE"),
        ("int8wo-row", {"block_size": [1, 48]}, "Q-LAYOUT-GROUP"),
        ("int8wo-row", {"block_size": [1, 32]}, "Q-LAYOUT-GROUP"),
        ("int8wo-row", {"act_quant_kwargs": {"_type": "os.system", "_data": {}}}, "Q-CFG-VALUE"),
        ("int8wo-row", {"act_quant_kwargs": {"_type": INT8, "_data": {}}}, "Q-CFG-VALUE"),
        ("int8wo-row", {"act_quant_kwargs": "yes"}, "Q-CFG-VALUE"),
        ("intx3-g32", {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}}, "Q-CFG-VALUE"),
        ("intx3-g32", {"activation_quantization": "int4_sym"}, "Q-CFG-VALUE"),
        ("fp8wo", {"act_quant_kwargs": {"_type": INT8, "_data": {}}}, "Q-CFG-VALUE"),
    ],
)
def test_header_entries_that_are_wrong_or_not_supported_are_refused(write, ao, case, change, code):
    stored, entry, _ = ao.case(case)
    err = _raises(write, ao, stored, _changed(entry, **change))
    assert err.code == code
    assert ao.NAME in str(err)


def test_reduced_range_of_activations_is_refused(write, ao):
    stored, entry, _ = ao.case("int8dyn-row")
    entry["_data"]["act_quant_kwargs"]["_data"]["reduce_range"] = True
    assert _raises(write, ao, stored, entry).code == "Q-CFG-VALUE"


@pytest.mark.parametrize("kind", ["Int4Tensor", "MXTensor", "NVFP4Tensor", "os.system"])
def test_other_classes_are_refused_by_name(write, ao, kind):
    stored, entry, _ = ao.case("int8wo-row")
    err = _raises(write, ao, stored, entry | {"_type": kind}, None, ConfigError)
    assert err.code == "Q-CFG-VALUE"
    assert kind in str(err)


def test_scale_of_the_activations_is_refused_not_skipped(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    stored["_weight_act_pre_scale"] = torch.ones(64)
    entry = entry | {"_tensor_data_names": [*entry["_tensor_data_names"], "act_pre_scale"]}
    assert _raises(write, ao, stored, entry).code == "Q-CFG-TRANSFORM"


def test_static_activation_scale_is_refused(write, ao):
    stored, entry, _ = ao.case("int8dyn-row")
    stored["_weight_act_quant_scale"] = torch.ones(1)
    entry = entry | {"_tensor_data_names": [*entry["_tensor_data_names"], "act_quant_scale"]}
    err = _raises(write, ao, stored, entry)
    assert err.code == "Q-CFG-VALUE"
    assert "act_quant_scale" in str(err)


@pytest.mark.parametrize("text", [None, "{", "[]", "4", '{"_data": {}}', "[" * 9000, "x" * 70000])
def test_header_without_a_readable_entry_is_refused(write, ao, text):
    stored, _, _ = ao.case("int8wo-row")
    meta = {"format": "pt"} | ({f"{ao.NAME}.weight": text} if text else {})
    with pytest.raises(CheckpointError, match=ao.NAME) as err:
        ao.plan(write(ao.named(stored), meta, ao.block()))
    assert err.value.code == "Q-CKPT-HEADER"


@pytest.mark.parametrize("leaf", ["_weight_qdata", "_weight_scale", "_weight_zero_point"])
def test_missing_tensor_is_named(write, ao, leaf):
    stored, entry, _ = ao.case("int8wo-row")
    del stored[leaf]
    err = _raises(write, ao, stored, entry, None, CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert f"{ao.NAME}.{leaf}" in str(err)


def test_tensor_that_the_header_does_not_list_is_named(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    entry = entry | {"_tensor_data_names": ["qdata", "scale"]}
    err = _raises(write, ao, stored, entry, None, CheckpointError)
    assert err.code == "Q-TENSOR-UNEXPECTED"
    assert "_weight_zero_point" in str(err)


@pytest.mark.parametrize(
    ("leaf", "value", "code"),
    [
        ("_weight_qdata", torch.zeros(8, 64, dtype=torch.uint8), "Q-LAYOUT-DTYPE"),
        ("_weight_qdata", torch.zeros(8, 8, 8, dtype=torch.int8), "Q-LAYOUT-SHAPE"),
        ("_weight_scale", torch.ones(8), "Q-LAYOUT-GROUP"),
        ("_weight_scale", torch.ones(8, 1, dtype=torch.int8), "Q-LAYOUT-DTYPE"),
        ("_weight_zero_point", torch.zeros(8, dtype=torch.int8), "Q-LAYOUT-SHAPE"),
        ("_weight_zero_point", torch.zeros(8, 1, dtype=torch.int32), "Q-LAYOUT-DTYPE"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(write, ao, leaf, value, code):
    stored, entry, _ = ao.case("int8wo-row")
    err = _raises(write, ao, stored | {leaf: value}, entry, None, LayoutError)
    assert err.code == code
    assert f"{ao.NAME}.{leaf}" in str(err)


def test_fused_experts_are_refused_by_name(write, ao):
    name = "model.layers.0.mlp.experts"
    tensors = {f"{name}._gate_up_proj_qdata": torch.zeros(2, 8, 64, dtype=torch.int8)}
    with pytest.raises(ConfigError, match="_gate_up_proj_qdata") as err:
        ao.plan(write(tensors, {"format": "pt"}, ao.block()))
    assert err.value.code == "Q-CFG-VALUE"


def test_checkpoint_without_config_is_known_by_its_header(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), None))
    assert planned.match.level == "structural"
    assert list(planned.quantized) == [ao.NAME]


def test_unknown_keys_and_patterns_without_a_match_are_warnings(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    tensors = ao.named(stored) | {"lm_head.weight": torch.zeros(4, 64)}
    config = ao.block(modules_to_not_convert=["lm_head", "visual"], new_key=1)
    text = " ".join(ao.plan(write(tensors, ao.header({ao.NAME: entry}), config)).warnings)
    assert "new_key" in text
    assert "visual" in text
    assert "lm_head" not in text


def test_float_weight_among_quantized_siblings_is_refused_unless_excluded(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    other = "model.layers.1.mlp.up_proj"
    tensors = ao.named(stored) | {f"{other}.weight": torch.zeros(8, 64)}
    meta = ao.header({ao.NAME: entry})
    with pytest.raises(CheckpointError, match=other) as err:
        ao.plan(write(tensors, meta, ao.block()))
    assert err.value.code == "Q-CKPT-MISMATCH"
    config = ao.block(modules_to_not_convert=[other])
    assert len(ao.plan(write(tensors, meta, config)).quantized) == 1


def test_quantized_weight_on_the_list_is_refused(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    config = ao.block(modules_to_not_convert=["up_proj"])
    assert _raises(write, ao, stored, entry, config).code == "Q-CKPT-MISMATCH"


def test_config_of_a_plan_is_the_one_it_was_read_from(write, ao):
    stored, entry, _ = ao.case("int8wo-row")
    config = ao.block("Int8WeightOnlyConfig")
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), config))
    assert plugin.make_config(planned) == json.loads(json.dumps(config))


def test_config_of_another_plan_is_the_recipe_torchao_states(write, ao):
    """What torchao 0.18.0 itself wrote for this recipe, key by key."""
    stored, entry, _ = ao.case("int8wo-row")
    planned = ao.plan(write(ao.named(stored), ao.header({ao.NAME: entry}), ao.block()))
    planned.match = None
    recipe = plugin.make_config(planned)["quant_type"]["default"]
    per_row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    assert recipe == {
        "_type": "Int8WeightOnlyConfig",
        "_version": 2,
        "_data": {"group_size": None, "granularity": per_row, "set_inductor_config": True},
    }


def test_plan_without_a_layer_has_no_config():
    nothing = SimpleNamespace(match=None, members={}, checkpoint=SimpleNamespace(tensors={}))
    with pytest.raises(LayoutError) as err:
        plugin.make_config(nothing)
    assert err.value.code == "Q-LAYOUT-REPRESENT"
