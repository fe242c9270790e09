"""Config blocks: every value checked, every contradiction named."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import time
from typing import Any

import pytest

import made_gptq as made
from quant_core.errors import ConfigError
from quant_plugin_gptq.config import GptqConfig, parse_config


def parse(**changes: Any) -> GptqConfig:
    return parse_config(made.config(**changes), "config.json")


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9, 3.5, "4", True, -4, 10**9, float("nan"), None])
def test_bad_bits_raise(bits: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: bits is .* expected one of") as err:
        parse(bits=bits)
    assert (err.value.code, err.value.tensor) == ("Q-CFG-VALUE", "bits")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_common_bits_are_read(bits: int) -> None:
    assert parse(bits=bits).bits == bits


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_bits_need_a_known_dialect(bits: int) -> None:
    assert parse(bits=bits, checkpoint_format="gptq_p").bits == bits
    assert parse(bits=bits, provider="auto-round").autoround
    with pytest.raises(ConfigError, match="two layouts"):
        parse(bits=bits)


@pytest.mark.parametrize("size", [0, -2, "128", 10**12, 128.0, True, None])
def test_bad_group_size_raises(size: Any) -> None:
    with pytest.raises(ConfigError, match="group_size is") as err:
        parse(group_size=size)
    assert (err.value.code, err.value.tensor) == ("Q-CFG-VALUE", "group_size")


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_missing_bits_or_group_size_raises(key: str) -> None:
    with pytest.raises(ConfigError) as err:
        parse(**{key: ...})
    assert (err.value.code, err.value.tensor) == ("Q-CFG-VALUE", key)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("sym", "true", "Q-CFG-VALUE"),
        ("desc_act", 1, "Q-CFG-VALUE"),
        ("lm_head", "no", "Q-CFG-VALUE"),
        ("pack_dtype", "int16", "Q-CFG-VALUE"),
        ("checkpoint_format", "marlin", "Q-CFG-VALUE"),
        ("checkpoint_format", "bitblas", "Q-CFG-VALUE"),
        ("checkpoint_format", "gptq_v3", "Q-CFG-VERSION"),
        ("checkpoint_format", ["gptq"], "Q-CFG-TYPE"),
        ("is_marlin_format", True, "Q-CFG-VALUE"),
        ("data_type", "mx_fp", "Q-CFG-VALUE"),
        ("act_bits", 8, "Q-CFG-VALUE"),
        ("super_bits", 6, "Q-CFG-VALUE"),
        ("rotation_config", {"block": 32}, "Q-CFG-VALUE"),
        ("dynamic", ["x"], "Q-CFG-TYPE"),
        ("dynamic", {"x": 4}, "Q-CFG-TYPE"),
        ("dynamic", {"x": {"bits": 5}}, "Q-CFG-VALUE"),
        ("dynamic", {"x": {"group_size": 0}}, "Q-CFG-VALUE"),
        ("dynamic", {"-:(unclosed": {}}, "Q-CFG-REGEX"),
        ("modules_in_block_to_quantize", "q_proj", "Q-CFG-TYPE"),
    ],
)
def test_bad_values_raise_and_name_the_key(key: str, value: Any, code: str) -> None:
    with pytest.raises(ConfigError) as err:
        parse(**{key: value})
    assert err.value.code == code
    if code != "Q-CFG-REGEX":
        assert "config.json" in str(err.value)
        assert key in str(err.value)


def test_format_keys_that_disagree_raise() -> None:
    with pytest.raises(ConfigError) as err:
        parse(format="gptq_v2")
    assert err.value.code == "Q-CFG-CONFLICT"


@pytest.mark.parametrize("spelling", ["GPTQ_V2", " gptq_v2 "])
def test_format_is_read_without_case(spelling: str) -> None:
    assert parse(checkpoint_format=spelling).checkpoint_format == "gptq_v2"


def test_defaults_of_absent_keys() -> None:
    config = parse(checkpoint_format=..., desc_act=..., sym=..., pack_dtype=..., meta=...)
    assert config.checkpoint_format is None
    assert config.desc_act is None
    assert config.sym is True
    assert any("sym is not given" in w for w in config.warnings)


def test_unknown_keys_are_reported_once() -> None:
    config = parse(colour="red", dynamic={"x": {"shape": 1}}, damp_percent=0.1)
    (warning,) = config.warnings
    assert "2 unknown key(s)" in warning
    assert "'colour'" in warning
    assert "shape" in warning
    assert "damp_percent" not in warning


def test_asymmetric_v1_of_another_producer_warns() -> None:
    assert not parse(sym=False).warnings
    assert any("AutoGPTQ" in w for w in parse(sym=False, meta=...).warnings)
    assert not parse(sym=False, meta=..., checkpoint_format="gptq_v2").warnings


def test_config_pickles_and_compares() -> None:
    config = parse(dynamic={"-:a": {}})
    assert pickle.loads(pickle.dumps(config)) == config


DYNAMIC = {
    "-:.*layers\\.3\\..*": {},
    "+:.*down_proj": {"bits": 8, "group_size": 64},
    "model\\.layers\\.1": {"sym": False, "desc_act": True},
}


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "sym", "skip"),
    [
        ("model.layers.0.q_proj", 4, 32, True, ""),
        ("model.layers.0.down_proj", 8, 64, True, ""),
        ("model.layers.1.down_proj", 8, 64, True, ""),  # the first match wins
        ("model.layers.1.q_proj", 4, 32, False, ""),
        ("model.layers.10.q_proj", 4, 32, False, ""),  # anchored at the start only
        ("a.model.layers.1.q_proj", 4, 32, True, ""),
        ("model.layers.3.q_proj", 4, 32, True, "-:.*layers\\.3\\..*"),
        ("model.layers.30.q_proj", 4, 32, True, ""),
    ],
)
def test_dynamic_rules_apply_in_order(
    name: str, bits: int, group_size: int, sym: bool, skip: str
) -> None:
    found = parse(dynamic=DYNAMIC).settings(name)
    assert (found.bits, found.group_size, found.sym, found.skip) == (bits, group_size, sym, skip)


def test_override_before_an_exclusion_is_told_apart() -> None:
    config = parse(dynamic={"+:.*down_proj": {"bits": 8}, "-:.*layers\\.3": {}})
    name = "model.layers.3.down_proj"
    assert config.settings(name).skip == ""  # packed: the file was written in its own order
    assert config.settings(name).bits == 8
    assert config.skips(name) == "-:.*layers\\.3"  # float: exclusions were tried first
    assert config.settings("model.layers.3.q_proj").skip == "-:.*layers\\.3"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a?)+$", "((a|aa)*)*b", "(.*)*(.*)*(.*)*x"])
def test_runaway_pattern_is_bounded(pattern: str) -> None:
    config = parse(dynamic={f"-:{pattern}": {}})
    start = time.perf_counter()
    answer = None
    with contextlib.suppress(ConfigError):  # refusing the pattern is as good as answering
        answer = config.settings("a" * 60 + "!").skip
    assert not answer
    assert time.perf_counter() - start < 1


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(ConfigError) as err:
        parse(dynamic={f"-:.*{i}": {} for i in range(2000)})
    assert err.value.code == "Q-CFG-REGEX"


def test_planning_modules_import_no_torch() -> None:
    code = (
        "import sys, quant_plugin_gptq; assert 'torch' not in sys.modules; "
        "import quant_plugin_gptq.detect, quant_plugin_gptq.layers, quant_plugin_gptq.writer; "
        "assert not {'torch', 'numpy', 'triton'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
