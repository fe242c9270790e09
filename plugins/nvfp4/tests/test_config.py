"""Both dialects of the config, and every value that is refused."""

from __future__ import annotations

import pickle

import pytest

from quant_core.errors import ConfigError
from quant_plugin_nvfp4.algos import ALGOS
from quant_plugin_nvfp4.config import check_agreement, parse_config


def refused(block, code, match, file="config.json"):
    with pytest.raises(ConfigError, match=match) as err:
        parse_config(block, file)
    assert err.value.code == code
    assert err.value.path == file
    assert err.value.plugin == "nvfp4"


@pytest.mark.parametrize("algo", ALGOS)
def test_both_dialects_mean_the_same(mo, algo):
    a = parse_config(mo.block(algo), "config.json")
    b = parse_config(mo.side(algo), "hf_quant_config.json")
    assert a.uniform == b.uniform
    assert a.uniform.algo.name == algo
    assert a.exclude == b.exclude == ("lm_head",)
    assert a.warnings == b.warnings == ()
    assert check_agreement(a, b).uniform == a.uniform


def test_older_spellings_are_read(mo):
    nested = {"quant_method": "modelopt", **mo.side("FP8")}
    assert parse_config(nested, "config.json").uniform.algo.name == "FP8"
    lower = parse_config(mo.block("fp8_pb_wo"), "config.json")
    assert lower.uniform.algo.name == "FP8_PB_WO"
    assert lower.uniform.group_size == 128
    alias = parse_config(mo.block("FP8_BLOCK_SCALES"), "config.json")
    assert alias.uniform == lower.uniform


def test_group_size_of_config_json_is_in_its_config_group(mo):
    weights = {"num_bits": 4, "type": "int", "group_size": 64}
    block = mo.block("W4A16_AWQ", config_groups={"group_0": {"weights": weights}})
    assert parse_config(block, "config.json").uniform.group_size == 64
    assert parse_config(mo.block("W4A16_AWQ"), "config.json").uniform.group_size == 0
    assert parse_config(mo.side("W4A16_AWQ", group_size=32), "x").uniform.group_size == 32


@pytest.mark.parametrize(
    ("value", "kv"),
    [
        (None, ""),
        ("FP8", "FP8"),
        ("nvfp4", "NVFP4"),
        ("NVFP4_AFFINE", "NVFP4_AFFINE"),
        ("INT8", "INT8"),
        ({"dynamic": False, "num_bits": 8, "type": "float"}, "FP8"),
        ({"dynamic": False, "num_bits": 8, "type": "int"}, "INT8"),
        ({"dynamic": False, "num_bits": 4, "type": "float"}, "NVFP4"),
    ],
)
def test_cache_algorithms(mo, value, kv):
    assert parse_config(mo.block(kv_cache_scheme=value), "config.json").kv == kv
    if not isinstance(value, dict):
        assert parse_config(mo.side(kv_cache_quant_algo=value), "x").kv == kv


def test_cache_of_another_kind_is_refused(mo):
    refused(mo.block(kv_cache_scheme="INT3"), "Q-CFG-VALUE", "kv_cache_scheme is 'INT3'")
    odd = {"num_bits": 3, "type": "float"}
    refused(mo.block(kv_cache_scheme=odd), "Q-CFG-VALUE", "kv_cache_scheme")
    refused(mo.block(kv_cache_scheme=[1]), "Q-CFG-VALUE", "kv_cache_scheme")
    refused(mo.block(kv_cache_scheme={"type": [], "num_bits": {}}), "Q-CFG-VALUE", "kv_cache")


def test_only_the_cache_may_be_quantized(mo):
    config = parse_config(mo.side(None, kv_cache_quant_algo="FP8"), "hf_quant_config.json")
    assert config.uniform is None
    assert config.layer("model.layers.0.mlp.up_proj") is None


def test_mixed_precision_lists_its_layers(mo):
    layers = {
        "model.layers.0.q_proj": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.experts": {"quant_algo": "FP8"},
        "model.language_model.layers.1.o_proj": {"quant_algo": "W4A16_AWQ", "group_size": 64},
    }
    config = parse_config(mo.block("MIXED_PRECISION", quantized_layers=layers), "config.json")
    assert config.layer("model.layers.0.q_proj").algo.name == "NVFP4"
    # a parent's entry counts for experts stored one by one; a name's beginning is no parent
    assert config.layer("model.layers.0.mlp.experts.3.up_proj").algo.name == "FP8"
    assert config.layer("model.layers.0.mlp.experts_x") is None
    assert config.layer("language_model.model.layers.1.o_proj").group_size == 64
    assert config.layer("model.layers.1.q_proj") is None
    assert [p.text for p in config.name_patterns()] == ["lm_head", *layers]


