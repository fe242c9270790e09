"""The config block: what is read, what is refused, who else is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quant_core.errors import ConfigError
from quant_core.registry import registry
from quant_plugin_fp8.config import parse_config
from quant_plugin_fp8.detect import detect

BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_import_of_everything_but_layout_loads_no_torch():
    code = (
        "import sys, quant_plugin_fp8, quant_plugin_fp8.detect, quant_plugin_fp8.layers, "
        "quant_plugin_fp8.writer\n"
        "assert not {'torch', 'triton', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugin_is_registered_for_both_methods():
    assert registry().plugins["fp8"].info.quant_methods == ("fp8", "fbgemm_fp8")


def test_config_of_transformers_is_read_without_a_warning():
    config = parse_config(
        BLOCK
        | {"dequantize": False, "expert_dtype": "fp8", "modules_to_convert": None,
           "modules_to_not_convert": ["lm_head"], "scale_fmt": "float"},
        "config.json",
    )  # fmt: skip
    assert (config.block, config.static, config.ue8m0) == ((128, 128), False, False)
    assert [p.text for p in config.name_patterns()] == ["lm_head"]
    assert config.warnings == ()


def test_defaults_are_per_tensor_dynamic_and_an_upper_bound_of_1200():
    plain = parse_config({"quant_method": "fp8"}, "f")
    assert (plain.block, plain.static, plain.upper_bound) == (None, False, 0.0)
    assert parse_config({"quant_method": "fbgemm_fp8"}, "f").upper_bound == 1200.0


def test_both_skip_lists_count_once_each_in_every_dialect():
    block = {
        "modules_to_not_convert": ["lm_head", "re:.*gate$"],
        "ignored_layers": ["lm_head", "*x*"],
    }
    patterns = parse_config(BLOCK | block, "f").skip
    assert [(p.kind, p.text) for p in patterns] == [
        ("substring", "lm_head"), ("regex", ".*gate$"), ("glob", "*x*")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        ({"activation_scheme": "static"}, "Q-CFG-CONFLICT", "activation_scheme"),
        ({"activation_scheme": "token"}, "Q-CFG-VALUE", "activation_scheme"),
        ({"activation_scheme": 1}, "Q-CFG-TYPE", "activation_scheme"),
        ({"weight_block_size": 128}, "Q-CFG-VALUE", "weight_block_size"),
        ({"weight_block_size": [128]}, "Q-CFG-VALUE", "weight_block_size"),
        ({"weight_block_size": [128, 0]}, "Q-CFG-VALUE", "weight_block_size"),
        ({"weight_block_size": [128, True]}, "Q-CFG-VALUE", "weight_block_size"),
        ({"weight_block_size": [128, 128.0]}, "Q-CFG-VALUE", "weight_block_size"),
        ({"weight_block_size": None, "scale_fmt": "ue8m0"}, "Q-CFG-CONFLICT", "scale_fmt"),
        ({"scale_fmt": "e5m3"}, "Q-CFG-VALUE", "scale_fmt"),
        ({"fmt": "e4m3fnuz"}, "Q-CFG-VALUE", "another range"),
        ({"fmt": "e5m2"}, "Q-CFG-VALUE", "fmt"),
        ({"expert_dtype": "fp4"}, "Q-CFG-VALUE", "expert_dtype"),
        ({"modules_to_not_convert": "lm_head"}, "Q-CFG-TYPE", "modules_to_not_convert"),
        ({"ignored_layers": ["."]}, "Q-CFG-VALUE", "ignored_layers"),
        ({"ignored_layers": ["re:("]}, "Q-CFG-REGEX", "("),
        ({"quant_method": "fbgemm_fp8"}, "Q-CFG-CONFLICT", "weight_block_size"),
        ({"quant_method": "fbgemm_fp8", "weight_block_size": None, "activation_scale_ub": -1},
         "Q-CFG-VALUE", "activation_scale_ub"),
        ({"quant_method": "fbgemm_fp8", "weight_block_size": None, "activation_scale_ub": "9"},
         "Q-CFG-VALUE", "activation_scale_ub"),
        ({"quant_method": "fbgemm_fp8", "weight_block_size": None, "activation_scheme": "static"},
         "Q-CFG-CONFLICT", "activation_scheme"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_naming_file_and_key(change, code, key):
    with pytest.raises(ConfigError) as err:
        parse_config(BLOCK | change, "config.json")
    assert err.value.code == code
    assert key in str(err.value)
    if code != "Q-CFG-REGEX":
        assert err.value.path == "config.json"


def test_unknown_keys_and_extra_modules_are_warned_of():
    block = BLOCK | {"surprise": 1, "modules_to_convert": ["embed_tokens"]}
    warnings = " ".join(parse_config(block, "config.json").warnings)
    assert "surprise" in warnings
    assert "embed_tokens" in warnings


@pytest.mark.parametrize("method", ["mxfp8", "w4afp8", "fp8_extra", "quark", "xfp8"])
def test_methods_that_merely_contain_the_name_are_left_alone(write, made, method):
    assert (
        detect(write(made.model("block"), made.configs["block"] | {"quant_method": method})) is None
    )


def test_tensors_alone_are_no_claim(write, made):
    checkpoint = write(made.model("block"), None)
    assert detect(checkpoint) is None


def test_config_inside_text_config_is_found(write, made):
    text = {"text_config": {"quantization_config": made.configs["block"]}}
    found = detect(write(made.model("block"), None, **text))
    assert found is not None
    assert found.level == "declared"


def test_cache_scheme_and_cache_scales_are_warned_of(write, made):
    config = made.configs["static"] | {"kv_cache_scheme": {"num_bits": 8}}
    assert "no scales are stored" in detect(write(made.model("static"), config)).config.warnings[0]
