"""The config: every key checked, packings by name, which rule of extra_config counts."""

from __future__ import annotations

import json
import pickle
from types import MappingProxyType
from typing import Any

import pytest

import made_autoround as made
from quant_core.errors import ConfigError
from quant_core.resolve import unmatched
from quant_plugin_autoround.config import AutoRoundConfig, parse_config


def parse(**changes: Any) -> AutoRoundConfig:
    return parse_config(made.config(**changes), "config.json")


def fails(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as err:
        parse(**changes)
    assert str(err.value).startswith("config.json: ")
    assert (err.value.path, err.value.plugin) == ("config.json", "autoround")
    return err.value


@pytest.mark.parametrize(
    ("packing_format", "dialect"),
    [
        ("auto_round:auto_gptq", "minus_one"),
        ("auto_round:gptq", "minus_one"),
        ("AUTO_ROUND:GPTQ:exllamav2", "minus_one"),
        ("auto", "minus_one"),
        (..., "minus_one"),
        ("auto_round", "raw"),
        ("auto_round:exllamav2", "raw"),
        ("auto-round:tritonv2", "raw"),
        ("auto_round:gptqmodel", "raw"),
        ("auto_round:auto_awq", "interleaved"),
        ("auto_round:awq", "interleaved"),
        ("auto_round:llm_compressor", "float"),
        ("auto_round:llm_compressor_nvfp4_e5m3", "float"),
        ("auto_round:fp8", "float"),
        ("auto_round:fp8_static", "float"),
    ],
)
def test_packing_format_names_the_dialect(packing_format: Any, dialect: str) -> None:
    config = parse(packing_format=packing_format)
    assert config.dialect == dialect
    assert config.stated is (packing_format is not ...)


@pytest.mark.parametrize("value", ["marlin", "mlx", "auto_round:", "auto_round:new", "gptq"])
def test_unknown_packing_format_raises_with_the_known_ones(value: str) -> None:
    err = fails(packing_format=value)
    assert (err.code, err.tensor, err.actual) == ("Q-CFG-VALUE", "packing_format", value)
    assert "auto_round:auto_awq" in str(err)


@pytest.mark.parametrize(
    ("backend", "dialect"),
    [
        ("auto_round:exllamav2", "raw"),
        ("auto_round:gptq:exllamav2", "minus_one"),
        ("autoround:awq", "interleaved"),
        ("auto", "minus_one"),
        ("auto_round:torch_zp", "minus_one"),
        ("os.system", "minus_one"),
        (7, "minus_one"),
    ],
)
def test_backend_of_old_files_names_the_layout_and_else_is_inert(
    backend: Any, dialect: str
) -> None:
    assert parse(packing_format=..., backend=backend).dialect == dialect
    assert parse(packing_format="auto_round:awq", backend=backend).dialect == "interleaved"


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 33, 3.5, "4", True, -4, 10**9, None])
def test_wrong_bits_raise_and_name_the_allowed_ones(bits: Any) -> None:
    err = fails(bits=bits)
    assert (err.code, err.tensor) == ("Q-CFG-VALUE", "bits")
    assert "2 to 8" in str(err) or bits is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_right_bits_are_kept(bits: int) -> None:
    default = parse(bits=bits).default
    assert default.bits == bits
    assert default.quantized is (bits < 16)


@pytest.mark.parametrize("size", [0, -2, "128", 10**12, True, None, [128, 128]])
def test_wrong_group_size_of_integers_raises(size: Any) -> None:
    assert fails(group_size=size).code == "Q-CFG-VALUE"
    assert fails(extra_config={"a": {"group_size": size}}).code == "Q-CFG-VALUE"


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_missing_size_raises(key: str) -> None:
    err = fails(**{key: ...})
    assert (err.code, err.tensor) == ("Q-CFG-VALUE", key)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sym": "yes"}, "sym"),
        ({"data_type": 4}, "data_type"),
        ({"act_bits": "8"}, "act_bits"),
        ({"packing_format": ["auto_round"]}, "packing_format"),
        ({"extra_config": []}, "extra_config"),
        ({"extra_config": {"a": 4}}, "extra_config"),
        ({"extra_config": {"a": {"bits": 12}}}, "extra_config['a'].bits"),
        ({"block_name_to_quantize": {"a": 1}}, "block_name_to_quantize"),
        ({"block_name_to_quantize": [1]}, "block_name_to_quantize"),
    ],
)
def test_wrong_types_raise_and_name_the_key(changes: dict[str, Any], key: str) -> None:
    err = fails(**changes)
    assert (err.code[:6], err.tensor) == ("Q-CFG-", key)


@pytest.mark.parametrize("pattern", ["(", "[a", "(a+)+$" * 2000])
def test_bad_regular_expression_raises(pattern: str) -> None:
    with pytest.raises(ConfigError) as err:
        parse(extra_config={pattern: {"bits": 8}}).settings("a" * 200)
    assert err.value.code == "Q-CFG-REGEX"


def test_too_many_regular_expressions_raise() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: extra_config: 1001") as err:
        parse(extra_config={f"a.*{i}": {} for i in range(1001)})
    assert err.value.code == "Q-CFG-REGEX"


def test_unknown_keys_are_reported_once_and_harmless_ones_are_not() -> None:
    config = parse(iters=0, lr=0.1, colour="red", extra_config={"a": {"bits": 8, "size": 1}})
    assert len(config.warnings) == 1
    assert "'colour'" in config.warnings[0]
    assert "size" in config.warnings[0]
    assert "iters" not in config.warnings[0]