def test_mixed_precision_without_layers_is_refused(mo):
    for layers in (None, {}):
        block = mo.block("MIXED_PRECISION", quantized_layers=layers)
        refused(block, "Q-CFG-VALUE", "the layers of MIXED_PRECISION")
    odd = mo.block("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "INT5"}})
    refused(odd, "Q-CFG-VALUE", r"quantized_layers\['a'\].quant_algo is 'INT5'")
    nested = mo.block("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "MIXED_PRECISION"}})
    refused(nested, "Q-CFG-VALUE", "MIXED_PRECISION")
    refused(mo.block("MIXED_PRECISION", quantized_layers=["a"]), "Q-CFG-TYPE", "an object")


def test_algorithms_that_are_not_read_say_why(mo):
    refused(mo.block("NVFP4_SVD"), "Q-CFG-TRANSFORM", "low-rank branch")
    refused(mo.side("mxfp4"), "Q-CFG-VALUE", "whether activations", "hf_quant_config.json")
    refused(mo.block("FP8_PB_REAL"), "Q-CFG-VALUE", "FP8_PB_WO")


@pytest.mark.parametrize("algo", [None, "", "INT3", 4, ["FP8"], "X" * 100, True])
def test_odd_algorithm_is_refused(mo, algo):
    code = "Q-CFG-TYPE" if algo == "" or not isinstance(algo, str | None) else "Q-CFG-VALUE"
    code = "Q-CFG-TYPE" if isinstance(algo, str) and len(algo) > 64 else code
    refused(mo.block(algo), code, "quant_algo")


@pytest.mark.parametrize("size", [0, -2, -1, "16", 3.5, True, 32, 1e12])
def test_odd_group_size_is_refused(mo, size):
    refused(mo.side("NVFP4", group_size=size), "Q-CFG-VALUE", "group_size", "x")


def test_zero_points_are_refused(mo):
    refused(mo.side("W4A16_AWQ", has_zero_point=True), "Q-CFG-VALUE", "has_zero_point", "x")


def test_odd_types_are_refused(mo):
    refused(mo.block(ignore="lm_head"), "Q-CFG-TYPE", "ignore")
    refused(mo.block(ignore=[1]), "Q-CFG-TYPE", "ignore")
    refused({"quant_method": "modelopt", "quantization": 3}, "Q-CFG-TYPE", "quantization")
    with pytest.raises(ConfigError) as err:
        parse_config(mo.block(ignore=[f"a{i}?b" for i in range(2000)]), "config.json")
    assert err.value.code == "Q-CFG-REGEX"


def test_unknown_keys_are_reported_once(mo):
    config = parse_config(mo.block(backend="os.system", auto_map={"x": "y"}), "config.json")
    assert config.warnings == ("config.json: 2 unknown key(s) ignored: 'backend', 'auto_map'",)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"quant_algo": "FP8"}, "quant_algo"),
        ({"exclude_modules": ["lm_head", "x"]}, "the excluded modules"),
        ({"kv_cache_quant_algo": "FP8"}, "the KV cache"),
    ],
)
def test_two_files_that_disagree_are_refused(mo, change, key):
    a = parse_config(mo.block(), "config.json")
    b = parse_config(mo.side(**change), "hf_quant_config.json")
    with pytest.raises(ConfigError, match=key) as err:
        check_agreement(a, b)
    assert err.value.code == "Q-CFG-CONFLICT"
    assert "config.json" in str(err.value)
    assert "hf_quant_config.json" in str(err.value)


def test_group_sizes_of_two_files_must_agree_and_complete_each_other(mo):
    a = parse_config(mo.block("W4A16_AWQ"), "config.json")
    b = parse_config(mo.side("W4A16_AWQ", group_size=64), "hf_quant_config.json")
    assert check_agreement(a, b).uniform.group_size == 64
    groups = {"group_0": {"weights": {"group_size": 32}}}
    c = parse_config(mo.block("W4A16_AWQ", config_groups=groups), "config.json")
    with pytest.raises(ConfigError, match="group_size is 32"):
        check_agreement(c, b)


def test_excluded_names_are_shell_patterns_over_whole_names(mo):
    entries = ["lm_head", "model.layers.0*", "model.layers.1.mlp.*", "*.gate"]
    skip = parse_config(mo.block(ignore=entries), "config.json").skip
    assert skip.strict("lm_head") == "lm_head"
    assert skip.strict("model.layers.0.mlp.up_proj") == "model.layers.0*"
    assert skip.strict("model.layers.1.mlp.up_proj") == "model.layers.1.mlp.*"
    assert skip.strict("model.layers.1.mlp.gate") == "model.layers.1.mlp.*"
    assert skip.strict("model.layers.2.mlp.gate") == "*.gate"
    for name in ("model.lm_head", "model.layers.1.mlp", "model.layers.2.mlp.gate_proj"):
        assert skip.strict(name) == ""


def test_parts_of_names_match_for_old_producers_only(mo):
    for version, matches in (("0.37.0", True), ("0.39.0", False), ("0.47.0", False)):
        producer = {"name": "modelopt", "version": version}
        config = parse_config(mo.block(ignore=["self_attn"], producer=producer), "config.json")
        (pattern,) = config.skip.patterns
        assert pattern.matches("model.layers.0.self_attn.q_proj") is matches
        assert config.skip.strict("model.layers.0.self_attn.q_proj") == ""


def test_config_pickles_small(mo):
    config = parse_config(mo.block(ignore=["lm_head"]), "config.json")
    data = pickle.dumps(config)
    assert len(data) < 2000
    assert pickle.loads(data) == config
