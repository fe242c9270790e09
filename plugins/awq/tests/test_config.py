"""Config blocks: defaults, aliases, dialects, and every wrong value by its code."""

from __future__ import annotations

import pickle

import pytest

from quant_core.checkpoint.json import freeze_json
from quant_core.errors import ConfigError
from quant_core.resolve import unmatched
from quant_plugin_awq.config import AwqConfig, parse_config

AUTOAWQ = {
    "quant_method": "awq",
    "zero_point": True,
    "group_size": 128,
    "bits": 4,
    "version": "gemm",
    "modules_to_not_convert": None,
}
GPTQMODEL = AUTOAWQ | {"meta": {"quantizer": ["gptqmodel:7.7.0"]}, "pack_dtype": "int32"}
AUTOROUND = AUTOAWQ | {"provider": "auto-round"}


def _parse(block):
    return parse_config(freeze_json(block), "config.json")


def test_parse_autoawq_block_and_its_old_aliases_agree():
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert _parse(old) == _parse(AUTOAWQ)
    assert _parse({"quant_method": "awq"}) == _parse(AUTOAWQ)


def test_config_is_small_plain_data():
    config = _parse(AUTOAWQ | {"modules_to_not_convert": ["lm_head"]})
    assert pickle.loads(pickle.dumps(config)) == config
    assert len(pickle.dumps(config)) < 2000


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        ({}, "gemm"),
        ({"version": "GEMV"}, "gemv"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"version": "exllamav2"}, "gemm"),
        ({"version": "exllama"}, "gemm"),
        ({"version": None, "format": "gemv"}, "gemv"),
        ({"version": None, "checkpoint_format": "gemv"}, "gemv"),
        ({"version": "gemm", "format": "gemv"}, "gemm"),  # version beats format
        ({"version": "gemm", "backend": "llm-awq"}, "llm-awq"),
        ({"version": None, "format": "llm-awq"}, "llm-awq"),
        ({"backend": "autoawq"}, "gemm"),
        ({"backend": "os.system"}, "gemm"),  # a name is never imported
    ],
)
def test_layout_comes_from_version_then_format_and_backend(keys, layout):
    assert _parse(AUTOAWQ | keys).layout == layout


@pytest.mark.parametrize(
    ("block", "bits"),
    [(GPTQMODEL, b) for b in range(2, 9)] + [(AUTOROUND, b) for b in range(4, 8)],
)
def test_bits_of_a_known_dialect_are_accepted(block, bits):
    assert _parse(block | {"bits": bits}).bits == bits


@pytest.mark.parametrize(
    ("block", "bits"),
    [(AUTOAWQ, b) for b in (0, 2, 3, 5, 8, -4, 3.5, "4", True, 10**9, (4,))]
    + [(AUTOROUND, 3), (AUTOROUND, 8), (GPTQMODEL, 9), (GPTQMODEL, 1)]
    + [(GPTQMODEL | {"version": "gemv"}, 8)],
)
def test_other_bits_raise_cfg_value_with_the_allowed_set(block, bits):
    with pytest.raises(ConfigError, match=r"config.json: bits is .*expected .*4") as err:
        _parse(block | {"bits": bits})
    assert err.value.code == "Q-CFG-VALUE"
    assert err.value.actual == bits


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"group_size": 0}, "Q-CFG-VALUE"),
        ({"group_size": -2}, "Q-CFG-VALUE"),
        ({"group_size": "128"}, "Q-CFG-VALUE"),
        ({"group_size": 1e12}, "Q-CFG-VALUE"),
        ({"group_size": True}, "Q-CFG-VALUE"),
        ({"version": "marlin"}, "Q-CFG-VALUE"),
        ({"version": "gemm_v3"}, "Q-CFG-VERSION"),
        ({"version": 99}, "Q-CFG-VERSION"),
        ({"version": ["gemm"]}, "Q-CFG-TYPE"),
        ({"zero_point": "yes"}, "Q-CFG-VALUE"),
        ({"zero_point": True, "sym": True}, "Q-CFG-CONFLICT"),
        ({"desc_act": True}, "Q-CFG-CONFLICT"),
        ({"w_bit": 8}, "Q-CFG-CONFLICT"),
        ({"q_group_size": 64}, "Q-CFG-CONFLICT"),
        ({"pack_dtype": "int64"}, "Q-CFG-VALUE"),
        ({"modules_to_not_convert": "lm_head"}, "Q-CFG-TYPE"),
        ({"modules_to_not_convert": [1]}, "Q-CFG-TYPE"),
        ({"modules_to_not_convert": [""]}, "Q-CFG-VALUE"),
        ({"dynamic": {"+:lm_head": {"bits": 8}}}, "Q-CFG-VALUE"),
        ({"dynamic": {"-:(a": {}}}, "Q-CFG-REGEX"),
        ({"dynamic": ["x"]}, "Q-CFG-TYPE"),
        ({"lm_head": 1}, "Q-CFG-VALUE"),
    ],
)
def test_wrong_value_raises_with_code_and_key(keys, code):
    with pytest.raises(
        ConfigError, match=r"^config\.json: .*expected .*\. .*\.$|-:|name pattern"
    ) as e:
        _parse(AUTOAWQ | keys)
    assert e.value.code == code


def test_sym_alone_decides_zero_point():
    block = {k: v for k, v in AUTOAWQ.items() if k != "zero_point"}
    assert _parse(block | {"sym": True}).zero_point is False
    assert _parse(block | {"sym": False}).zero_point is True


def test_unknown_keys_give_one_warning_that_names_them():
    config = _parse(AUTOAWQ | {"zz_new": 1, "aa_new": 2, "auto_map": {"a": "b"}})
    assert len(config.warnings) == 1
    assert all(key in config.warnings[0] for key in ("zz_new", "aa_new", "auto_map", "config.json"))
    assert _parse(AUTOAWQ).warnings == ()


def test_excluded_prefers_whole_names_and_falls_back_to_substrings():
    config = AwqConfig(modules_to_not_convert=("layers.1.mlp.gate", "visual."))
    assert config.excluded_exactly("model.layers.1.mlp.gate") == "layers.1.mlp.gate"
    assert config.excluded_exactly("model.visual.blocks.0.attn") == "visual"
    assert config.excluded_exactly("model.layers.1.mlp.gate_proj") == ""
    assert config.excluded("model.layers.1.mlp.gate_proj") == "layers.1.mlp.gate"
    assert config.excluded("model.layers.11.mlp.up_proj") == ""


def test_dynamic_skip_rule_excludes_from_the_start_of_the_name():
    config = _parse(GPTQMODEL | {"dynamic": {r"-:.*\.layers\.0\.": {}}})
    assert config.excluded("model.layers.0.mlp.up_proj") == r"-:.*\.layers\.0\."
    assert config.excluded("model.layers.1.mlp.up_proj") == ""


def test_patterns_that_match_no_module_are_listed():
    config = AwqConfig(modules_to_not_convert=("lm_head", "visual"))
    left = unmatched(config.name_patterns(), ["lm_head", "model.layers.0.mlp.up_proj"])
    assert [(p.text, p.purpose) for p in left] == [("visual", "modules_to_not_convert")]


def test_exclusion_of_100k_names_is_one_lookup():
    names = tuple(f"model.layers.{i}.mlp.gate" for i in range(100_000))
    config = AwqConfig(modules_to_not_convert=names)
    hits = [config.excluded_exactly(f"model.layers.{i}.mlp.gate") for i in range(1000)]
    assert all(hits)
    assert config.excluded_exactly("model.layers.0.mlp.gate_proj") == ""