def test_keys_that_smell_of_code_are_inert() -> None:
    config = parse(auto_map={"x": "y.Z"}, trust_remote_code=True, backend="os.system")
    assert config.default == parse().default


def test_config_pickles_small_and_keeps_the_block() -> None:
    raw = made.config(extra_config={"a": {"bits": 8}})
    config = parse_config(MappingProxyType(raw), "config.json")
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(config.stored) == raw


# ----------------------------------------------------------------------------------- settings


NAME = "model.layers.3.mlp.gate_proj"


@pytest.mark.parametrize(
    ("keys", "bits"),
    [
        ([NAME, ".*gate_proj.*"], 2),
        ([".*gate_proj.*", NAME], 3),
        (["layers.3.mlp.gate_proj", ".*gate_proj.*"], 2),
        ([".*gate_proj.*", "layers.3.mlp.gate_proj"], 3),
        (["gate_proj", NAME], 3),
        ([r".*layers\.3\..*", ".*gate_proj.*"], 2),
        (["mlp.gate", "model.layers.3"], 4),  # names in full match at dots only
        (["model.layers.3.mlp.gate_proj_x"], 4),
    ],
)
def test_exact_beats_suffix_beats_the_first_regular_expression(keys: list[str], bits: int) -> None:
    config = parse(extra_config={k: {"bits": i} for i, k in enumerate(keys, 2)})
    assert config.settings(NAME).bits == bits


def test_overrides_merge_over_the_defaults() -> None:
    config = parse(sym=False, extra_config={NAME: {"bits": 2}, "x": {"sym": True, "group_size": 8}})
    found = config.settings(NAME)
    assert (found.bits, found.group_size, found.sym, found.rule) == (2, 32, False, NAME)
    assert (config.settings("x").bits, config.settings("x").sym) == (4, True)


def test_null_overrides_keep_the_defaults() -> None:
    # as the tool writes them for a quantized lm_head
    entry = {"bits": 4, "act_bits": 16, "super_bits": None, "rotation_config": None, "sym": None}
    found = parse(extra_config={"lm_head": entry}).settings("lm_head")
    assert found.unread == []
    assert (found.bits, found.sym) == (4, True)


@pytest.mark.parametrize(
    ("blocks", "inside"),
    [
        ("model.layers", True),
        ("model.visual, model.layers", True),
        (["model.layers.3"], True),
        ([["model.layers.2", "model.layers.3"]], True),
        ("model.layers.30", False),
        ("model.lay", False),
        (["model.visual"], False),
        (..., True),
    ],
)
def test_modules_outside_the_blocks_are_not_quantized(blocks: Any, inside: bool) -> None:
    config = parse(block_name_to_quantize=blocks)
    assert config.in_blocks(NAME) is inside
    assert config.settings(NAME).bits == (4 if inside else 16)
    assert config.settings("lm_head").bits == 16


def test_old_key_of_the_blocks_is_read() -> None:
    config = parse(block_name_to_quantize=..., to_quant_block_names="model.layers")
    assert [p.text for p in config.blocks] == ["model.layers"]


def test_packed_module_passes_over_a_regular_expression_that_excludes_it() -> None:
    rule = {r".*layers\.3\.mlp\.gate.*": {"bits": 16, "data_type": "float"}}
    config = parse(extra_config=rule)
    assert config.settings(NAME).bits == 16
    assert config.packed_settings(NAME).bits == 4
    assert config.packed_settings("model.layers.3.mlp.gate").bits == 4
    named = parse(extra_config={NAME: {"bits": 16}})
    assert named.packed_settings(NAME).bits == 16


def test_packed_module_outside_the_blocks_takes_the_defaults() -> None:
    assert parse().packed_settings("lm_head").bits == 4


@pytest.mark.parametrize(
    ("changes", "unread"),
    [
        ({}, []),
        ({"act_bits": 16}, []),
        ({"data_type": "mx_fp", "group_size": 32}, ["4-bit mx_fp weights"]),
        ({"data_type": "fp8", "bits": 8, "group_size": 0}, ["8-bit fp8 weights"]),
        ({"data_type": "fp8", "bits": 8, "group_size": [128, 128]}, ["8-bit fp8 weights"]),
        ({"data_type": "int_asym_dq", "group_size": 32}, ["4-bit int_asym_dq weights"]),
        ({"act_bits": 8}, ["8-bit int activations"]),
        ({"act_bits": 8, "act_data_type": "fp8"}, ["8-bit fp8 activations"]),
        ({"super_bits": 6}, ["scales in super-groups (super_bits)"]),
        ({"rotation_config": {"a": 1}}, ["rotated activations (rotation_config)"]),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], unread: list[str]) -> None:
    assert parse(**changes).default.unread == unread
    inherited = parse(**changes, extra_config={NAME: {"sym": False}}).settings(NAME)
    assert inherited.unread == unread


def test_patterns_that_match_nothing_are_reported_but_not_single_experts() -> None:
    config = parse(
        extra_config={
            "model.layers.0.mlp.experts.3.up_proj": {"bits": 8},
            r".*experts\.3\..*": {"bits": 8},
            ".*typo.*": {"bits": 8},
            "gate_proj": {"bits": 8},
        }
    )
    left = [p.text for p in unmatched(config.name_patterns(), [NAME])]
    assert left == [".*typo.*"]
