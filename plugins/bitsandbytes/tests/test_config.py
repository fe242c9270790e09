"""Config, detection and contradictions with what is stored."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from quant_core.errors import CheckpointError, ConfigError, LayoutError, QuantError


def test_import_of_plugin_config_and_scheme_loads_no_torch():
    code = (
        "import sys, quant_plugin_bitsandbytes, quant_plugin_bitsandbytes.layers, "
        "quant_plugin_bitsandbytes.detect, quant_plugin_bitsandbytes.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_reads_descriptions_without_torch(write, bnb):
    stored, _ = bnb.four_bit(4, 64, nested=4)
    config = bnb.FOUR | {"bnb_4bit_use_double_quant": True}
    folder = write(bnb.named(stored), config).folder
    code = (
        "import sys; from quant_core.checkpoint.open import open_checkpoint; "
        "from quant_core.plan import plan\n"
        f"p = plan(open_checkpoint({str(folder)!r}))\n"
        "assert next(iter(p.quantized.values())).scheme.shape == (4, 64)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _raises(write, bnb, tensors, config, kind=ConfigError):
    with pytest.raises(kind) as err:
        bnb.plan(write(tensors, config))
    return err.value


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"load_in_8bit": True}, "Q-CFG-CONFLICT"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "Q-CFG-CONFLICT"),
        ({"load_in_4bit": "yes"}, "Q-CFG-VALUE"),
        ({"bnb_4bit_quant_type": "int4"}, "Q-CFG-VALUE"),
        ({"bnb_4bit_quant_type": "fp4"}, "Q-CFG-CONFLICT"),
        ({"bnb_4bit_quant_type": 4}, "Q-CFG-TYPE"),
        ({"bnb_4bit_use_double_quant": True}, "Q-CFG-CONFLICT"),
        ({"llm_int8_threshold": -1}, "Q-CFG-VALUE"),
        ({"llm_int8_threshold": "6"}, "Q-CFG-VALUE"),
        ({"llm_int8_skip_modules": "lm_head"}, "Q-CFG-TYPE"),
    ],
)
def test_wrong_or_contradictory_settings_are_refused(write, bnb, change, code):
    stored, _ = bnb.four_bit(4, 64)
    err = _raises(write, bnb, bnb.named(stored), bnb.FOUR | change)
    assert err.code == code
    assert next(iter(change)) in str(err) or "load_in_8bit" in str(err)


def test_four_bit_config_of_int8_weights_is_refused(write, bnb):
    stored, _ = bnb.int8(4, 64)
    assert _raises(write, bnb, bnb.named(stored), bnb.FOUR).code == "Q-CFG-CONFLICT"


def test_unknown_keys_and_patterns_without_a_match_are_warnings(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    config = bnb.FOUR | {"new_key": 1, "llm_int8_skip_modules": ["lm_head", "visual"]}
    tensors = bnb.named(stored) | {"lm_head.weight": torch.zeros(4, 64)}
    planned = bnb.plan(write(tensors, config))
    text = " ".join(planned.warnings)
    assert "new_key" in text
    assert "visual" in text
    assert "lm_head" not in text
    assert planned.members["lm_head"].scheme.rule == "llm_int8_skip_modules"


def test_checkpoint_without_config_is_known_by_its_tensors(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    planned = bnb.plan(write(bnb.named(stored), None))
    assert planned.match.level == "structural"
    assert list(planned.quantized) == [bnb.NAME]


def test_old_config_without_quant_method_is_declared(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    config = {k: v for k, v in bnb.FOUR.items() if k != "quant_method"}
    assert bnb.plan(write(bnb.named(stored), config)).match.level == "declared"


@pytest.mark.parametrize(
    "leaf", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
             "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"],
)  # fmt: skip
def test_missing_tensor_of_a_four_bit_weight_is_named(write, bnb, leaf):
    stored, _ = bnb.four_bit(4, 64, nested=4)
    del stored[leaf]
    config = bnb.FOUR | {"bnb_4bit_use_double_quant": True}
    err = _raises(write, bnb, bnb.named(stored), config, CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert f"{bnb.NAME}.{leaf}" in str(err)


@pytest.mark.parametrize("leaf", ["weight", "SCB"])
def test_missing_tensor_of_an_int8_weight_is_named(write, bnb, leaf):
    stored, _ = bnb.int8(4, 64)
    del stored[leaf]
    err = _raises(write, bnb, bnb.named(stored), bnb.EIGHT, CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert f"{bnb.NAME}.{leaf}" in str(err)


def test_weight_format_that_one_layer_lost_is_named(write, bnb):
    tensors = {}
    for i in range(3):
        stored, _ = bnb.int8(4, 64, seed=i)
        tensors |= bnb.named(stored, f"model.layers.{i}.mlp.up_proj")
    lost = "model.layers.1.mlp.up_proj.weight_format"
    del tensors[lost]
    err = _raises(write, bnb, tensors, bnb.EIGHT, CheckpointError)
    assert err.code == "Q-TENSOR-MISSING"
    assert lost in str(err)


def test_extra_tensor_is_named(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    extra = {"weight.nested_absmax": torch.ones(1)}
    err = _raises(write, bnb, bnb.named(stored | extra), bnb.FOUR, CheckpointError)
    assert err.code == "Q-TENSOR-UNEXPECTED"


@pytest.mark.parametrize(
    ("leaf", "value", "code"),
    [
        ("weight", torch.zeros(100, 1, dtype=torch.uint8), "Q-LAYOUT-SHAPE"),
        ("weight.absmax", torch.zeros(5), "Q-LAYOUT-SHAPE"),
        ("weight.absmax", torch.zeros(4, dtype=torch.float16), "Q-LAYOUT-DTYPE"),
        ("weight.quant_map", torch.zeros(8), "Q-LAYOUT-SHAPE"),
        ("weight", torch.zeros(128, 1, dtype=torch.int64), "Q-LAYOUT-DTYPE"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(write, bnb, leaf, value, code):
    stored, _ = bnb.four_bit(4, 64)
    err = _raises(write, bnb, bnb.named(stored | {leaf: value}), bnb.FOUR, LayoutError)
    assert err.code == code
    assert f"{bnb.NAME}.{leaf}" in str(err)


def _state(**change):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}
    return json.dumps(state | change).encode()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"\xff\xfe", "Q-CKPT-HEADER"),
        (b"[1]", "Q-CKPT-HEADER"),
        (b"{", "Q-CKPT-HEADER"),
        (b"[" * 50_000, "Q-CKPT-HEADER"),
        (_state(blocksize=0), "Q-CFG-VALUE"),
        (_state(blocksize=None), "Q-CFG-VALUE"),
        (_state(quant_type="nf5"), "Q-CFG-VALUE"),
        (_state(quant_type="fp4"), "Q-CFG-CONFLICT"),
        (_state(shape=[4, 8, 8]), "Q-LAYOUT-SHAPE"),
        (_state(shape=[4, -64]), "Q-LAYOUT-SHAPE"),
        (_state(shape=[4, 63]), "Q-LAYOUT-SHAPE"),
        (_state(nested_blocksize=256), "Q-CFG-VALUE"),
        (_state(nested_blocksize=256, nested_offset=float("nan")), "Q-CKPT-HEADER"),
        (_state(nested_blocksize=256, nested_offset=0.1, nested_dtype="float16"), "Q-CFG-VALUE"),
        (b" " * 70_000, "Q-LIMIT-COUNT"),
    ],
)
def test_damaged_descriptions_are_refused(write, bnb, text, code):
    stored, _ = bnb.four_bit(4, 64)
    name = "weight.quant_state.bitsandbytes__nf4"
    stored[name] = torch.tensor(list(text), dtype=torch.uint8)
    config = {k: v for k, v in bnb.FOUR.items() if "double" not in k}
    err = _raises(write, bnb, bnb.named(stored), config, QuantError)
    assert err.code == code
    assert bnb.NAME in str(err)


def test_rows_in_a_kernels_order_are_refused(write, bnb):
    stored, _ = bnb.int8(4, 64)
    stored["weight_format"] = torch.tensor(2, dtype=torch.uint8)
    err = _raises(write, bnb, bnb.named(stored), bnb.EIGHT)
    assert err.code == "Q-CFG-VALUE"
    assert "col_turing" in str(err)


def test_float_weight_among_quantized_siblings_is_refused_unless_excluded(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    other = "model.layers.1.mlp.up_proj"
    tensors = bnb.named(stored) | {f"{other}.weight": torch.zeros(4, 64)}
    err = _raises(write, bnb, tensors, bnb.FOUR, CheckpointError)
    assert err.code == "Q-CKPT-MISMATCH"
    assert other in str(err)
    config = bnb.FOUR | {"llm_int8_skip_modules": ["layers.1.mlp"]}
    assert list(bnb.plan(write(tensors, config)).quantized) == [bnb.NAME]


def test_quantized_weight_on_the_list_is_refused(write, bnb):
    stored, _ = bnb.four_bit(4, 64)
    config = bnb.FOUR | {"llm_int8_skip_modules": ["up_proj"]}
    err = _raises(write, bnb, bnb.named(stored), config, CheckpointError)
    assert err.code == "Q-CKPT-MISMATCH"
    part = bnb.FOUR | {"llm_int8_skip_modules": ["up"]}  # only a part of the name
    assert bnb.plan(write(bnb.named(stored), part)).quantized
